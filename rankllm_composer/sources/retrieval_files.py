"""Queries, documents, first-stage runs and judgments: from files, BEIR folders or ir_datasets.

Each is named by a path or an id:

- a file: JSONL of queries (`qid`, `text`) or documents (`docid`, `text`, optional `title`), a TREC run, TREC judgments;
- a folder in BEIR's layout: queries.jsonl, corpus.jsonl, qrels/test.tsv (or the path of another .tsv in qrels/);
- `irds:ID`, a dataset of the package ir_datasets, if that is installed.

Every function raises a SourceError that names file and line if a file cannot be read or is wrong.
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

IR_DATASETS_PREFIX = "irds:"
_Entry = tuple[str, str, Mapping[str, Any]]  # place, id, fields


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
    """Lines of a TREC run, `qid Q0 docid rank score tag`, one at a time."""
    for place, number, fields in _split_lines(path, 6, "qid Q0 docid rank score tag"):
        try:
            rank, score = int(fields[3]), float(fields[4])
        except ValueError as error:
            raise SourceError(f"{place}: {error}; expected an integer rank and a numeric score.") from error
        if math.isnan(score) or abs(rank) >= 1 << 63:
            found = f"rank is {fields[3]} and score {fields[4]}"
            raise SourceError(f"{place}: {found}; expected 64-bit integer and number.")
        yield RunLine(number, fields[0], fields[2], rank, score)


def read_judgments(path: str | Path) -> Iterator[Judgment]:
    """Lines of a TREC judgment file, `qid 0 docid grade`, one at a time."""
    for place, number, fields in _split_lines(path, 4, "qid 0 docid grade"):
        try:
            grade = int(fields[3])
        except ValueError as error:
            raise SourceError(f"{place}: {error}; expected an integer grade.") from error
        if abs(grade) >= 1 << 31:
            raise SourceError(f"{place}: grade is {fields[3]}; expected a 32-bit integer.")
        yield Judgment(number, fields[0], fields[2], grade)


def read_json_lines(path: str | Path, key: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Objects of a JSONL file, with text under `key`: (line counted from 1, byte where it starts, object)."""
    path = Path(path)
    start = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, start, _json_object(line, f"{path.name}:line {number}", key)
                start += len(line)
    except OSError as error:
        raise _unreadable(path, error) from error


def query_text(fields: Mapping[str, Any], qid: str, place: str) -> str:
    """Text of a query: its field `text`, or else `title`."""
    text = fields.get("text") or fields.get("title")
    if not isinstance(text, str) or not text.strip() or not is_unicode(text):
        raise SourceError(f"{place}: query {qid!r} has no text under 'text'. Correct or remove it.")
    return text.strip()


def load_queries(source: str | Path) -> dict[str, str]:
    """Texts of queries by id."""
    queries: dict[str, str] = {}
    for place, qid, fields in _entries(source, "queries.jsonl", "qid", "queries_iter", "query_id"):
        text = query_text(fields, qid, place)
        if qid in queries:
            raise SourceError(f"{place}: query {qid!r} is repeated. Remove one.")
        queries[qid] = text
    return queries


def load_documents(source: str | Path, wanted: Collection[str]) -> dict[str, str]:
    """Texts of the wanted documents, none of which may be missing, as the inference client shows them."""
    wanted = set(wanted)
    documents: dict[str, str] = {}
    if str(source).startswith(IR_DATASETS_PREFIX):
        stored = _part(str(source), "docs").docs_store().get_many(sorted(wanted))
        entries: Iterable[_Entry] = ((str(source), docid, _fields(item)) for docid, item in stored.items())
    else:
        entries = _entries(source, "corpus.jsonl", "docid", "docs_iter", "doc_id")
    for place, docid, fields in entries:
        if docid not in wanted:
            continue
        if docid in documents:
            raise SourceError(f"{place}: document {docid!r} is repeated. Remove one.")
        try:
            documents[docid] = document_text(fields)
        except PromptError as error:
            raise SourceError(f"{place}: document {docid!r}: {error}") from error
    missing = sorted(wanted - documents.keys())
    if missing:
        found = f"{len(missing)} documents of the run are missing, such as {', '.join(missing[:3])}"
        raise SourceError(f"{source}: {found}. Give the collection that the run was made from.")
    return documents


def load_run(source: str | Path) -> dict[str, list[str]]:
    """Document ids per query, best first by the run's rank column; those of `irds:ID` by their scores."""
    name = Path(source).name
    lines: dict[str, list[tuple[float, int, str]]] = {}
    if str(source).startswith(IR_DATASETS_PREFIX):
        for number, item in enumerate(_part(str(source), "scoreddocs").scoreddocs_iter(), start=1):
            lines.setdefault(item.query_id, []).append((-item.score, number, item.doc_id))
    else:
        for line in read_run(source):
            lines.setdefault(line.qid, []).append((line.rank, line.line, line.docid))
    if not lines:
        raise SourceError(f"{source}: the file contains no candidates. Give a TREC run.")
    run: dict[str, list[str]] = {}
    for qid, candidates in lines.items():
        run[qid] = [docid for _, _, docid in sorted(candidates)]
        seen: set[str] = set()
        for _, line_number, docid in candidates:
            if docid in seen:
                raise SourceError(f"{name}:line {line_number}: document {docid!r} is repeated for query {qid!r}.")
            seen.add(docid)
    return run


def load_judgments(source: str | Path) -> dict[str, dict[str, int]]:
    """Relevance grade of each judged document, by query."""
    grades: dict[str, dict[str, int]] = {}
    for place, qid, docid, grade in _judgments(source):
        if grades.setdefault(qid, {}).setdefault(docid, grade) != grade:
            raise SourceError(
                f"{place}: document {docid!r} has grade {grade} here and {grades[qid][docid]} before for query {qid!r}."
            )
    return grades


def _split_lines(path: str | Path, num_fields: int, layout: str) -> Iterator[tuple[str, int, list[str]]]:
    path = Path(path)
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                fields = line.split()
                if fields and len(fields) != num_fields:
                    raise SourceError(
                        f"{path.name}:line {number}: {line.strip()[:80]!r} has {len(fields)} fields; "
                        f"expected {num_fields}: {layout}. Correct the line."
                    )
                if fields:
                    yield f"{path.name}:line {number}", number, fields
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path.name}: after line {number}: {error}. Write the file as UTF-8.") from error


def _unreadable(path: Path, error: OSError) -> SourceError:
    return SourceError(f"{path}: the file cannot be read ({error.strerror}). Check its path and permissions.")


def _json_object(line: bytes, place: str, key: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{place}: invalid JSON: {error}; expected one object per line, not compressed.") from error
    if not isinstance(value, dict) or not isinstance(value.get(key), str) or not value[key].strip():
        raise SourceError(f"{place}: no text under {key!r} in {str(value)[:80]}; expected an object that has it.")
    if not is_unicode(value[key]):
        raise SourceError(f"{place}: {key!r} contains an unpaired surrogate. Write the text as valid Unicode.")
    return value


def _entries(source: str | Path, beir_file: str, key: str, dataset_iterator: str, dataset_key: str) -> Iterator[_Entry]:
    if str(source).startswith(IR_DATASETS_PREFIX):
        for item in getattr(_part(str(source), dataset_iterator.removesuffix("_iter")), dataset_iterator)():
            yield str(source), str(getattr(item, dataset_key)), _fields(item)
        return
    path = Path(source)
    if path.is_dir():
        path, key = path / beir_file, "_id"
    for number, _, fields in read_json_lines(path, key):
        yield f"{path.name}:line {number}", fields[key], fields


def _judgments(source: str | Path) -> Iterator[tuple[str, str, str, int]]:
    """(place, query id, document id, grade) of each judgment."""
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
        raise _unreadable(path, error) from error
    for number, text in enumerate(lines[1:], start=2):  # the first line names the columns
        place, columns = f"{path.name}:line {number}", text.split("\t")
        if len(columns) != 3 or not re.fullmatch(r"-?\d+", columns[2]):
            raise SourceError(f"{place}: the line is {text[:80]!r}; expected query-id, corpus-id, score. Correct it.")
        yield place, columns[0], columns[1], int(columns[2])


def _fields(item: Any) -> Mapping[str, Any]:
    """Fields of an ir_datasets query or document; its default text if it has no field `text`."""
    fields: dict[str, Any] = item._asdict()
    return fields if "text" in fields or not hasattr(item, "default_text") else {"text": item.default_text()}


def _part(source: str, part: str) -> Any:
    """The ir_datasets dataset of an id, checked to have this part: docs, queries, qrels or scoreddocs."""
    name = source.removeprefix(IR_DATASETS_PREFIX)
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
