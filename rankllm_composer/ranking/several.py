"""Rerank several test collections with one model: one table, and the mean over them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rankllm_composer.errors import RunError
from rankllm_composer.options import IRDS, RerankOptions
from rankllm_composer.ranking.comparison import DEFAULT_MEASURES, Comparison, table_of
from rankllm_composer.ranking.rerank import RerankFiles, RerankReport, progress_file, rerank_files
from rankllm_composer.ranking.reranker import Reranker
from rankllm_composer.screen import doing, report
from rankllm_composer.sources.retrieval_files import Duplicates

BEIR_SPLITS = {
    "arguana": "",
    "climate-fever": "",
    "cqadupstack": "",
    "dbpedia-entity": "test",
    "fever": "test",
    "fiqa": "test",
    "hotpotqa": "test",
    "msmarco": "test",
    "nfcorpus": "test",
    "nq": "",
    "quora": "test",
    "scidocs": "",
    "scifact": "test",
    "trec-covid": "",
    "webis-touche2020": "v2",
}
"""Set of BEIR → the part of its ir_datasets id behind beir/SET/."""


@dataclass(frozen=True, slots=True)
class Collection:
    """A test collection: its name, the source of queries, documents and judgments, and its first-stage run."""

    name: str
    source: str
    run: str | Path


@dataclass(frozen=True, slots=True)
class SeveralReport:
    """What reranking several collections found: one report each, in order."""

    reports: tuple[RerankReport, ...]

    def means(self) -> dict[str, tuple[float, float]]:
        """Mean of each measure over the collections: first stage, reranked."""
        found: dict[str, list[Comparison]] = {}
        for one in self.reports:
            for row in one.comparisons:
                found.setdefault(row.measure, []).append(row.comparison)
        return {
            measure: (sum(row.first_mean for row in rows) / len(rows), sum(row.second_mean for row in rows) / len(rows))
            for measure, rows in found.items()
        }

    def lines(self) -> Iterator[str]:
        """Yield one table per measure, with a line per collection and the mean."""
        results = [one.result for one in self.reports if one.result is not None]
        for number, (measure, (first, second)) in enumerate(self.means().items()):
            rows = [(result.name, result.comparisons[number].comparison) for result in results]
            yield ""
            yield table_of(rows, measure)
            width = max(len(measure), *(len(result.name) for result in results))
            yield f"{'mean':{width}}  {first:11.4f} → {second:<8.4f}  {second - first:+10.4f}"

    def fields(self) -> dict[str, Any]:
        """The reports for JSON, see docs/commands.md."""
        means = {measure: {"first_stage": one, "reranked": two} for measure, (one, two) in self.means().items()}
        return {"collections": [one.fields() for one in self.reports], "means": means}


def collections_of(names: Sequence[str], runs: str | Path | None) -> list[Collection]:
    """Find each test collection and its first-stage run.

    Args:
        names: sets of BEIR, folders in BEIR's layout or irds:ID.
        runs: a folder with one run per collection, in whose file name the collection's stands, such as those of
            Anserini (run.beir-v1.0.0-scifact.bm25.txt); or a path with {} for the name; None for the run that irds:ID
            itself has.
    Raises:
        RunError: a name is unknown, or there is no run for it, or several.
    """
    if not names or len(set(names)) < len(names):
        raise RunError(f"beir is {','.join(names)!r}; expected different test collections. Name each once.")
    found = []
    for given in names:
        name, source = _source(given)
        if runs is None and not given.startswith(IRDS):
            raise RunError(
                f"run is missing, and {given} has no first-stage run of its own; expected a folder with a run per test "
                "collection, or a path with {} for its name. Name it with --run."
            )
        found.append(Collection(name, source, source if runs is None else _run_of(name, runs)))
    return found


def _source(given: str) -> tuple[str, str]:
    """Name and source of a collection."""
    if given.startswith(IRDS):
        return given.removeprefix(IRDS).replace("/", "-"), given
    if Path(given).is_dir():
        return Path(given).resolve().name, given
    name, _, part = given.partition("/")
    if name not in BEIR_SPLITS or (part and name != "cqadupstack") or (name == "cqadupstack" and not part):
        known = [other if other != "cqadupstack" else "cqadupstack/FORUM" for other in BEIR_SPLITS]
        near = get_close_matches(given.lower(), known, 1)
        raise RunError(
            f"beir is {given!r}; expected one of {', '.join(known)}, a folder in BEIR's layout, or irds:ID. "
            + (f"Did you mean {near[0]}?" if near else "Correct it.")
        )
    source = "/".join(filter(None, (f"{IRDS}beir", given, BEIR_SPLITS[name])))
    return given.replace("/", "-"), source


def _run_of(name: str, runs: str | Path) -> Path:
    if "{}" in str(runs):
        return Path(str(runs).replace("{}", name))
    folder = Path(runs)
    if not folder.is_dir():
        raise RunError(
            f"run is {folder}, which is no folder; expected one with a first-stage run per test collection, or a path "
            "with {} for its name. Correct it."
        )
    longer = [other for other in BEIR_SPLITS if name in other and other != name]
    word = re.compile(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", re.IGNORECASE)
    files = sorted(path for path in folder.iterdir() if path.is_file() and word.search(path.name))
    files = [path for path in files if not any(other in path.name for other in longer)]
    if len(files) != 1:
        found = f"holds {len(files)} files with {name} in their names"
        shown = f" ({', '.join(path.name for path in files[:3])})" if files else ""
        raise RunError(f"run is {folder}, which {found}{shown}; expected one. Give a path with {{}} for the name.")
    return files[0]


def rerank_several(
    model: str | Path,
    collections: Sequence[Collection],
    output: str | Path,
    options: RerankOptions | None = None,
    *,
    measures: Sequence[str] = DEFAULT_MEASURES,
    duplicates: Duplicates = "stop",
    say: Callable[[str], object] = report,
) -> SeveralReport:
    """Rerank the first-stage run of each collection, and measure it.

    What is finished is kept until all collections are, so that a stopped job resumes with the same settings.

    Args:
        model: as in `Reranker.from_pretrained`; loaded once.
        collections: see `collections_of`.
        output: folder of the reranked runs, NAME.trec, each with its figures beside it.
        options: how to rerank; None for the defaults.
        measures: names of measures as in ir-measures or trec_eval.
        duplicates: see `RerankFiles`.
        say: called with the report of each collection when it is done.
    Raises:
        ValueError: a file, the model or an option cannot be used.
    """
    folder = Path(output)
    missing = [str(one.run) for one in collections if not str(one.run).startswith(IRDS) and not Path(one.run).exists()]
    if missing:
        raise RunError(f"run is {missing[0]}, which does not exist; expected a first-stage run. Correct the path.")
    folder.mkdir(parents=True, exist_ok=True)
    with doing(f"loading the model {model}"):
        reranker = Reranker.from_pretrained(model, options)
    reports = []
    for one in collections:
        files = RerankFiles(
            first_stage=one.run,
            output=folder / f"{one.name}.trec",
            queries=one.source,
            documents=one.source,
            judgments=one.source,
            duplicates=duplicates,
        )
        how: dict[str, Any] = {"name": one.name, "reranker": reranker, "keep_progress": True}
        found = rerank_files(model, files, options, measures=measures, **how)
        say(found.text)
        reports.append(found)
    for found in reports:
        progress_file(Path(found.output)).unlink(missing_ok=True)
    return SeveralReport(tuple(reports))
