"""A reranked run beside the first stage: measures of ir-measures, wins and losses query by query, significance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rankllm_composer.errors import RunError
from rankllm_composer.ranking.evaluation import Floats
from rankllm_composer.storage.atomic import write_atomic

NUM_SIGNS_AT_ONCE = 1 << 22  # sign flips held in memory at a time by the permutation test


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


DEFAULT_MEASURES = ("nDCG@10", "RR@10")


QUERIES_TOLD = 5  # of the most that were won, and as many of those lost


@dataclass(frozen=True, slots=True)
class MeasuredSet:
    """What a reranking was measured to be worth on one set of queries; `OUTPUT.figures.json`.

    Attributes:
        name: of the set: queries and first stage, such as dl20-bm25.
        model: folder of the model.
        decoding: first_token or generation.
        comparisons: one a measure.
    """

    name: str
    model: str
    decoding: str
    comparisons: tuple[MeasureComparison, ...]

    def figures(self) -> dict[str, float]:
        """Mean of each measure after reranking, by the set's name and the measure's: dl20-bm25/nDCG@10."""
        return {f"{self.name}/{row.measure}": row.comparison.second_mean for row in self.comparisons}


class MeasureComparison(NamedTuple):
    """One measure of both runs: means and per-query values over the queries that are judged and reranked."""

    measure: str
    comparison: Comparison
    first_stage: dict[str, float]
    reranked: dict[str, float]


def compare_runs(
    first_stage: Mapping[str, Sequence[str]],
    reranked: Mapping[str, Sequence[str]],
    judgments: Mapping[str, Mapping[str, int]],
    measures: Sequence[str] = DEFAULT_MEASURES,
) -> list[MeasureComparison]:
    """Measure two runs over the queries that both hold and that are judged.

    Args:
        first_stage, reranked: document ids of each query, best first.
        judgments: relevance grade of each judged document, by query.
        measures: by ir-measures' names.
    Returns:
        One comparison a measure.
    Raises:
        RunError: no query is judged and in both runs, or ir-measures does not know a measure.
    """
    import ir_measures

    parsed = []
    for name in measures:
        try:
            parsed.append(ir_measures.parse_measure(name))
        except (NameError, ValueError, TypeError, SyntaxError) as error:
            raise RunError(
                f"measure: found {name!r}, allowed are names of ir-measures, such as nDCG@10, RR@10, AP, P@5: {error}"
            ) from error
    qids = [qid for qid in reranked if qid in first_stage and qid in judgments]
    if not qids:
        raise RunError(
            f"judgments: found grades for {len(judgments)} queries, none of them among the {len(reranked)} reranked; "
            "give the judgments of these queries"
        )
    values: list[dict[str, dict[str, float]]] = []
    for run in (first_stage, reranked):
        # By place, not by the run's own scores: ties would be ordered anew by document id.
        scores = {qid: {docid: -float(place) for place, docid in enumerate(run[qid])} for qid in qids}
        grades = {qid: dict(judgments[qid]) for qid in qids}
        found: dict[str, dict[str, float]] = {str(measure): {} for measure in parsed}
        for metric in ir_measures.iter_calc(parsed, grades, scores):
            found[str(metric.measure)][metric.query_id] = metric.value
        values.append(found)
    return [
        MeasureComparison(name, compare(values[0][name], values[1][name]), values[0][name], values[1][name])
        for name in map(str, parsed)
    ]


def comparison_table(comparisons: Sequence[MeasureComparison]) -> str:
    """Lines "first stage → reranked", one a measure."""
    width = max(len("measure"), *(len(row.measure) for row in comparisons))
    lines = [f"{'measure':{width}}  first stage → reranked  difference  wins/ties/losses  p"]
    for name, result, *_ in comparisons:
        counts = f"{result.wins}/{result.ties}/{result.losses}"
        lines.append(
            f"{name:{width}}  {result.first_mean:11.4f} → {result.second_mean:<8.4f}  {result.difference:+10.4f}  "
            f"{counts:>16}  {_p_text(result.p_value)}"
        )
    return "\n".join(lines)


def query_lines(row: MeasureComparison, num: int = QUERIES_TOLD) -> Iterator[str]:
    """Lines of the queries that changed most, the largest gains first, then the largest losses.

    Args:
        row: one measure of both runs.
        num: queries of each kind, at most.
    """
    change = {qid: row.reranked[qid] - row.first_stage[qid] for qid in row.reranked}
    for what, sign in (("gained", 1), ("lost", -1)):
        most = sorted((qid for qid in change if sign * change[qid] > 0), key=lambda qid: (-sign * change[qid], qid))
        for qid in most[:num]:
            places = f"{row.first_stage[qid]:.4f} → {row.reranked[qid]:.4f}"
            yield f"{row.measure}  {what:<6}  {places}  {change[qid]:+.4f}  query {qid}"


def write_measured(path: str | Path, measured: MeasuredSet) -> None:
    """Keep what was measured, query by query, for the report of the run that the model is from."""
    rows = {row.measure: {"first_stage": row.first_stage, "reranked": row.reranked} for row in measured.comparisons}
    told = {"name": measured.name, "model": measured.model, "decoding": measured.decoding, "measures": rows}
    write_atomic(Path(path), json.dumps(told, indent=1) + "\n")


def read_measured(path: str | Path) -> MeasuredSet:
    """What `write_measured` kept.

    Raises:
        RunError: the file is none of these.
    """
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = tuple(
            MeasureComparison(name, compare(row["first_stage"], row["reranked"]), row["first_stage"], row["reranked"])
            for name, row in told["measures"].items()
        )
        return MeasuredSet(told["name"], told["model"], told["decoding"], rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path}: found no figures of a reranking ({error!r}), allowed is the .figures.json that `rankllm-composer "
            "rerank --qrels` writes beside its output; rerank again"
        ) from error


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
