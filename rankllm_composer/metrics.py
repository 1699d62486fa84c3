"""How good a ranking is: nDCG, reciprocal rank, Kendall's tau, and whether two systems differ. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
NUM_SIGNS_AT_ONCE = 1 << 22  # sign flips held in memory at a time by the permutation test


def _dcg(grades: Floats, k: int | None) -> float:
    gains = np.maximum(grades[:k], 0.0)
    return float((gains / np.log2(np.arange(2, len(gains) + 2))).sum())


def _grades(name: str, grades: Sequence[float], k: int | None) -> Floats:
    if k is not None and k < 1:
        raise ValueError(f"{name}: k is {k}, allowed is 1 or more, or None for the whole ranking")
    values = np.asarray(grades, dtype=np.float64)
    if values.ndim != 1 or np.isnan(values).any():
        raise ValueError(f"{name}: found grades {grades!r}, allowed is one number a candidate; use 0 for unjudged ones")
    return values


def ndcg(grades: Sequence[float], ideal_grades: Sequence[float] | None = None, k: int | None = 10) -> float:
    """Normalised discounted cumulative gain of a ranking.

        nDCG = DCG(grades) / DCG(ideal_grades, best first)
        DCG = sum over ranks r = 1 … k of max(grade_r, 0) / log2(r + 1)

    The gain is the grade itself, as in trec_eval's ndcg_cut and ir-measures' nDCG@k; the variant with 2^grade - 1 gives
    other figures on graded judgments.

    Args:
        grades: relevance grades in ranked order, best-ranked first; 0 for unjudged candidates.
        ideal_grades: all grades judged for the query, in any order, also of candidates the ranking lacks. None = the
            ranking's own, which makes the best order of these candidates 1.
        k: ranks that count. None = all.
    Returns:
        0 … 1; 0 where nothing relevant is judged.
    Raises:
        ValueError: k is below 1, or grades are not a list of numbers.
    Source:
        Järvelin and Kekäläinen 2002.
    """
    found = _grades("ndcg", grades, k)
    ideal = found if ideal_grades is None else _grades("ndcg", ideal_grades, k)
    best = _dcg(np.sort(ideal)[::-1], k)
    return _dcg(found, k) / best if best > 0 else 0.0


def reciprocal_rank(grades: Sequence[float], k: int | None = 10, min_grade: float = 1) -> float:
    """One over the rank of the first relevant candidate.

    Args:
        grades: relevance grades in ranked order, best-ranked first; 0 for unjudged candidates.
        k: ranks that count. None = all.
        min_grade: the lowest grade that is relevant.
    Returns:
        0 … 1; 0 where none of the first k is relevant.
    Raises:
        ValueError: k is below 1, or grades are not a list of numbers.
    """
    places = np.flatnonzero(_grades("reciprocal_rank", grades, k)[:k] >= min_grade)
    return 1.0 / (int(places[0]) + 1) if len(places) else 0.0


def kendall_tau(ranks: Sequence[float], other_ranks: Sequence[float]) -> float:
    """Kendall's tau-b between two rankings of the same candidates.

        tau = (concordant - discordant pairs) / sqrt(pairs untied in one * pairs untied in the other)

    Args:
        ranks: the rank of each candidate in one ranking.
        other_ranks: the rank of each candidate in the other, in the same order of candidates.
    Returns:
        -1 (reversed) … 1 (the same order); NaN where a ranking ties all its candidates, as a single one is.
    Raises:
        ValueError: the rankings are not of the same candidates.
    Source:
        Kendall 1945.
    """
    one, other = np.asarray(ranks, dtype=np.float64), np.asarray(other_ranks, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape:
        raise ValueError(
            f"kendall_tau: found ranks of shapes {one.shape} and {other.shape}, allowed is one rank a candidate in both"
        )
    signs = np.sign(one[:, None] - one[None, :])  # (N, N)
    other_signs = np.sign(other[:, None] - other[None, :])
    untied = np.abs(signs).sum() * np.abs(other_signs).sum()
    return float((signs * other_signs).sum() / np.sqrt(untied)) if untied else float("nan")


class Comparison(NamedTuple):
    """Two systems over the same queries. `difference` is the second's mean minus the first's."""

    first_mean: float
    second_mean: float
    difference: float
    wins: int
    ties: int
    losses: int
    p_value: float


def compare(
    first: Mapping[str, float],
    second: Mapping[str, float],
    *,
    num_permutations: int = 10_000,
    seed: int = 0,
    tie: float = 1e-6,
) -> Comparison:
    """Compare two systems query by query: "first stage → reranked".

    Args:
        first: metric of each query id under the first system.
        second: the same under the second.
        num_permutations: see `paired_permutation_test`.
        seed: see `paired_permutation_test`.
        tie: differences up to this size are neither a win nor a loss of the second.
    Returns:
        Means, the second's wins, ties and losses, and the p-value of the difference.
    Raises:
        ValueError: the systems were not measured on the same queries, or on none.
    """
    if first.keys() != second.keys() or not first:
        only = sorted(first.keys() ^ second.keys())
        raise ValueError(
            f"compare: found {len(first)} and {len(second)} queries, {len(only)} of them in one only {only[:3]}; "
            "allowed are the same queries in both, at least one. Give a query without results the value 0"
        )
    queries = sorted(first)
    one, two = np.array([first[query] for query in queries]), np.array([second[query] for query in queries])
    wins, losses = int((two - one > tie).sum()), int((one - two > tie).sum())
    return Comparison(
        float(one.mean()),
        float(two.mean()),
        float((two - one).mean()),
        wins,
        len(queries) - wins - losses,
        losses,
        paired_permutation_test(one, two, num_permutations=num_permutations, seed=seed),
    )


def paired_permutation_test(
    a: Sequence[float] | Floats, b: Sequence[float] | Floats, num_permutations: int = 10_000, seed: int = 0
) -> float:
    """Two-sided paired randomisation test of the difference of means.

    Under the null hypothesis the two values of a query are exchangeable, so each difference may have either sign. All
    2^n assignments of signs are counted where they are not more than `num_permutations`; else that many are drawn.

    Args:
        a: metric of each query under one system.
        b: the same queries under the other.
        num_permutations: assignments drawn, at most.
        seed: of the draw.
    Returns:
        The share of assignments whose mean differs from 0 at least as much as the observed one. Counted, it is in
        2/2^n … 1; drawn, (hits + 1) / (num_permutations + 1), which is never 0.
    Raises:
        ValueError: lengths differ, no queries, values that are not finite, or num_permutations below 1.
    Source:
        Fisher 1935; Smucker et al. 2007 for its use in retrieval.
    """
    one, other = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape or not one.size or not np.isfinite(one - other).all():
        raise ValueError(
            f"paired_permutation_test: found values of shapes {one.shape} and {other.shape}, "
            "allowed are finite ones, as many in both, at least one"
        )
    if num_permutations < 1:
        raise ValueError(f"paired_permutation_test: num_permutations is {num_permutations}, allowed is 1 or more")
    differences = one - other
    num = len(differences)
    # Sums that are equal but for rounding count as equal.
    observed = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
    is_exact = num < 63 and 2**num <= num_permutations
    total = 2**num if is_exact else num_permutations
    generator = np.random.default_rng(seed)
    hits, step = 0, max(1, NUM_SIGNS_AT_ONCE // num)
    for start in range(0, total, step):
        rows = min(step, total - start)
        if is_exact:
            flips = (np.arange(start, start + rows)[:, None] >> np.arange(num)) & 1
        else:
            flips = generator.integers(0, 2, (rows, num), dtype=np.int8)
        hits += int((np.abs((1.0 - 2.0 * flips) @ differences) >= observed).sum())
    return hits / total if is_exact else (hits + 1) / (total + 1)
