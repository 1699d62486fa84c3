"""Ranking metrics of one query: nDCG, reciprocal rank, Kendall's tau. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def _check_grades(name: str, grades: Sequence[float], k: int | None) -> Floats:
    if k is not None and k < 1:
        raise ValueError(f"{name}: k is {k}; expected 1 or more, or None for the entire ranking.")
    values = np.asarray(grades, dtype=np.float64)
    if values.ndim != 1 or np.isnan(values).any():
        raise ValueError(f"{name}: grades are {grades!r}; expected one number per candidate. Use 0 for unjudged ones.")
    return values


def _dcg(grades: Floats, k: int | None) -> float:
    gains = np.maximum(grades[:k], 0.0)
    return float((gains / np.log2(np.arange(2, len(gains) + 2))).sum())


def ndcg(grades: Sequence[float], ideal_grades: Sequence[float] | None = None, k: int | None = 10) -> float:
    """Normalized discounted cumulative gain of a ranking.

        nDCG = DCG(grades) / DCG(ideal_grades, best first)
        DCG = sum over ranks r = 1 … k of max(grade_r, 0) / log2(r + 1)

    The gain is the grade, as in trec_eval's ndcg_cut and ir-measures' nDCG@k; the variant with 2^grade - 1 differs on
    graded judgments.

    Args:
        grades: relevance grades in ranked order, best-ranked first; 0 for unjudged candidates.
        ideal_grades: all grades judged for the query, in any order, including candidates that the ranking lacks. None:
            the grades of the ranking, so that the best order of these candidates has nDCG 1.
        k: number of ranks counted; None for all.
    Returns:
        0 … 1; 0 if nothing relevant is judged.
    Raises:
        ValueError: k is below 1, or grades are not a list of numbers.
    Source:
        Järvelin and Kekäläinen 2002.
    """
    ranked = _check_grades("ndcg", grades, k)
    ideal = ranked if ideal_grades is None else _check_grades("ndcg", ideal_grades, k)
    best = _dcg(np.sort(ideal)[::-1], k)
    return _dcg(ranked, k) / best if best > 0 else 0.0


def reciprocal_rank(grades: Sequence[float], k: int | None = 10, min_grade: float = 1) -> float:
    """One over the rank of the first candidate with at least `min_grade`; 0 if there is none among the first k.

    See `ndcg` for the arguments and errors.
    """
    relevant = np.flatnonzero(_check_grades("reciprocal_rank", grades, k)[:k] >= min_grade)
    return 1.0 / (int(relevant[0]) + 1) if len(relevant) else 0.0


def kendall_tau(ranks: Sequence[float], other_ranks: Sequence[float]) -> float:
    """Kendall's tau-b between two rankings of the same candidates.

        tau = (concordant - discordant pairs) / sqrt(pairs untied in one * pairs untied in the other)

    Args:
        ranks, other_ranks: the rank of each candidate in either ranking, in the same order of candidates.
    Returns:
        -1 (reversed) … 1 (the same order); NaN if a ranking ties all its candidates or has fewer than two.
    Raises:
        ValueError: the rankings are not of the same candidates.
    Source:
        Kendall 1945.
    """
    one, other = np.asarray(ranks, dtype=np.float64), np.asarray(other_ranks, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape:
        raise ValueError(
            f"kendall_tau: ranks have shapes {one.shape} and {other.shape}; expected one rank per candidate in both."
        )
    signs = np.sign(one[:, None] - one[None, :])  # (N, N)
    other_signs = np.sign(other[:, None] - other[None, :])
    untied = np.abs(signs).sum() * np.abs(other_signs).sum()
    return float((signs * other_signs).sum() / np.sqrt(untied)) if untied else float("nan")


def chance_ndcg(grades: Sequence[float], k: int = 10) -> float:
    """Expected nDCG@k of a random order of the candidates; 0 if nothing is relevant."""
    gains = np.maximum(np.asarray(grades, dtype=np.float64), 0.0)
    discounts = 1.0 / np.log2(np.arange(2, min(k, len(gains)) + 2))
    best = float((np.sort(gains)[::-1][:k] * discounts).sum())
    return float(gains.mean() * discounts.sum()) / best if best > 0 else 0.0
