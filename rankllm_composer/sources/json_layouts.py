"""Layouts whose rows are objects: requests of rank_llm, candidate lists, orders, queries, documents, judgments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rankllm_composer.sources.entries import (
    DOCUMENT_IDS,
    DOCUMENT_TEXTS,
    QUERY_IDS,
    QUERY_TEXTS,
    Document,
    Judgment,
    Permutation,
    Query,
    RunLine,
    checked_id,
    document_of,
    find_key,
    identifier,
    judgment,
    query_of,
    run_line,
)
from rankllm_composer.sources.files import COLUMNS, Row

_LISTS = ("candidates", "hits", "retrieved_passages", "documents", "passages", "ctxs", "top1000", "top100")
_ROW_IDS = QUERY_IDS[:8]
_FLAT_QUERY_IDS = QUERY_IDS[:4]
_FLAT_DOCUMENT_IDS = DOCUMENT_IDS[:7]
_GRADES = ("score", "relevance", "grade", "label")
_PERMUTATION = re.compile(r"\s*\[?\d+\]?(?:\s*>\s*\[?\d+\]?)+\s*")


def is_candidates(value: Any) -> bool:
    """A query with its candidates in order, each with its text."""
    key = _list_key(value)
    return key is not None and isinstance(value.get("query", value.get("question")), str | Mapping)


def is_orders(value: Any) -> bool:
    """The ids of a query's candidates in two orders."""
    return isinstance(value, Mapping) and {"initial_list", "final_list"} <= value.keys()


def is_query(value: Any) -> bool:
    """An id and a text."""
    return find_key(value, QUERY_IDS) is not None and isinstance(value.get(find_key(value, QUERY_TEXTS)), str)


def is_question(value: Any) -> bool:
    """A question without an id, as in DPR."""
    return isinstance(value, Mapping) and isinstance(value.get("question"), str) and not is_query(value)


def is_document(value: Any) -> bool:
    """An id and a text, and perhaps a title."""
    return find_key(value, DOCUMENT_IDS) is not None and any(name in value for name in DOCUMENT_TEXTS)


def is_flat_judgment(value: Any) -> bool:
    """The ids of a query and of a document, and a number."""
    ids = find_key(value, _FLAT_QUERY_IDS), find_key(value, _FLAT_DOCUMENT_IDS)
    return None not in ids and "corpus-id" not in value and any(name in value for name in _GRADES)


def is_beir_judgment(value: Any) -> bool:
    """`query-id`, `corpus-id` and `score`, where the score is a grade."""
    return isinstance(value, Mapping) and {"query-id", "corpus-id", "score"} <= value.keys()


def is_text_by_id(value: Any) -> bool:
    """One object: id → text, or id → object with a text."""
    first = _first_of_mapping(value)
    return isinstance(first, str) or find_key(first, QUERY_TEXTS) is not None


def is_numbers_by_ids(value: Any) -> bool:
    """One object: query id → document id → grade or score."""
    first = _first_of_mapping(value)
    return isinstance(first, Mapping) and bool(first) and find_key(first, QUERY_TEXTS) is None


def is_permutation(value: Any) -> bool:
    """`[2] > [1] > [3]`, without anything to say of which query."""
    return isinstance(value, str) and _PERMUTATION.fullmatch(value) is not None


def candidates_query(row: Row) -> Iterator[Query]:
    yield query_of(row, _qid(row), row.value.get("query", row.value.get("question")))


def candidates_documents(row: Row) -> Iterator[Document]:
    for docid, candidate in _candidates(row):
        inner = candidate.get("doc")
        yield document_of(row, docid, inner if isinstance(inner, str | Mapping) else candidate)


def candidates_run(row: Row) -> Iterator[RunLine]:
    qid = _qid(row)
    for position, (docid, _) in enumerate(_candidates(row), start=1):
        yield run_line(row, qid, docid, position, -position)


def candidates_judgments(row: Row) -> Iterator[Judgment]:
    qid, grades = _qid(row), row.value.get("qrels")
    if isinstance(grades, Mapping):
        for docid, grade in grades.items():
            yield judgment(row, qid, docid, grade)
    for passage in row.value.get("positive_passages") or ():
        yield judgment(row, qid, identifier(row, passage, DOCUMENT_IDS), 1)


def orders_query(row: Row) -> Iterator[Query]:
    yield query_of(row, _qid(row), row.value.get("query") or "")


def orders_run(row: Row) -> Iterator[RunLine]:
    yield from _ranked(row, "initial_list")


def orders_teacher(row: Row) -> Iterator[RunLine]:
    yield from _ranked(row, "final_list")


def orders_judgments(row: Row) -> Iterator[Judgment]:
    for docid in row.value.get("relevant_docids") or ():
        yield judgment(row, _qid(row), str(docid), 1)


def json_query(row: Row) -> Iterator[Query]:
    yield query_of(row, identifier(row, row.value, QUERY_IDS), row.value)


def numbered_query(row: Row) -> Iterator[Query]:
    yield query_of(row, numbered(row), row.value)


def json_document(row: Row) -> Iterator[Document]:
    yield document_of(row, identifier(row, row.value, DOCUMENT_IDS), row.value)


def flat_judgment(row: Row) -> Iterator[Judgment]:
    qid, docid = _flat_ids(row)
    yield judgment(row, qid, docid, next((row.value[name] for name in _GRADES if name in row.value), None))


def flat_run(row: Row) -> Iterator[RunLine]:
    qid, docid = _flat_ids(row)
    yield run_line(row, qid, docid, row.value.get("rank"), row.value.get("score"))


def queries_by_id(row: Row) -> Iterator[Query]:
    for qid, value in row.value.items():
        yield query_of(row, checked_id(row, qid), value if isinstance(value, str | Mapping) else "")


def documents_by_id(row: Row) -> Iterator[Document]:
    for docid, value in row.value.items():
        yield document_of(row, checked_id(row, docid), value if isinstance(value, str | Mapping) else {})


def judgments_by_ids(row: Row) -> Iterator[Judgment]:
    for qid, grades in row.value.items():
        for docid, grade in _mapping(row, grades).items():
            yield judgment(row, qid, docid, grade)


def run_by_ids(row: Row) -> Iterator[RunLine]:
    for qid, scores in row.value.items():
        for docid, score in _mapping(row, scores).items():
            yield run_line(row, qid, docid, None, score)


def permutation(row: Row) -> Iterator[Permutation]:
    if not isinstance(row.value, str):
        raise row.error(f"{str(row.value)[:80]!r} is not a permutation; expected text such as '[2] > [1]'. Correct it.")
    positions = dict.fromkeys(int(number) - 1 for number in re.findall(r"\d+", row.value))
    yield Permutation(row.number, tuple(positions))


def numbered(row: Row) -> str:
    """The id of a row without one: its number, counted from 0."""
    return str(row.number - 1)


def _list_key(value: Any) -> str | None:
    def is_list(found: Any) -> bool:
        return isinstance(found, Sequence) and all(isinstance(entry, Mapping) for entry in found) and found != ""

    if not isinstance(value, Mapping):
        return None
    return next((key for key in _LISTS if key in value and is_list(value[key])), None)


def _candidates(row: Row) -> Iterator[tuple[str, Mapping[str, Any]]]:
    key = _list_key(row.value)
    if key is None:
        raise row.error(f"no list of candidates under one of {', '.join(_LISTS[:3])}, …. Correct or remove the row.")
    qid = _qid(row)
    for position, candidate in enumerate(row.value[key]):
        has_id = find_key(candidate, DOCUMENT_IDS) is not None
        yield identifier(row, candidate, DOCUMENT_IDS) if has_id else f"{qid}-{position}", candidate


def _qid(row: Row) -> str:
    """The id of a row's query: of the query, the row, or its first candidate (as in RankGPT); else the row's number."""
    listed = row.value.get(_list_key(row.value) or "") or [None]
    candidate = {"qid": listed[0]["qid"]} if find_key(listed[0], ("qid",)) else None
    owners = (owner for owner in (row.value.get("query"), row.value, candidate) if find_key(owner, _ROW_IDS))
    owner = next(owners, None)
    return numbered(row) if owner is None else identifier(row, owner, _ROW_IDS)


def _ranked(row: Row, key: str) -> Iterator[RunLine]:
    docids = row.value.get(key)
    if not isinstance(docids, Sequence) or isinstance(docids, str):
        raise row.error(f"{key} is {str(docids)[:60]!r}; expected a list of ids. Correct or remove the row.")
    qid = _qid(row)
    for position, docid in enumerate(docids, start=1):
        yield run_line(row, qid, str(docid), position, -position)


def _flat_ids(row: Row) -> tuple[str, str]:
    return identifier(row, row.value, _FLAT_QUERY_IDS), identifier(row, row.value, _FLAT_DOCUMENT_IDS)


def _first_of_mapping(value: Any) -> Any:
    """The first value of an object whose keys are ids, which hold a digit, and not names of fields."""
    if not isinstance(value, Mapping) or not value or any(key in COLUMNS for key in value):
        return None
    return next(iter(value.values())) if all(re.search(r"\d", key) for key in value) else None


def _mapping(row: Row, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise row.error(f"{str(value)[:60]!r} stands for a query; expected an object of document ids. Correct it.")
    return value
