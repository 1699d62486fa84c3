"""Suggest changes to a recipe that needs more memory than a GPU has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from rankllm_composer.recipe.sections import Lora

if TYPE_CHECKING:
    from rankllm_composer.preflight.memory import Memory
    from rankllm_composer.recipe.sections import Recipe


class _Change(NamedTuple):
    """A change to a recipe, section → keys → values, or to the number of ranks."""

    description: str
    num_ranks: int
    sections: dict[str, dict[str, Any]]

    def apply(self, recipe: Recipe) -> Recipe:
        changed = {name: replace(getattr(recipe, name), **values) for name, values in self.sections.items()}
        return replace(recipe, **changed)


def suggest(
    recipe: Recipe,
    num_ranks: int,
    usable_bytes: int,
    plan_memory: Callable[[Recipe, int], Memory],
    report: Callable[[str], None],
) -> Iterator[tuple[str, Memory]]:
    """Find changes that make a recipe fit.

    Each key is tried alone, the cheapest first, and of each key the mildest change that suffices is kept. If none
    suffices, the strongest of each are combined, as few as possible in this order, until the run fits in the usable
    bytes of a rank. Yields what to set, and the memory that the run then needs.
    """

    def memory_with(changes: Sequence[_Change]) -> Memory:
        changed, ranks = recipe, num_ranks
        for change in changes:
            changed, ranks = change.apply(changed), change.num_ranks
        report(f"tries {' and '.join(change.description for change in changes)}")
        return plan_memory(changed, ranks)

    alternatives = list(_alternatives(recipe, num_ranks))
    is_found = False
    for *milder, strongest in alternatives:
        memory = memory_with([strongest])
        if memory.peak > usable_bytes:
            continue
        found = strongest, memory
        for change in milder:
            memory = memory_with([change])
            if memory.peak <= usable_bytes:
                found = change, memory
                break
        is_found = True
        yield found[0].description, found[1]
    if is_found:
        return
    combined = [changes[-1] for changes in alternatives]
    for number in range(2, len(combined) + 1):
        memory = memory_with(combined[:number])
        if memory.peak <= usable_bytes:
            yield " and ".join(change.description for change in combined[:number]), memory
            return


def _alternatives(recipe: Recipe, num_ranks: int) -> Iterator[list[_Change]]:
    """Yield the changes of each key, the mildest first; the cheapest keys first, and more ranks last."""

    def change(section: str, key: str, value: Any) -> _Change:
        return _Change(f"{section}.{key}={value}", num_ranks, {section: {key: value}})

    batch, longest_list = recipe.batch, recipe.data.max_length_tokens
    if recipe.model.activation_checkpointing < 1:
        yield [change("model", "activation_checkpointing", 1.0)]
    if recipe.model.keep_attention:
        yield [change("model", "keep_attention", False)]
    max_lists, tokens = batch.limits
    if max_lists is not None and max_lists > 1:
        yield [change("batch", "microbatch_lists", 1)]
    if tokens is not None and tokens > longest_list:
        smaller = {max(longest_list, tokens // 2), max(longest_list, tokens // 4), longest_list}
        yield [change("batch", "microbatch_tokens", number) for number in sorted(smaller, reverse=True)]
    if recipe.optimizer.name != "adamw_8bit" and not recipe.parallelism.fsdp:  # it cannot update sharded weights
        yield [change("optimizer", "name", "adamw_8bit")]
    if recipe.model.lora is None:
        yield [_lora(recipe, num_ranks)]
    if recipe.parallelism.fsdp:
        more = [ranks for ranks in (2 * num_ranks, 4 * num_ranks, 8 * num_ranks) if batch.global_lists % ranks == 0]
        if more:
            yield [_Change(f"{ranks} GPUs", ranks, {}) for ranks in more]


def _lora(recipe: Recipe, num_ranks: int) -> _Change:
    """Low-rank adapters; on one GPU, and with copies, beside frozen weights in bfloat16, which FSDP2 cannot shard."""
    if recipe.parallelism.precision == "fp32" or (recipe.parallelism.fsdp and num_ranks > 1):
        return _Change("model.lora.rank=16", num_ranks, {"model": {"lora": Lora()}})
    sections: dict[str, dict[str, Any]] = {"model": {"lora": Lora(frozen_precision="bf16")}}
    description = "model.lora.frozen_precision=bf16"
    if recipe.parallelism.fsdp:
        sections["parallelism"], description = {"fsdp": False}, f"{description} parallelism.fsdp=false"
    return _Change(description, num_ranks, sections)
