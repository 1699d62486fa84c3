"""Tiny rerankers: random models with a word-level tokenizer, and models with known rankings."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rankllm_composer.prompts.contract import DecodingContract, decoding_contract
from rankllm_composer.prompts.permutations import MAX_CANDIDATES, identifiers
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import render_user_turn

SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
LETTERS = identifiers(26)
VALUES = [f"w{value}" for value in range(100)]  # a passage that contains `w7` has value 7
WORDS = [*SPECIAL, "[", "]", ">", *LETTERS, *"0123456789", *VALUES, "wing", "heat", "flow"]
CHAT_TEMPLATE = "<s>{% for message in messages %}[INST] {{ message['content'] }}{% endfor %}[/INST]"
NO_SYSTEM_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }}{% endif %}"
    "{% endfor %}[/INST]"
)
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,  # heads of 32, the smallest that servers support
    "initializer_range": 0.5,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
FAMILIES = {
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral_windowed": MistralConfig(**SIZES, sliding_window=40),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
}


def new_tokenizer(
    adds_bos: bool = True, template: str = CHAT_TEMPLATE, whole_numbers: bool = False
) -> PreTrainedTokenizerFast:
    """Create a word-level tokenizer with one token per digit or per number; by default, prompts begin with two <s>."""
    words = [*WORDS, *map(str, range(10, 100))] if whole_numbers else WORDS
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    pieces = Regex(r"w\d+|\d+|[^\W\d]+|[^\w\s]" if whole_numbers else r"w\d+|\d|[^\W\d]+|[^\w\s]")
    backend.pre_tokenizer = pre_tokenizers.Split(pieces, "removed", invert=True)
    backend.decoder = decoders.Sequence([decoders.Replace(">", " > "), decoders.Fuse()])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["[INST]", "[/INST]"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def new_model(family: str = "mistral", seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), attn_implementation="sdpa")
    return model.eval()


def new_contract(tokenizer, objective: str = "combined", style: str = "letters", **options) -> DecodingContract:
    contract = decoding_contract(tokenizer, objective, style, num_identifiers=MAX_CANDIDATES[style])
    return dataclasses.replace(contract, **{"window_size": 20, "stride": 10, **options})


def record_of(values: Sequence[int], style: str = "letters", record_id: str = "r", **options) -> Record:
    """Create a list whose passages have these values; the teacher ranks by value."""
    names = identifiers(len(values), style)
    best_first = sorted(range(len(values)), key=lambda i: -values[i])
    return Record(
        id=record_id,
        system="rank by worth",
        user=render_user_turn("heat flow", [f"wing w{value}" for value in values], style),
        response=" > ".join(f"[{names[i]}]" for i in best_first),
        grades=tuple(values),
        **options,
    )


Rule = Callable[[list[int]], Sequence[int]]


class KnownReranker(torch.nn.Module):
    """Ranks by a rule, by first token and by generation; accepts packed and cached calls like an HF model.

    Args:
        rule: values of a prompt's candidates → candidate indices, best first.
        opening: tokens before the first identifier.
        ending: token after the last identifier.
    """

    def __init__(
        self,
        rule: Rule = lambda values: sorted(range(len(values)), key=lambda i: -values[i]),
        opening: Sequence[str] = ("[",),
        ending: str = "</s>",
    ) -> None:
        super().__init__()
        self.rule, self.opening, self.ending = rule, list(opening), ending
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.device = torch.device("cpu")
        self.num_forwards = 0

    def forward(
        self, input_ids, logits_to_keep, use_cache, attention_mask=None, past_key_values=None, cu_seq_lens_q=None, **_
    ):
        self.num_forwards += 1
        if not use_cache:
            bounds = cu_seq_lens_q.tolist()
            rows = []
            for position in logits_to_keep.tolist():
                start = max(bound for bound in bounds if bound <= position)
                rows.append(self.next_token_logits(input_ids[0, start : position + 1].tolist()))
            return SimpleNamespace(logits=torch.stack(rows)[None])
        assert isinstance(past_key_values, DynamicCache)
        seen, _ = past_key_values.update(input_ids[:, None, :, None], input_ids[:, None, :, None], 0)
        rows = [
            self.next_token_logits(row[mask.bool()].tolist()) for row, mask in zip(seen[:, 0, :, 0], attention_mask)
        ]
        return SimpleNamespace(logits=torch.stack(rows)[:, None])

    def next_token_logits(self, tokens: list[int]) -> torch.Tensor:
        logits = torch.full((len(WORDS),), -20.0)
        logits[WORDS.index("wing")] = -15.0  # the next best token, if the expected one is not allowed
        words = [WORDS[token] for token in tokens]
        if "[/INST]" not in words:
            return logits
        end = len(words) - 1 - words[::-1].index("[/INST]")
        names, values = read_prompt(words[:end])
        order = self.rule(values)
        answer = list(self.opening)
        for place in order:
            answer += [*names[place], "]", ">", "["]
        answer[-2:] = [self.ending] * 2
        written = len(words) - end - 1
        expected = answer[min(written, len(answer) - 1)]
        logits[WORDS.index(expected)] = 10.0
        if expected in names:  # the remaining ones follow in order
            for lower, place in enumerate(order[order.index(names.index(expected)) :]):
                logits[WORDS.index(names[place])] = 10.0 - lower
        return logits


def read_prompt(words: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the identifiers and values of a prompt's passages."""
    names, values = [], []
    for i, word in enumerate(words):
        if word.startswith("w") and word[1:].isdigit():
            opening = max(k for k in range(i) if words[k] == "[")
            names.append("".join(words[opening + 1 : opening + words[opening:].index("]")]))
            values.append(int(word[1:]))
    return names, values
