"""Published results, and the models that they are of."""

from __future__ import annotations

from collections.abc import Collection, Mapping

TOLERANCE = 0.025  # share of a published figure that a run may differ by
MEASURE = "nDCG@10"
_DATA = {"rryisthebest/rank_zephyr_training_data_alpha[train]", "castorini/rank_zephyr_training_data[train]"}
_FIGURES = {
    ("HuggingFaceH4/zephyr-7b-beta", "generation"): {
        "dl19-splade": 0.7781,
        "dl20-splade": 0.8147,
        "dl19-bm25": 0.7365,
        "dl20-bm25": 0.7080,
    },
    ("mistralai/Mistral-7B-Instruct-v0.3", "combined"): {
        "dl20-splade": 0.7851,
        "dl19-bm25": 0.7294,
        "dl20-bm25": 0.7043,
        "beir-11": 0.5564,
    },
    ("Qwen/Qwen3-0.6B", "combined"): {"dl19-splade": 0.7764, "dl20-splade": 0.7720, "dl21-splade": 0.7263},
}


def published_figures(
    base_model: str | None, data: Collection[str], objective: str, *, is_lora: bool = False
) -> Mapping[str, float]:
    """nDCG@10 published for a base model trained on published data, by set and measure (dl20-bm25/nDCG@10).

    The sets are TREC Deep Learning 2019, 2020 and 2021, the top 100 of SPLADE++ or of BM25 reranked, and the mean of 11
    sets of BEIR. The header of each recipe has the same figures.

    Args:
        base_model: hub id.
        data: sources of the training lists, as a set of shards names them.
        objective: what was trained.
        is_lora: whether adapters alone were trained.
    Returns:
        Empty for any other model or data: a figure of something else would be no comparison.
    """
    found = _FIGURES.get((base_model or "", objective), {})
    is_same = not is_lora and bool(data) and set(data) <= _DATA
    return {f"{name}/{MEASURE}": value for name, value in found.items()} if is_same else {}


def verdict(measured: float | None, published: float) -> str:
    """Compare a measured figure with a published one: within tolerance, below, above, or not measured."""
    if measured is None:
        return "not measured"
    if abs(measured - published) <= TOLERANCE * abs(published):
        return "within tolerance"
    return "below" if measured < published else "above"
