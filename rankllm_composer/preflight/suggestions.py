"""Suggest changes to a recipe that needs more memory than a GPU has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rankllm_composer.preflight.memory import Memory
    from rankllm_composer.recipe.sections import Recipe


class _Change(NamedTuple):
    """A change to a recipe or to the number of ranks; `section` and `value` are None if the recipe stays."""

    description: str
    num_ranks: int
    section: str | None = None
    value: dict[str, Any] | None = None

    def apply(self, recipe: Recipe) -> Recipe:
        if self.section is None:
            return recipe
        return replace(recipe, **{self.section: replace(getattr(recipe, self.section), **(self.value or {}))})


def suggest(
    recipe: Recipe,
    num_ranks: int,
    usable_bytes: int,
    plan_memory: Callable[[Recipe, int], Memory],
    report: Callable[[str], None],
) -> Iterator[tuple[str, Memory]]:
    """Find changes that make a recipe fit.

    Each change is tried alone, the cheapest first. If none suffices, they are combined one by one until the run fits in
    the usable bytes of a rank. Yields what to set, and the memory that the run then needs.
    """
    changes = list(_changes(recipe, num_ranks))
    sufficient = []
    for change in changes:
        report(f"tries {change.description}")
        memory = plan_memory(change.apply(recipe), change.num_ranks)
        if memory.peak <= usable_bytes:
            sufficient.append((change.description, memory))
    if sufficient:
        yield from sufficient
        return
    changed = recipe
    combined: dict[str, str] = {}  # key, or GPUs → description
    for change in changes:
        changed = change.apply(changed)
        combined[change.description.partition("=")[0] if change.section else "GPUs"] = change.description
        report(f"tries {', '.join(combined.values())}")
        memory = plan_memory(changed, change.num_ranks)
        if memory.peak <= usable_bytes:
            yield " and ".join(combined.values()), memory
            return


def _changes(recipe: Recipe, num_ranks: int) -> Iterator[_Change]:
    """Yield single changes, the cheapest first; more ranks come last."""

    def change(section: str, key: str, value: Any) -> _Change:
        return _Change(f"{section}.{key}={value}", num_ranks, section, {key: value})

    batch, longest_list = recipe.batch, recipe.data.max_length_tokens
    if recipe.model.activation_checkpointing < 1:
        yield change("model", "activation_checkpointing", 1.0)
    if recipe.model.keep_attention:
        yield change("model", "keep_attention", False)
    max_lists, tokens = batch.limits
    if max_lists is not None and max_lists > 1:
        yield change("batch", "microbatch_lists", 1)
    if tokens is not None:
        smaller = {max(longest_list, tokens // 2), max(longest_list, tokens // 4), longest_list}
        for num_tokens in sorted(smaller, reverse=True):
            if num_tokens < tokens:
                yield change("batch", "microbatch_tokens", num_tokens)
    if recipe.optimizer.name != "adamw_8bit" and not recipe.parallelism.fsdp:  # it cannot update sharded weights
        yield change("optimizer", "name", "adamw_8bit")
    if recipe.parallelism.fsdp:
        for ranks in (2 * num_ranks, 4 * num_ranks, 8 * num_ranks):
            if recipe.batch.global_lists % ranks == 0:
                yield _Change(f"{ranks} GPUs", ranks)
