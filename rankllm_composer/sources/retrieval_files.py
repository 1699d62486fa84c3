"""Queries, documents, runs, orders of teachers and judgments, for building and for reranking alike.

Each is named by

- a file in any layout of docs/what-it-reads.md, recognized by its content, compressed with gzip, zstd or not at all;
- a folder in BEIR's layout: queries.jsonl, corpus.jsonl, qrels/test.tsv;
- `irds:ID`, a dataset of the package ir_datasets, if that is installed.

Every function raises a SourceError that names file and line if a file cannot be read or is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rankllm_composer.errors import SourceError, counted, first_line
from rankllm_composer.options import IRDS
from rankllm_composer.screen import report
from rankllm_composer.sources.entries import Document, Judgment, Query, RunLine, document_of, query_of, run_line
from rankllm_composer.sources.files import Row, read_rows
from rankllm_composer.sources.layouts import PARTS, Layout, Part, layout_of, layouts_of

Duplicates = Literal["stop", "first"]
BEIR_FILES: dict[Part, str] = {"queries": "queries.jsonl", "docs": "corpus.jsonl", "judgments": "qrels/test.tsv"}
"""Files of a folder in BEIR's layout."""


def read_part(source: str | Path, part: Part) -> Iterator[Any]:
    """The entries of one part of a source, in its order: Query, Document, RunLine, Permutation or Judgment."""
    if str(source).startswith(IRDS):
        yield from _read_ir_dataset(str(source), part)
        return
    layout: Layout | None = None
    for row in read_rows(file_of(source, part)):
        layout = layout or layout_of(row, part)
        yield from layout.readers[part](row)
    if layout is None:
        raise SourceError(f"{source}: the file is empty; expected {PARTS[part]}. Fetch or write it again.")


def file_of(source: str | Path, part: Part) -> Path:
    """The file that holds a part: the source itself, or a file of a folder in BEIR's layout."""
    path = Path(source)
    if not path.is_dir():
        return path
    name = BEIR_FILES.get(part)
    for ending in ("", ".gz", ".zst"):
        if name is not None and (path / f"{name}{ending}").is_file():
            return path / f"{name}{ending}"
    expected = f"the file {name} of BEIR's layout" if name else "a file"
    raise SourceError(
        f"{path}: the folder holds no {PARTS[part].removeprefix('a ')}; expected {expected}. Name a file."
    )


def source_of(part: Part, given: str | Path | None, run: str | Path) -> str | Path:
    """The source of queries or documents: the one that is given, else the run, if its layout holds them."""
    if given is not None or str(run).startswith(IRDS):
        return run if given is None else given
    row = next(read_rows(run), None)
    if row is not None and not any(part in layout.readers for layout in layouts_of(row.value)):
        found = f"{part} is not given, and {Path(run).name} holds no {PARTS[part]}"
        raise SourceError(f"{found}; expected a file, a BEIR folder or irds:ID. Name it in {part} (--{part}).")
    return run


class Ranking(NamedTuple):
    """The candidates of a query with their scores, in the order of these.

    `disagreement` says how the rank column differs from it: "scores", or "ties" if only among equal scores, or "".
    """

    scores: dict[str, float]
    disagreement: Literal["", "ties", "scores"]

    @property
    def docids(self) -> list[str]:
        return list(self.scores)


def rank_candidates(lines: Iterable[RunLine], name: str, duplicates: Duplicates = "stop") -> Ranking:
    """Order the candidates of one query as trec_eval does: by score, and equal scores by document id, both descending.

    Args:
        lines: the query's lines of a run.
        name: of the run.
        duplicates: at a document that is repeated, raise, or keep the one with the highest score.
    Raises:
        SourceError: a document is repeated.
    """
    ordered = sorted(lines, key=lambda line: (line.score, line.docid), reverse=True)
    first: dict[str, RunLine] = {}
    for line in ordered:
        other = first.setdefault(line.docid, line)
        if other is not line and duplicates == "stop":
            here, there = max(line.line, other.line), min(line.line, other.line)
            raise SourceError(
                f"{name}:line {here}: document {line.docid!r} is repeated for query {line.qid!r}, also in line "
                f"{there}. Remove one, or set duplicates to first to keep the one with the highest score."
            )
    ranks = [(line.score, line.rank) for line in first.values() if line.rank is not None]
    groups = [[rank for _, rank in group] for _, group in groupby(ranks, key=lambda pair: pair[0])]
    scores = {docid: line.score for docid, line in first.items()}
    if any(max(above) >= min(below) for above, below in pairwise(groups)):
        return Ranking(scores, "scores")
    in_order = all(one < other for (_, one), (_, other) in pairwise(ranks))
    return Ranking(scores, "" if in_order else "ties")


def load_queries(source: str | Path) -> dict[str, str]:
    """Texts of queries by id; the same query twice is no fault, two texts for one id are."""
    queries: dict[str, Query] = {}
    for query in read_part(source, "queries"):
        other = queries.setdefault(query.qid, query)
        if other.text != query.text:
            raise SourceError(repeated("query", query.qid, other.place, query.place))
    return {qid: query.text for qid, query in queries.items()}


def load_documents(source: str | Path, wanted: Collection[str]) -> dict[str, str]:
    """Texts of the wanted documents, none of which may be missing, as the inference client shows them."""
    wanted = set(wanted)
    documents: dict[str, Document] = {}
    example = ""
    for document in _wanted_documents(source, wanted):
        example = example or document.docid
        if document.docid in wanted:
            if document.problem:
                raise SourceError(f"{document.place}: document {document.docid!r}: {document.problem}")
            other = documents.setdefault(document.docid, document)
            if other.text != document.text:
                raise SourceError(repeated("document", document.docid, other.place, document.place))
    if wanted and not documents:
        raise nothing_shared("document", ("the run", min(wanted)), (Path(source).name, example))
    missing = sorted(wanted - documents.keys())
    if missing:
        found = f"lacks {counted(len(missing), 'document')} of the run, such as {', '.join(missing[:3])}"
        raise SourceError(f"{source}: {found}. Give the collection that the run was made from.")
    return {docid: document.text for docid, document in documents.items()}


def load_run(
    source: str | Path, duplicates: Duplicates = "stop", notes: Callable[[str], object] = report
) -> dict[str, list[str]]:
    """Document ids per query, best first, see `rank_candidates`; queries in the order of the file.

    Args:
        source: the run.
        duplicates: see `rank_candidates`.
        notes: called with a line for the user where the rank column differs from the order.
    """
    lines: dict[str, list[RunLine]] = {}
    for line in read_part(source, "run"):
        lines.setdefault(line.qid, []).append(line)
    name = Path(source).name
    run: dict[str, list[str]] = {}
    disagreements = {"": 0, "scores": 0, "ties": 0}
    for qid, candidates in lines.items():
        ranking = rank_candidates(candidates, name, duplicates)
        run[qid] = ranking.docids
        disagreements[ranking.disagreement] += 1
    for kind, what in DISAGREEMENTS.items():
        if disagreements[kind]:
            notes(f"{name}: {disagreements[kind]} of {len(run)} queries {what}")
    return run


DISAGREEMENTS = {
    "scores": "with ranks that disagree with the scores; the order is by score, as in trec_eval",
    "ties": "with ranks that differ among equal scores; these are in the order of document ids, as in trec_eval",
}
"""What is said of queries by the `disagreement` of their ranking."""


def load_judgments(source: str | Path) -> dict[str, dict[str, int]]:
    """Relevance grade of each judged document, by query."""
    grades: dict[str, dict[str, int]] = {}
    for line in read_part(source, "judgments"):
        known = grades.setdefault(line.qid, {})
        if known.setdefault(line.docid, line.grade) != line.grade:
            found = f"document {line.docid!r} has grade {line.grade} here and {known[line.docid]} before"
            raise SourceError(f"{Path(source).name}:line {line.line}: {found} for query {line.qid!r}. Remove one.")
    return grades


def require_shared(what: str, one: tuple[str, Iterable[str]], other: tuple[str, Collection[str]]) -> None:
    """Raise SourceError unless two sources, each (name, ids), share an id; shows one id of each."""
    first = ""
    for found in one[1]:
        if found in other[1]:
            return
        first = first or found
    raise nothing_shared(what, (one[0], first), (other[0], next(iter(other[1]), "")))


def nothing_shared(what: str, one: tuple[str, str], other: tuple[str, str]) -> SourceError:
    """The error that two sources, each (name, one of its ids), share no id of a query or a document."""
    seen = ", ".join(f"{name} has {found!r}" if found else f"{name} has none" for name, found in (one, other))
    return SourceError(f"{one[0]} and {other[0]} share no {what} id: {seen}. Check that they belong together.")


def repeated(what: str, found: str, there: str, here: str) -> str:
    """The message that an id has two texts."""
    return f"{here}: {what} {found!r} is repeated with another text, also in {there}. Remove one."


def _wanted_documents(source: str | Path, wanted: Collection[str]) -> Iterator[Document]:
    if not str(source).startswith(IRDS):
        yield from read_part(source, "docs")
        return
    dataset = _ir_dataset(str(source), "docs")
    with _fetching(str(source), "docs"):
        stored = dataset.docs_store().get_many(sorted(wanted))
    for docid, item in stored.items():
        yield document_of(Row(str(source), 0, None, 0), docid, _fields(item))


@contextmanager
def _fetching(source: str, part: Part) -> Iterator[None]:
    """Say what to do where ir_datasets cannot download a part."""
    try:
        yield
    except OSError as error:  # those of requests, and of the disk
        raise SourceError(
            f"{source}: ir_datasets cannot fetch {PARTS[part]} ({type(error).__name__}: {first_line(error)}). Check "
            "network and disk, copy ~/.ir_datasets (or IR_DATASETS_HOME) from a machine that has it, or give files."
        ) from error


def _read_ir_dataset(source: str, part: Part) -> Iterator[Any]:
    """The entries of a part of an ir_datasets dataset."""
    with _fetching(source, part):
        yield from _entries(source, part)


def _entries(source: str, part: Part) -> Iterator[Any]:
    row = Row(source, 0, None, 0)
    if part == "queries":
        for item in _ir_dataset(source, "queries").queries_iter():
            yield query_of(row, str(item.query_id), _fields(item))
    elif part == "docs":
        for item in _ir_dataset(source, "docs").docs_iter():
            yield document_of(row, str(item.doc_id), _fields(item))
    elif part == "judgments":
        for number, item in enumerate(_ir_dataset(source, "qrels").qrels_iter(), start=1):
            yield Judgment(number, item.query_id, item.doc_id, item.relevance)
    elif part in ("run", "teacher"):
        for number, item in enumerate(_ir_dataset(source, "scoreddocs").scoreddocs_iter(), start=1):
            yield run_line(row, item.query_id, item.doc_id, None, item.score)._replace(line=number)
    else:
        raise SourceError(f"{source}: ir_datasets has no {PARTS[part]}. Name a file.")


def _fields(item: Any) -> Mapping[str, Any]:
    """Fields of an ir_datasets query or document; its default text if it has no field `text`."""
    fields: dict[str, Any] = item._asdict()
    return fields if "text" in fields or not hasattr(item, "default_text") else {"text": item.default_text()}


def _ir_dataset(source: str, part: str) -> Any:
    """The ir_datasets dataset of an id, checked to have this part: docs, queries, qrels or scoreddocs."""
    name = source.removeprefix(IRDS)
    try:
        import ir_datasets
    except ImportError as error:
        remedy = "Run pip install ir-datasets, or give files."
        raise SourceError(f"{source}: the package ir_datasets is not installed. {remedy}") from error
    try:
        dataset = ir_datasets.load(name)
    except KeyError as error:
        raise SourceError(f"{source}: ir_datasets has no dataset {name!r}. See its catalog for ids.") from error
    if not getattr(dataset, f"has_{part}")():
        raise SourceError(f"{source}: the dataset has no {part}. Choose one that does, or give a file.")
    return dataset
