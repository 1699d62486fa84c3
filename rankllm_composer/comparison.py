"""A reranked run beside the first stage: measures of ir-measures, wins and losses query by query, significance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rankllm_composer.metrics import Comparison, compare

DEFAULT_MEASURES = ("nDCG@10", "RR@10")


class ComparisonError(ValueError):
    """Runs that cannot be measured as asked."""


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
        ComparisonError: no query is judged and in both runs, or ir-measures does not know a measure.
    """
    import ir_measures

    parsed = []
    for name in measures:
        try:
            parsed.append(ir_measures.parse_measure(name))
        except (NameError, ValueError, TypeError, SyntaxError) as error:
            raise ComparisonError(
                f"measure: found {name!r}, allowed are names of ir-measures, such as nDCG@10, RR@10, AP, P@5: {error}"
            ) from error
    qids = [qid for qid in reranked if qid in first_stage and qid in judgments]
    if not qids:
        raise ComparisonError(
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


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
