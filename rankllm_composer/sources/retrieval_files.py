"""What is reranked: queries, documents, a first-stage run and judgments, from files, BEIR folders or ir_datasets.

Each of the four is named by a path or an id of its own:

- a file: JSONL of queries (`qid`, `text`) or documents (`docid`, `text`, maybe `title`), TREC run, TREC judgments;
- a folder in BEIR's layout: queries.jsonl, corpus.jsonl, qrels/test.tsv (or another .tsv of qrels/, named itself);
- `irds:ID`, a dataset of the package ir_datasets, where that is installed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rankllm_composer.errors import PromptError, SourceError
from rankllm_composer.prompts.record import is_unicode
from rankllm_composer.prompts.user_turn import document_text


class RunLine(NamedTuple):
    """A line of a TREC run. `line` is counted from 1."""

    line: int
    qid: str
    docid: str
    rank: int
    score: float


class Judgment(NamedTuple):
    """A line of a TREC judgment file. `line` is counted from 1."""

    line: int
    qid: str
    docid: str
    grade: int


def read_run(path: str | Path) -> Iterator[RunLine]:
    """Lines of a TREC run, `qid Q0 docid rank score tag`, one at a time.

    Raises:
        SourceError: with file and line, what was found and what is allowed.
    """
    for place, number, fields in _split_lines(path, 6, "qid Q0 docid rank score tag"):
        try:
            rank, score = int(fields[3]), float(fields[4])
        except ValueError as error:
            raise SourceError(f"{place}: {error}; allowed are a whole number as rank and a number as score") from error
        if math.isnan(score) or abs(rank) >= 1 << 63:
            raise SourceError(f"{place}: found rank {fields[3]}, score {fields[4]}; correct the run")
        yield RunLine(number, fields[0], fields[2], rank, score)


def read_judgments(path: str | Path) -> Iterator[Judgment]:
    """Lines of a TREC judgment file, `qid 0 docid grade`, one at a time.

    Raises:
        SourceError: with file and line, what was found and what is allowed.
    """
    for place, number, fields in _split_lines(path, 4, "qid 0 docid grade"):
        try:
            grade = int(fields[3])
        except ValueError as error:
            raise SourceError(f"{place}: {error}; allowed is a whole number as grade") from error
        if abs(grade) >= 1 << 31:
            raise SourceError(f"{place}: found grade {fields[3]}; correct the judgments")
        yield Judgment(number, fields[0], fields[2], grade)


def read_json_lines(path: str | Path, key: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Objects of a JSONL file of queries or documents: (line counted from 1, byte where it starts, object).

    Args:
        path: the file, not compressed.
        key: field that every object must have, as text that is not empty.
    Raises:
        SourceError: with file and line, what was found and what is allowed.
    """
    path = Path(path)
    start = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{path.name}:line {number}"
                    yield number, start, _json_object(line, place, key)
                start += len(line)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; check path and rights") from error


def _split_lines(path: str | Path, num_fields: int, layout: str) -> Iterator[tuple[str, int, list[str]]]:
    path = Path(path)
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                fields = line.split()
                if fields and len(fields) != num_fields:
                    raise SourceError(
                        f"{path.name}:line {number}: found {len(fields)} fields in {line.strip()[:80]!r}, "
                        f"allowed are {num_fields}: {layout}; correct the line"
                    )
                if fields:
                    yield f"{path.name}:line {number}", number, fields
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; check path and rights") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path.name}: after line {number}: {error}; write the file as UTF-8") from error


def _json_object(line: bytes, place: str, key: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{place}: is no valid JSON: {error}; the file holds one object a line, not compressed"
        ) from error
    if not isinstance(value, dict) or not isinstance(value.get(key), str) or not value[key].strip():
        raise SourceError(
            f"{place}: found no text under {key!r} in {str(value)[:80]}; every line is an object that has it"
        )
    if not is_unicode(value[key]):
        raise SourceError(f"{place}: {key!r} holds half of a surrogate pair; write the text again")
    return value


IR_DATASETS_PREFIX = "irds:"


def load_queries(source: str | Path) -> dict[str, str]:
    """Texts of queries by id.

    Raises:
        SourceError, SourceError: unreadable, an id that comes twice, or a query without text.
    """
    queries: dict[str, str] = {}
    for place, qid, fields in _entries(source, "queries.jsonl", "qid", "queries_iter", "query_id"):
        text = fields.get("text") or fields.get("title")
        if not isinstance(text, str) or not text.strip():
            raise SourceError(f"{place}: query {qid!r} has no text under 'text'; correct it or leave it out")
        if qid in queries:
            raise SourceError(f"{place}: query {qid!r} comes twice; remove one")
        queries[qid] = text.strip()
    return queries


def load_documents(source: str | Path, wanted: Collection[str]) -> dict[str, str]:
    """Texts of the documents wanted, as the inference client takes them; the others are passed over.

    Raises:
        SourceError, SourceError: unreadable, a wanted document that is not there, comes twice or has no text.
    """
    wanted = set(wanted)
    documents: dict[str, str] = {}
    if str(source).startswith(IR_DATASETS_PREFIX):
        found: Iterable[tuple[str, str, Mapping[str, Any]]] = _stored_documents(str(source), wanted)
    else:
        found = _entries(source, "corpus.jsonl", "docid", "docs_iter", "doc_id")
    for place, docid, fields in found:
        if docid not in wanted:
            continue
        if docid in documents:
            raise SourceError(f"{place}: document {docid!r} comes twice; remove one")
        try:
            documents[docid] = document_text(fields)
        except PromptError as error:
            raise SourceError(f"{place}: document {docid!r}: {error}") from error
    missing = sorted(wanted - documents.keys())
    if missing:
        raise SourceError(
            f"{source}: {len(missing)} documents of the run are not in it, such as {', '.join(missing[:3])}; give the "
            "collection the run was made from"
        )
    return documents


def load_run(source: str | Path) -> dict[str, list[str]]:
    """Document ids of each query, best first by the run's rank column; of `irds:ID` by the scores it comes with.

    Raises:
        SourceError, SourceError: unreadable, no lines, or a document that comes twice for a query.
    """
    name = Path(source).name
    lines: dict[str, list[tuple[float, int, str]]] = {}
    if str(source).startswith(IR_DATASETS_PREFIX):
        for number, item in enumerate(_part(str(source), "scoreddocs").scoreddocs_iter(), start=1):
            lines.setdefault(item.query_id, []).append((-item.score, number, item.doc_id))
    else:
        for line in read_run(source):
            lines.setdefault(line.qid, []).append((line.rank, line.line, line.docid))
    if not lines:
        raise SourceError(f"{source}: holds no candidates; give a TREC run")
    run: dict[str, list[str]] = {}
    for qid, candidates in lines.items():
        run[qid] = [docid for _, _, docid in sorted(candidates)]
        seen: set[str] = set()
        for _, line_number, docid in candidates:
            if docid in seen:
                raise SourceError(f"{name}:line {line_number}: document {docid!r} comes twice for query {qid!r}")
            seen.add(docid)
    return run


def load_judgments(source: str | Path) -> dict[str, dict[str, int]]:
    """Relevance grade of each judged document, by query.

    Raises:
        SourceError, SourceError: unreadable, or judgments that contradict each other.
    """
    grades: dict[str, dict[str, int]] = {}
    for place, qid, docid, grade in _judgments(source):
        if grades.setdefault(qid, {}).setdefault(docid, grade) != grade:
            raise SourceError(
                f"{place}: document {docid!r} has grade {grade} here and {grades[qid][docid]} before for query {qid!r}"
            )
    return grades


def _entries(
    source: str | Path, beir_file: str, key: str, dataset_iterator: str, dataset_key: str
) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    """(place, id, fields) of each query or document."""
    if str(source).startswith(IR_DATASETS_PREFIX):
        for item in getattr(_part(str(source), dataset_iterator.removesuffix("_iter")), dataset_iterator)():
            yield str(source), str(getattr(item, dataset_key)), _fields(item)
        return
    path = Path(source)
    if path.is_dir():
        path, key = path / beir_file, "_id"
    for number, _, fields in read_json_lines(path, key):
        yield f"{path.name}:line {number}", fields[key], fields


def _judgments(source: str | Path) -> Iterable[tuple[str, str, str, int]]:
    if str(source).startswith(IR_DATASETS_PREFIX):
        for item in _part(str(source), "qrels").qrels_iter():
            yield str(source), item.query_id, item.doc_id, item.relevance
        return
    path = Path(source)
    if path.is_dir():
        path = path / "qrels" / "test.tsv"
    if path.suffix != ".tsv":
        for line in read_judgments(path):
            yield f"{path.name}:line {line.line}", line.qid, line.docid, line.grade
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; check path and rights") from error
    for number, text in enumerate(lines[1:], start=2):  # the first line names the columns
        place, columns = f"{path.name}:line {number}", text.split("\t")
        if len(columns) != 3 or not re.fullmatch(r"-?\d+", columns[2]):
            raise SourceError(f"{place}: found {text[:80]!r}, allowed is query-id, corpus-id, score; correct it")
        yield place, columns[0], columns[1], int(columns[2])


def _stored_documents(source: str, wanted: Iterable[str]) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    store = _part(source, "docs").docs_store()
    for docid, item in store.get_many(sorted(wanted)).items():
        yield source, docid, _fields(item)


def _fields(item: Any) -> Mapping[str, Any]:
    """Fields of an ir_datasets query or document; what has no `text` of its own gets its default text."""
    fields: dict[str, Any] = item._asdict()
    return fields if "text" in fields or not hasattr(item, "default_text") else {"text": item.default_text()}


def _part(source: str, part: str) -> Any:
    """The dataset of an id, which has this part: docs, queries, qrels or scoreddocs."""
    dataset = _ir_dataset(source)
    if not getattr(dataset, f"has_{part}")():
        raise SourceError(f"{source}: found no {part} in this dataset, allowed is one that has them; give a file")
    return dataset


def _ir_dataset(source: str) -> Any:
    name = source.removeprefix(IR_DATASETS_PREFIX)
    try:
        import ir_datasets  # type: ignore[import-not-found]
    except ImportError as error:
        raise SourceError(
            f"{source}: needs the package ir_datasets, which is not installed; pip install ir-datasets, or give files"
        ) from error
    try:
        return ir_datasets.load(name)
    except KeyError as error:
        raise SourceError(f"{source}: ir_datasets knows no {name!r}; see its catalogue for ids") from error
