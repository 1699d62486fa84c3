"""What to change in a recipe that needs more memory than a card has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankllm_composer.preflight.memory import Memory
    from rankllm_composer.recipe.sections import Recipe


def remedies(
    recipe: Recipe,
    num_ranks: int,
    usable: int,
    measured: Callable[[Recipe, int], Memory],
    report: Callable[[str], None],
) -> Iterator[tuple[str, Memory]]:
    """Changes that make a recipe fit: each alone, the nearest first; if none does, one after the other until it fits.

    Args:
        recipe: needs more memory than there is.
        num_ranks: GPUs it was planned for.
        usable: bytes of a rank.
        measured: memory that a recipe takes on so many ranks.
        report: takes a line of progress.
    Yields:
        What to set, and the memory with it.
    """
    changes = list(_changes(recipe, num_ranks))
    alone = []
    for told, change, ranks in changes:
        report(f"tries {told}")
        memory = measured(change(recipe), ranks)
        if memory.peak <= usable:
            alone.append((told, memory))
    if alone:
        yield from alone
        return
    changed, ranks = recipe, num_ranks
    done: list[str] = []
    for told, change, wanted in changes:
        if wanted < ranks:
            continue
        done = [*done, told] if wanted == num_ranks else [*[text for text in done if "GPUs" not in text], told]
        changed, ranks = change(changed), wanted
        report(f"tries {', '.join(done)}")
        memory = measured(changed, ranks)
        if memory.peak <= usable:
            yield " and ".join(done), memory
            return


def _changes(recipe: Recipe, num_ranks: int) -> Iterator[tuple[str, Callable[[Recipe], Recipe], int]]:
    """(what to set, the recipe with it, number of ranks), the least costly first."""
    if recipe.model.activation_checkpointing < 1:
        yield (
            "model.activation_checkpointing=1.0",
            lambda r: replace(r, model=replace(r.model, activation_checkpointing=1.0)),
            num_ranks,
        )
    batch, least = recipe.batch, recipe.data.max_length_tokens
    if batch.microbatch_lists is not None and batch.microbatch_lists > 1:
        yield (
            "batch.microbatch_lists=1",
            lambda r: replace(r, batch=replace(r.batch, microbatch_lists=1)),
            num_ranks,
        )
    tokens = batch.microbatch_tokens or 0
    for fewer in sorted({max(least, tokens // 2), max(least, tokens // 4), least}, reverse=True):
        if batch.microbatch_tokens is not None and fewer < tokens:
            yield (
                f"batch.microbatch_tokens={fewer}",
                lambda r, fewer=fewer: replace(  # type: ignore[misc]
                    r, batch=replace(r.batch, microbatch_tokens=fewer)
                ),
                num_ranks,
            )
    if recipe.optimizer.name != "adamw_8bit":
        yield (
            "optimizer.name=adamw_8bit",
            lambda r: replace(r, optimizer=replace(r.optimizer, name="adamw_8bit")),
            num_ranks,
        )
    if recipe.parallelism.fsdp:
        for ranks in (2 * num_ranks, 4 * num_ranks, 8 * num_ranks):
            if recipe.batch.global_lists % ranks == 0:
                yield f"{ranks} GPUs", lambda r: r, ranks
