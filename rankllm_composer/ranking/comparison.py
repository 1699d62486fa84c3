"""Comparison of a reranked run with its first stage: measures, wins and losses per query, significance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rankllm_composer.errors import RunError, first_line
from rankllm_composer.ranking.metrics import Floats
from rankllm_composer.storage.atomic import write_atomic

TIE = 1e-6
FIGURES_SUFFIX = ".figures.json"
NUM_SIGNS_AT_ONCE = 1 << 22  # signs that the permutation test holds in memory at a time


class Comparison(NamedTuple):
    """Two systems over the same queries; wins and losses are the second's, `difference` its mean minus the first's."""

    first_mean: float
    second_mean: float
    difference: float
    wins: int
    ties: int
    losses: int
    p_value: float


def compare(first: Mapping[str, float], second: Mapping[str, float]) -> Comparison:
    """Compare two systems query by query, from their metric of each query id; differences up to `TIE` count as ties.

    Raises:
        ValueError: the systems were not measured on the same queries, or on none.
    """
    if first.keys() != second.keys() or not first:
        only = sorted(first.keys() ^ second.keys())
        raise ValueError(
            f"compare: the systems have {len(first)} and {len(second)} queries, of which {len(only)} are in one only "
            f"{only[:3]}; expected the same queries in both, at least one. Give a query without results the value 0."
        )
    queries = sorted(first)
    one, two = np.array([first[query] for query in queries]), np.array([second[query] for query in queries])
    wins, losses = int((two - one > TIE).sum()), int((one - two > TIE).sum())
    return Comparison(
        float(one.mean()),
        float(two.mean()),
        float((two - one).mean()),
        wins,
        len(queries) - wins - losses,
        losses,
        paired_permutation_test(one, two),
    )


def paired_permutation_test(
    a: Sequence[float] | Floats, b: Sequence[float] | Floats, num_permutations: int = 10_000, seed: int = 0
) -> float:
    """Two-sided paired randomization test of the difference of means.

    Under the null hypothesis the two values of a query are exchangeable, so each difference may have either sign. All
    2^n assignments of signs are enumerated if there are at most `num_permutations`; otherwise that many are drawn.

    Args:
        a, b: metric of the same queries under either system.
        num_permutations: maximum number of assignments.
        seed: seed of the draw.
    Returns:
        The share of assignments whose mean differs from 0 at least as much as the observed mean. Enumerated, it is in
        2/2^n … 1; drawn, (hits + 1) / (num_permutations + 1), which is never 0.
    Raises:
        ValueError: lengths differ, no queries, values that are not finite, or num_permutations below 1.
    Source:
        Fisher 1935; Smucker et al. 2007 for its use in retrieval.
    """
    from scipy.stats import permutation_test

    one, other = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape or not one.size or not np.isfinite(one - other).all():
        raise ValueError(
            f"paired_permutation_test: the values have shapes {one.shape} and {other.shape}; expected the same number "
            "of finite values in both, at least one."
        )
    if num_permutations < 1:
        raise ValueError(f"paired_permutation_test: num_permutations is {num_permutations}; expected 1 or more.")
    differences = one - other
    if len(differences) == 1:  # which SciPy refuses; either sign is as far from 0
        return 1.0
    sums = permutation_test(
        (differences,),
        lambda values, axis: np.abs(values.sum(axis=axis)),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=num_permutations,
        batch=max(1, NUM_SIGNS_AT_ONCE // len(differences)),
        random_state=np.random.default_rng(seed),
    ).null_distribution
    # SciPy's own count would split sums that differ only by rounding when they are close to 0.
    hits = int((sums >= abs(differences.sum()) - 1e-12 * np.abs(differences).sum()).sum())
    is_exact = 2 ** len(differences) <= num_permutations
    return hits / len(sums) if is_exact else (hits + 1) / (len(sums) + 1)


DEFAULT_MEASURES = ("nDCG@10", "RR@10")
JUDGED = "Judged"
"""The share of judged documents in ir-measures, which is no quality of a run."""

NUM_QUERIES_SHOWN = 5  # of those that gained most, and as many of those that lost most


@dataclass(frozen=True, slots=True)
class RerankResult:
    """Measures of a reranked run and its first stage on one set of queries; stored as `OUTPUT.figures.json`.

    Attributes:
        name: name of the set of queries and its first stage, such as dl20-bm25.
        model: folder of the model.
        decoding: first_token or generation.
        comparisons: one per measure.
    """

    name: str
    model: str
    decoding: str
    comparisons: tuple[MeasureComparison, ...]

    def figures(self) -> dict[str, float]:
        """Mean of each measure of quality after reranking, by the set's name and the measure's: dl20-bm25/nDCG@10."""
        rows = (row for row in self.comparisons if not row.measure.startswith(JUDGED))
        return {f"{self.name}/{row.measure}": row.comparison.second_mean for row in rows}

    def first_stage(self) -> dict[str, float]:
        """Mean of each measure before reranking, by the same names."""
        rows = (row for row in self.comparisons if not row.measure.startswith(JUDGED))
        return {f"{self.name}/{row.measure}": row.comparison.first_mean for row in rows}


class MeasureComparison(NamedTuple):
    """One measure of both runs: means and per-query values over the queries that are judged and reranked."""

    measure: str
    comparison: Comparison
    first_stage: dict[str, float]
    reranked: dict[str, float]

    def fields(self) -> dict[str, Any]:
        """The comparison for JSON, see docs/commands.md."""
        return {"measure": self.measure, "num_queries": len(self.reranked)} | self.comparison._asdict()


def compare_runs(
    first_stage: Mapping[str, Sequence[str]],
    reranked: Mapping[str, Sequence[str]],
    judgments: Mapping[str, Mapping[str, int]],
    measures: Sequence[str] = DEFAULT_MEASURES,
) -> list[MeasureComparison]:
    """Compare two runs, by each measure, over the judged queries that both contain.

    The share of judged documents in the top k is added beside each nDCG@k: where it is low, nDCG means little.

    Args:
        first_stage, reranked: document ids of each query, best first.
        judgments: relevance grade of each judged document, by query.
        measures: names of measures as in ir-measures or trec_eval.
    Raises:
        RunError: no query is judged and in both runs, or a measure cannot be computed with ir-measures.
    """
    parsed = _with_judged([measure for name in measures for measure in parse_measure(name)])
    qids = [qid for qid in reranked if qid in first_stage and qid in judgments]
    if not qids:
        raise RunError(
            f"judgments has grades for {len(judgments)} queries, but for none of the {len(reranked)} reranked queries. "
            "Use the judgments of these queries."
        )
    first, second = (
        _measure_run({qid: run[qid] for qid in qids}, judgments, parsed) for run in (first_stage, reranked)
    )
    return [
        MeasureComparison(name, compare(first[name], second[name]), first[name], second[name])
        for name in map(str, parsed)
    ]


def _with_judged(measures: Sequence[Any]) -> list[Any]:
    """The measures, each once, with the share of judged documents behind each nDCG."""
    import ir_measures

    found = []
    for measure in measures:
        found.append(measure)
        if measure.NAME == "nDCG" and "cutoff" in measure.params:
            found.append(ir_measures.Judged @ measure["cutoff"])
    return list(dict.fromkeys(found))


def parse_measure(name: str) -> list[Any]:
    """The measures that a name stands for: nDCG@10, ndcg@10 or trec_eval's ndcg_cut_10, ndcg_cut.5,10 or map."""
    import ir_measures

    try:
        try:
            found = list(ir_measures.parse_trec_measure(name))
        except (ValueError, KeyError):
            head = re.match(r"[A-Za-z]+", name)
            known = {known.lower(): known for known in ir_measures.measures.registry}
            exact = known.get(head[0].lower(), head[0]) + name[head.end() :] if head else name
            found = [ir_measures.parse_measure(exact)]
    except (NameError, ValueError, TypeError, SyntaxError) as error:
        raise RunError(
            f"measure is {name!r}; expected a name of ir-measures, such as nDCG@10, RR@10, AP or P@5, or of trec_eval "
            f"({first_line(error)}). Correct the name; give several one by one."
        ) from error
    for measure in found:
        cutoff = measure.params.get("cutoff", 1)
        if type(cutoff) is not int or cutoff < 1:  # trec_eval ends the process at 0
            raise RunError(
                f"measure is {name!r}, with the cutoff {cutoff}; expected a whole number from 1. Correct it."
            )
    return found


def _measure_run(
    run: Mapping[str, Sequence[str]], judgments: Mapping[str, Mapping[str, int]], measures: Sequence[Any]
) -> dict[str, dict[str, float]]:
    """Value of each query by measure; a query without documents has 0.

    Queries and documents are numbered for the providers of ir-measures, of which some read only numbers as ids.
    """
    import ir_measures

    qids = [qid for qid in run if run[qid]]
    grades, scores = {}, {}
    for number, qid in enumerate(qids, start=1):
        number_of: dict[str, str] = {}
        for docid in (*run[qid], *judgments[qid]):
            number_of.setdefault(docid, str(len(number_of) + 1))
        grades[str(number)] = {number_of[docid]: int(grade) for docid, grade in judgments[qid].items()}
        # Scores from the ranks, because trec_eval would reorder ties of the run's own scores by document id.
        scores[str(number)] = {number_of[docid]: -float(rank) for rank, docid in enumerate(run[qid])}
    values: dict[str, dict[str, float]] = {}
    for measure in measures:
        try:
            found = {found.query_id: found.value for found in ir_measures.iter_calc([measure], grades, scores)}
        except Exception as error:  # each provider raises its own; some are programs that fail
            raise RunError(
                f"measure is {str(measure)!r}, which ir-measures cannot compute on these judgments "
                f"({type(error).__name__}: {first_line(error)}). Correct its parameters, or use another measure."
            ) from error
        values[str(measure)] = dict.fromkeys(run, 0.0)
        values[str(measure)] |= {qids[int(number) - 1]: float(value) for number, value in found.items()}
    return values


def comparison_table(
    comparisons: Sequence[MeasureComparison], names: tuple[str, str] = ("first stage", "reranked")
) -> str:
    """Table "first stage → reranked" with one line per measure; `names` are those of the two systems."""
    return table_of([(row.measure, row.comparison) for row in comparisons], "measure", names)


def table_of(
    rows: Sequence[tuple[str, Comparison]], what: str, names: tuple[str, str] = ("first stage", "reranked")
) -> str:
    """Table of comparisons with one line each, which begins with a name of the kind `what`."""
    width = max(len(what), *(len(name) for name, _ in rows))
    left, right = max(len(names[0]), 6), max(len(names[1]), 6)
    lines = [f"{what:{width}}  {names[0]:>{left}} → {names[1]:<{right}}  difference  wins/ties/losses  p"]
    for name, result in rows:
        counts = f"{result.wins}/{result.ties}/{result.losses}"
        lines.append(
            f"{name:{width}}  {result.first_mean:{left}.4f} → {result.second_mean:<{right}.4f}  "
            f"{result.difference:+10.4f}  {counts:>16}  "
            f"{'< 0.001' if result.p_value < 0.001 else f'{result.p_value:.3f}'}"
        )
    return "\n".join(lines)


def query_lines(row: MeasureComparison, num: int = NUM_QUERIES_SHOWN) -> Iterator[str]:
    """Lines of the queries that changed most: up to `num` of the largest gains, then of the largest losses."""
    change = {qid: row.reranked[qid] - row.first_stage[qid] for qid in row.reranked}
    for what, sign in (("gained", 1), ("lost", -1)):
        changed = sorted((qid for qid in change if sign * change[qid] > 0), key=lambda qid: (-sign * change[qid], qid))
        for qid in changed[:num]:
            values = f"{row.first_stage[qid]:.4f} → {row.reranked[qid]:.4f}"
            yield f"{row.measure}  {what:<6}  {values}  {change[qid]:+.4f}  query {qid}"


def write_rerank_result(path: str | Path, result: RerankResult) -> None:
    """Write the result with its value for each query, for the report of the run that trained the model."""
    measures = {row.measure: {"first_stage": row.first_stage, "reranked": row.reranked} for row in result.comparisons}
    content = {"name": result.name, "model": result.model, "decoding": result.decoding, "measures": measures}
    write_atomic(Path(path), json.dumps(content, indent=1) + "\n")


def read_rerank_result(path: str | Path) -> RerankResult:
    """Read what `write_rerank_result` wrote; any other file raises RunError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = tuple(
            MeasureComparison(name, compare(row["first_stage"], row["reranked"]), row["first_stage"], row["reranked"])
            for name, row in content["measures"].items()
        )
        names = content["name"], content["model"], content["decoding"]
        if not rows or not all(isinstance(name, str) for name in names):
            raise ValueError("it has no measures, or names that are not text")
        return RerankResult(*names, rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{path} is not the result of a reranking ({error!r}); expected the .figures.json that `rankllm-composer "
            "rerank --qrels` writes beside its output. Rerank again."
        ) from error
