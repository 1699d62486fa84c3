"""`compare`: runs, or results of `rerank`, against the first of them, query by query."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankllm_composer.errors import RunError, counted
from rankllm_composer.ranking.comparison import (
    DEFAULT_MEASURES,
    MeasureComparison,
    compare,
    compare_runs,
    comparison_table,
    parse_measure,
    query_lines,
    read_rerank_result,
)
from rankllm_composer.screen import report
from rankllm_composer.sources.retrieval_files import load_judgments, load_run, require_shared
from rankllm_composer.storage.atomic import write_atomic

Named = tuple[str, Mapping[str, Any]]
"""A system: its name, and its ranking of each query or its values of each measure."""


@dataclass(frozen=True, slots=True)
class FileComparison:
    """A system B compared with the first one, A: their names, one comparison per measure, and what is left out."""

    first: str
    second: str
    comparisons: tuple[MeasureComparison, ...]
    notes: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """Yield the lines to print."""
        yield f"A = {self.first}, B = {self.second}: {counted(len(self.comparisons[0].reranked), 'query')}"
        yield from self.notes
        yield comparison_table(self.comparisons, ("A", "B"))
        yield ""
        yield from query_lines(self.comparisons[0])

    def fields(self) -> dict[str, Any]:
        """The comparison for JSON, see docs/commands.md."""
        measures = [row.fields() for row in self.comparisons]
        return {"first": self.first, "second": self.second, "measures": measures, "notes": list(self.notes)}


def compare_files(
    files: Sequence[str | Path],
    judgments: str | Path | None = None,
    *,
    measures: Sequence[str] | None = None,
    complete: bool = False,
    notes: Callable[[str], object] = report,
) -> list[FileComparison]:
    """Compare each system with the first.

    Args:
        files: runs in any layout, or all of them results of `rerank`, OUTPUT.figures.json, whose reranked runs count.
        judgments: of the runs; None for results, which hold their measures.
        measures: by their names in ir-measures or trec_eval; None: DEFAULT_MEASURES of runs, all of results.
        complete: of runs, as trec_eval's -c: every judged query counts, with 0 where a run lacks it.
        notes: called with a line for the user where a run's ranks differ from the order of its scores.
    Raises:
        RunError: fewer than two files, runs without judgments, results with other measures, or no common queries.
        SourceError: a file cannot be read as a run or as judgments.
    """
    if len(files) < 2:
        raise RunError(f"compare is given {counted(len(files), 'file')}; expected two or more. Name them.")
    names = [Path(file).name for file in files]
    names = names if len(set(names)) == len(names) else list(map(str, files))
    results = list(map(_is_result, files))
    if any(results) and (not all(results) or judgments is not None or complete):
        raise RunError(
            f"{names[results.index(True)]} holds the values of each query and no ranking; expected runs with --qrels, "
            "or nothing but such results, without --qrels and --complete. Name the reranked runs in their place."
        )
    if all(results):
        named = {name for measure in measures or () for name in map(str, parse_measure(measure))}
        values = [_values(name, file, named) for name, file in zip(names, files)]
        return [_of_results((names[0], values[0]), other) for other in zip(names[1:], values[1:])]
    if judgments is None:
        raise RunError(
            "compare is given runs without judgments; expected --qrels, or nothing but results of `rerank --qrels` "
            "(OUTPUT.figures.json). Name the judgments."
        )
    grades = load_judgments(judgments)
    runs = [load_run(file, notes=notes) for file in files]
    for name, run in zip(names, runs):
        require_shared("query", (Path(judgments).name, grades), (name, run))
    first = names[0], runs[0]
    measures = measures or DEFAULT_MEASURES
    return [_of_runs(first, other, grades, measures, complete) for other in zip(names[1:], runs[1:])]


def _of_runs(
    first: Named, second: Named, grades: Mapping[str, Mapping[str, int]], measures: Sequence[str], complete: bool
) -> FileComparison:
    one, other = ({qid: run[qid] for qid in grades if qid in run} for _, run in (first, second))
    notes = []
    for what, qids in (
        (f"only in {first[0]}", one.keys() - other.keys()),
        (f"only in {second[0]}", other.keys() - one.keys()),
        ("in neither run", grades.keys() - one.keys() - other.keys()),
    ):
        if qids:
            outcome = "counted as 0 where it is missing" if complete else "left out; --complete counts 0 for it"
            notes.append(f"{counted(len(qids), 'judged query')} {what}, such as {min(qids)}: {outcome}")
    if complete:
        one, other = ({qid: run.get(qid, ()) for qid in grades} for run in (one, other))
    rows = compare_runs(one, other, grades, measures)
    return FileComparison(first[0], second[0], tuple(rows), tuple(notes))


def _values(name: str, file: str | Path, named: Collection[str]) -> dict[str, dict[str, float]]:
    """The reranked values of a result by measure, of those that are named, or of all."""
    found = {row.measure: row.reranked for row in read_rerank_result(file).comparisons}
    missing = sorted(set(named) - found.keys())
    if missing:
        raise RunError(
            f"{name} lacks {', '.join(missing)}; it has {', '.join(found)}. Name one of these, or rerank again."
        )
    return {measure: values for measure, values in found.items() if not named or measure in named}


def _of_results(first: Named, second: Named) -> FileComparison:
    (name, one), (other_name, other) = first, second
    shared = [measure for measure in one if measure in other]
    if not shared:
        raise RunError(
            f"{name} has the measures {', '.join(one)}, and {other_name} {', '.join(other)}; expected one in both. "
            "Rerank with the same --measure."
        )
    rows, notes = [], []
    for measure in shared:
        qids = [qid for qid in one[measure] if qid in other[measure]]
        if not qids:
            raise RunError(f"{name} and {other_name} share no query. Compare results of the same queries.")
        values = [{qid: system[measure][qid] for qid in qids} for system in (one, other)]
        rows.append(MeasureComparison(measure, compare(*values), *values))
        if apart := one[measure].keys() ^ other[measure].keys():
            notes.append(f"{measure}: {counted(len(apart), 'query')} only in one of the two, left out")
    return FileComparison(name, other_name, tuple(rows), tuple(notes))


def write_queries(path: Path, comparisons: Sequence[FileComparison]) -> None:
    """Write the value of each query, by measure and system, as a table with a tab between columns.

    Systems have a column each; a value is empty where the query was not compared.
    """
    lines = ["\t".join(("measure", "query", comparisons[0].first, *(found.second for found in comparisons)))]
    for number, row in enumerate(comparisons[0].comparisons):
        rows = [found.comparisons[number] for found in comparisons]
        for qid in dict.fromkeys(qid for other in rows for qid in other.first_stage):
            known = next(other.first_stage[qid] for other in rows if qid in other.first_stage)
            values = [known, *(other.reranked.get(qid) for other in rows)]
            shown = ("" if value is None else f"{value:.6f}" for value in values)
            lines.append("\t".join((row.measure, qid, *shown)))
    write_atomic(path, "\n".join(lines) + "\n")


def _is_result(file: str | Path) -> bool:
    """Whether a file is a result of `rerank`, and not a run in JSON."""
    if not str(file).endswith(".json"):
        return False
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "measures" in content
