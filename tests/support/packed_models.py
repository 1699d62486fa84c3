"""Tiny models of every supported family, and their losses computed packed and one list at a time."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rankllm_composer.data.packing import TokenizedList, split_batch
from rankllm_composer.model.losses import LOSSES
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker, checkpoint_activations
from rankllm_composer.prompts.encoding import EncodedRecord
from rankllm_composer.prompts.relevance import Relevance

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
}


FAMILIES = {
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral_windowed": MistralConfig(**SIZES, sliding_window=9),
    "mistral_tied": MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2_windowed": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=2),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "phi_biased_head": PhiConfig(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=12, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=16, num_experts=12, num_experts_per_tok=2),
}


def new_model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), attn_implementation="sdpa")


def _random_relevance(ranks: np.ndarray, seed: int, index: int) -> Relevance:
    """Scores of a teacher, and in every second list grades with ties in place of the strict order."""
    generator = np.random.default_rng((seed, index))
    scores = generator.normal(size=len(ranks)).astype(np.float32)
    if index % 2:
        return Relevance(ranks, np.full(len(ranks), np.nan, np.float32), scores)
    grades = generator.integers(0, 3, len(ranks))
    return Relevance((grades[None, :] > grades[:, None]).sum(axis=1), grades.astype(np.float32), scores)


def random_sequences(objective: str, num: int = 5, seed: int = 0) -> list[TokenizedList]:
    """Create lists of different lengths and candidate counts; those for `ranking` end at their score position."""
    generator = np.random.default_rng(seed)
    sequences = []
    for index in range(num):
        num_candidates = int(generator.integers(2, 7))
        prompt, response = int(generator.integers(8, 30)), 0 if objective == "ranking" else 4 * num_candidates
        encoded = EncodedRecord(
            input_ids=generator.integers(0, 96, prompt + response).astype(np.int32),
            response_start=prompt,
            score_position=prompt - 1 if objective == "ranking" else prompt,
            identifier_token_ids=np.arange(10, 10 + num_candidates, dtype=np.int32),
            ranks=generator.permutation(num_candidates),
        )
        sequences.append(TokenizedList(encoded, f"r{index}", index, _random_relevance(encoded.ranks, seed, index)))
    return sequences


def plain_losses(
    model: torch.nn.Module, sequences: list[TokenizedList], objective: Objective, list_loss: Callable | None = None
) -> dict[str, torch.Tensor]:
    """Compute the losses one list at a time with the HF model, in explicit loops."""
    token_losses, list_losses = [], []
    for sequence in sequences:
        item = sequence.encoded
        ids = torch.from_numpy(item.input_ids.astype(np.int64))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        identifiers, named = item.identifier_token_ids.tolist(), set()
        for place in range(item.response_start, len(ids)):
            right = {int(ids[place])}
            if place > item.score_position and int(ids[place]) in identifiers:
                equals = _equals(sequence.relevance, identifiers.index(ids[place]))
                right |= {identifiers[i] for i in equals} - named
                named.add(int(ids[place]))
            token_losses.append(-F.log_softmax(logits[place - 1], -1)[sorted(right)].exp().sum().log())
        scores = logits[item.score_position][torch.from_numpy(item.identifier_token_ids.astype(np.int64))]
        loss, relevance = list_loss or LOSSES[objective.ranking_loss], sequence.relevance
        options = dict(objective.ranking_loss_options)
        for name in {"grades", "teacher_scores"} & inspect.signature(loss).parameters.keys():
            options[name] = torch.from_numpy(getattr(relevance, name))[None]
        list_losses.append(loss(scores[None], torch.from_numpy(relevance.ranks)[None], **options))
    parts = {}
    if objective.name != "ranking":
        parts["language_modelling"] = torch.stack(token_losses).mean()
    if objective.name != "generation":
        parts["ranking"] = torch.stack(list_losses).mean()
    weights = {"language_modelling": objective.language_modelling_weight, "ranking": objective.ranking_weight}
    return {"total": sum(weights[name] * value for name, value in parts.items()), **parts}


def _equals(relevance: Relevance, candidate: int) -> list[int]:
    """The candidates of equal grade in a list that grades order, or else of equal rank."""
    values = relevance.ranks if np.isnan(relevance.grades[candidate]) else relevance.grades
    return [i for i, value in enumerate(values) if value == values[candidate]]


def packed_losses(model: torch.nn.Module, sequences: list[TokenizedList], objective: Objective, **options) -> dict:
    """Compute the losses with ListwiseReranker, averaged over microbatches as in Composer; accumulate gradients."""
    limit = options.pop("limit", {"max_lists": 100})
    compiles = options.pop("compile_layers", False)
    checkpoint_activations(model, options.pop("activation_checkpointing", 0.0), options.pop("keeps_attention", False))
    reranker = ListwiseReranker(model, None, objective, **options)
    if compiles:
        reranker.compile_layers()
    microbatches = split_batch({"sequences": sequences}, **limit)
    totals: dict[str, torch.Tensor] = {}
    for batch in microbatches:
        parts = reranker.loss(reranker(batch), batch)
        (parts["total"] / len(microbatches)).backward()
        for name, value in parts.items():
            totals[name] = totals.get(name, 0) + value.detach() / len(microbatches)
    return totals


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}
