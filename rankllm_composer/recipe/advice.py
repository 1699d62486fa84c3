"""Advice on a recipe from what its training lists are like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankllm_composer.recipe.sections import Recipe

FEW_PAIRS = 1000
"""Sets with fewer pairs of candidates say nothing."""

_MANY_TIES = 0.3
_GOOD_ORDER = 0.8


def data_advice(recipe: Recipe, pairs: Mapping[str, int]) -> Iterator[str]:
    """Yield a sentence about each key that does not suit the training lists.

    Args:
        recipe: the recipe.
        pairs: pairs of candidates of the lists as `prompts.relevance.count_pairs` counts them.
    """
    split = recipe.data.train
    total, tied = sum(pairs.values()), pairs.get("tied", 0)
    if total < FEW_PAIRS:
        return
    if recipe.objective.ties == "ordered" and tied >= _MANY_TIES * total:
        yield (
            f"{tied / total:.0%} of the pairs of candidates in data.train are tied by grades or scores; "
            "objective.ties=ordered trains them in the order of the first stage. Set objective.ties=tied."
        )
    ordered = total - tied
    if not split.shuffle_passages and pairs.get("as_presented", 0) >= _GOOD_ORDER * ordered > 0:
        yield (
            f"data.train presents {pairs['as_presented'] / ordered:.0%} of the pairs that are not tied with the better "
            "candidate first, an order that a model can copy without reading. Set data.train.shuffle_passages=true."
        )
