"""Workloads of the benchmarks: models of known shapes with random weights, and lists of realistic lengths.

A list has 160 prompt tokens, 20 passages with 1.35 tokens per word, and 80 response tokens. The number of words in a
passage is lognormal (median 70, sigma 0.6), times a lognormal factor per query (median 1, sigma 0.35), at most 300: so
passages of a list differ in length, and so do lists. Lists over 4,096 tokens are skipped, as in the recipes. Token ids
are random; the cost of a step does not depend on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from rankllm_composer.data.packing import TokenizedList

NUM_PASSAGES = 20
PROMPT_TOKENS, RESPONSE_TOKENS = 160, 80
TOKENS_PER_WORD = 1.35
MAX_PASSAGE_WORDS = 300
MAX_LIST_TOKENS = 4096
WARM_UP_LENGTHS = [200, 150]  # of an untimed step, which starts threads and allocates Adam's moments

# name: architecture, configuration
SHAPES = {
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_theta": 100_000,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "smollm2-4-layers": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 4,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_theta": 100_000,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "mistral-30m": (  # Mistral-7B's proportions and vocabulary: F = 3.5 D, 4 query heads per key-value head, untied
        "mistral",
        {
            "vocab_size": 32768,
            "hidden_size": 256,
            "intermediate_size": 896,
            "num_hidden_layers": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "rope_theta": 1_000_000,
            "max_position_embeddings": 8192,
            "sliding_window": None,
        },
    ),
    "mistral-4-layers": (
        "mistral",
        {
            "vocab_size": 32768,
            "hidden_size": 256,
            "intermediate_size": 896,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "rope_theta": 1_000_000,
            "max_position_embeddings": 8192,
            "sliding_window": None,
        },
    ),
    "llama-1b": (  # Llama-3.2-1B
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rope_theta": 500_000,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "mistral-7b-6-layers": (  # Mistral-7B-Instruct-v0.3, cut to 6 of 32 layers
        "mistral",
        {
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 6,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_theta": 1_000_000,
            "max_position_embeddings": 32768,
            "sliding_window": None,
        },
    ),
    "toy": (
        "llama",
        {
            "vocab_size": 128,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
}


def model_config(shape: str) -> PretrainedConfig:
    """Return the configuration of a shape."""
    from transformers import AutoConfig

    architecture, sizes = SHAPES[shape]
    return AutoConfig.for_model(architecture, **sizes)


def new_model(shape: str, device: str = "cpu") -> PreTrainedModel:
    """Create a float32 causal LM of a shape on a device, with the same random weights there on every call."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(model_config(shape), attn_implementation="sdpa").train()


def recomputed_flops(config: PretrainedConfig, lengths: list[int]) -> int:
    """Count the FLOPs that full activation checkpointing adds to a step.

    Each layer's forward pass is recomputed, except its last matrix product, whose output no gradient needs.
    """
    from rankllm_composer.model.flops import forward_flops

    last_products = 2 * config.intermediate_size * config.hidden_size * config.num_hidden_layers * sum(lengths)
    return forward_flops(config, lengths, 0) - last_products


def list_lengths(num_lists: int, seed: int) -> list[int]:
    """Sample the number of tokens of each list, as the module's docstring describes."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while len(lengths) < num_lists:
        words = rng.lognormal(np.log(70), 0.6, NUM_PASSAGES) * rng.lognormal(0, 0.35)
        passages = np.ceil(np.minimum(words, MAX_PASSAGE_WORDS)) * TOKENS_PER_WORD
        length = PROMPT_TOKENS + int(passages.sum()) + RESPONSE_TOKENS
        if length <= MAX_LIST_TOKENS:
            lengths.append(length)
    return lengths


def useful_share(lengths: list[int]) -> float:
    """Return the share of real tokens if every list is padded to the longest."""
    return sum(lengths) / (len(lengths) * max(lengths))


def typical_lengths(num_lists: int, num_draws: int = 1000) -> list[int]:
    """Return a representative sample: the one of `num_draws` closest to their mean in tokens and useful share."""
    draws = [list_lengths(num_lists, seed) for seed in range(num_draws)]
    statistics = np.array([(sum(lengths), useful_share(lengths)) for lengths in draws])
    distance = np.abs(statistics / statistics.mean(axis=0) - 1).sum(axis=1)
    return draws[int(distance.argmin())]


def new_lists(lengths: list[int], shape: str) -> list[TokenizedList]:
    """Create teacher-ranked lists with the given numbers of tokens, encoded for the combined objective."""
    from rankllm_composer.data.packing import TokenizedList
    from rankllm_composer.prompts.encoding import EncodedRecord

    rng = np.random.default_rng(0)
    vocabulary = SHAPES[shape][1]["vocab_size"]
    return [
        TokenizedList(
            EncodedRecord(
                input_ids=rng.integers(0, vocabulary, length).astype(np.int32),
                response_start=length - RESPONSE_TOKENS,
                score_position=length - RESPONSE_TOKENS,
                identifier_token_ids=np.arange(30, 30 + NUM_PASSAGES, dtype=np.int32),
                ranks=rng.permutation(NUM_PASSAGES),
            ),
            record_id=f"list-{index}",
            record_key=index,
        )
        for index, length in enumerate(lengths)
    ]
