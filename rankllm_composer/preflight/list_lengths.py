"""Measure the lists of `data.train`: how many there are, and how many tokens they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

from rankllm_composer.errors import ModelError, RunError
from rankllm_composer.preflight.hub import is_cached, require_hub

if TYPE_CHECKING:
    from rankllm_composer.recipe.sections import Recipe

DEFAULT_NUM_TARGETS = 81
"""Response tokens assumed if no list can be read: 20 identifiers with brackets and '>', and the end of the response."""


@dataclass(frozen=True)
class ListLengths:
    """Tokens and response tokens of each list of a sample (none if no list can be read), and lists in the split.

    `pairs` counts the pairs of candidates of the sample, see `count_pairs`.
    """

    tokens: tuple[int, ...]
    num_targets: tuple[int, ...]
    num_lists: int | None
    description: str
    pairs: Mapping[str, int] = field(default_factory=Counter)

    def pairs_to_train(self, max_length: int) -> list[tuple[int, int]]:
        """(tokens, response tokens) of each list that is not too long, or of one list of the maximum length."""
        known = [pair for pair in zip(self.tokens, self.num_targets) if pair[0] <= max_length]
        return known or [(max_length, min(DEFAULT_NUM_TARGETS, max_length // 2))]


def measure_lists(recipe: Recipe, num_lists: int | None = None, sample: int = 500) -> ListLengths:
    """Tokenize about `sample` evenly spaced lists of `data.train`, if its records and tokenizer are on this machine.

    If its records are not, the split has `num_lists`, or `data.expected_lists`.
    """
    from rankllm_composer.model.loading import load_tokenizer
    from rankllm_composer.prompts.chat import control_tokens_in
    from rankllm_composer.prompts.encoding import encode_record
    from rankllm_composer.prompts.relevance import count_pairs
    from rankllm_composer.shards.read import find_split

    split = recipe.data.train
    sets = [(s.local, s.remote) for s in split.streams] or [(str(split.local), split.remote)]
    assumed = f"each is assumed to have {recipe.data.max_length_tokens:,} tokens, the limit"
    records = find_split(sets, split.source, split.rebuild, recipe.data.client_version)
    if records is None:
        expected = recipe.data.expected_lists
        given = "unknown number" if expected is None else f"{expected:,} (data.expected_lists)"
        given = given if num_lists is None else f"{num_lists:,} (given)"
        return ListLengths((), (), num_lists or expected, f"{given}; no data here, so {assumed}")
    count = len(records)
    if any(stream.proportion is not None for stream in split.streams):
        count = sum(round((stream.proportion or 0) * count) for stream in split.streams)
    template = recipe.data.prompt_template
    sampled = [replace(record, template=template) for record in islice(records, 0, None, max(1, count // sample))]
    pairs = sum(map(count_pairs, sampled), Counter())
    try:
        if not is_cached(recipe.tokenizer, "tokenizer_config.json"):
            require_hub("model.tokenizer", recipe.tokenizer)
        tokenizer = load_tokenizer(recipe.model)
    except (ModelError, RunError):
        return ListLengths((), (), count, f"{count:,} in {records.place}; no tokenizer here, so {assumed}", pairs)
    num_control = sum(bool(control_tokens_in(record.user, tokenizer)) for record in sampled)
    control = f", of which {num_control:,} contain control tokens of the tokenizer" if num_control else ""
    encoded = [encode_record(record, tokenizer, recipe.objective.name) for record in sampled]
    return ListLengths(
        tuple(len(item.input_ids) for item in encoded),
        tuple(max(1, len(item.input_ids) - item.response_start) for item in encoded),
        count,
        f"{count:,} in {records.place}; lengths of {len(encoded):,} of them{control}",
        pairs,
    )
