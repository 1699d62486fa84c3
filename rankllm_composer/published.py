"""Published figures that a full run of a recipe is held against."""

from __future__ import annotations

from collections.abc import Mapping

TOLERANCE = 0.025  # share of a published figure that a run may differ by
MEASURE = "nDCG@10"

_RANK_ZEPHYR = {"dl19-splade": 0.7781, "dl20-splade": 0.8147, "dl19-bm25": 0.7365, "dl20-bm25": 0.7080}
_FIRST_MISTRAL = {"dl20-splade": 0.7851, "dl19-bm25": 0.7294, "dl20-bm25": 0.7043, "beir-11": 0.5564}
_BY_RECIPE = {"rank_zephyr": _RANK_ZEPHYR, "rank_zephyr_stage2": _RANK_ZEPHYR, "first_mistral": _FIRST_MISTRAL}
SETS = tuple(dict.fromkeys(name for sets in _BY_RECIPE.values() for name in sets))


def published_figures(run_name: str) -> Mapping[str, float]:
    """nDCG@10 published for a recipe, by set and measure: dl20-bm25/nDCG@10.

    The sets are TREC Deep Learning 2019 and 2020, the top 100 of SPLADE++ or of BM25 reranked, and the mean of 11
    sets of BEIR.

    Args:
        run_name: `run.name` of the recipe, which a copy made to try something else changes.
    Returns:
        Empty where nothing is published for it.
    Source:
        Published for RankZephyr and FirstMistral; the header of each recipe has the same.
    """
    return {f"{name}/{MEASURE}": value for name, value in _BY_RECIPE.get(run_name, {}).items()}
