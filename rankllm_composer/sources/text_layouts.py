"""Layouts whose rows are lines of text with columns: runs, judgments, topics and collections."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote

from rankllm_composer.errors import counted
from rankllm_composer.sources.entries import (
    Document,
    Judgment,
    Query,
    RunLine,
    checked_id,
    document_of,
    judgment,
    query_of,
    run_line,
)
from rankllm_composer.sources.files import Row

_COLON = re.compile(r"(\d+):(?:\d+:)?(?=\s*\S)([^\t]*)")


def is_trec_run(value: Any) -> bool:
    """`qid Q0 docid rank score tag`."""
    return _has_columns(value, 6, numeric=(3, 4))


def is_trec_qrels(value: Any) -> bool:
    """`qid 0 docid grade`."""
    return _has_columns(value, 4, numeric=(3,))


def is_three_columns(value: Any) -> bool:
    """`qid docid grade`, or `qid docid rank`."""
    return _has_columns(value, 3, numeric=(2,))


def is_id_and_text(value: Any) -> bool:
    """`id`, a tab, a text; neither a run nor judgments separated by tabs."""
    if not isinstance(value, str) or "\t" not in value.strip():
        return False
    others = {5: is_trec_run, 3: is_trec_qrels, 2: is_three_columns}
    return not others.get(value.strip().count("\t"), is_section_path)(value)


def is_section_path(value: Any) -> bool:
    """A topic of TREC CAR, such as `Aftertaste/Taste%20receptors`."""
    return isinstance(value, str) and len(value.split()) == 1 and ("/" in value or value.startswith("enwiki:"))


def is_id_colon_text(value: Any) -> bool:
    """`12:text` or `12:1:text`, as in the tracks on efficiency and a million queries."""
    return isinstance(value, str) and _COLON.fullmatch(value) is not None


def trec_run(row: Row) -> Iterator[RunLine]:
    qid, _, docid, rank, score, _ = _cut(row, 6, "qid Q0 docid rank score tag")
    yield run_line(row, qid, docid, rank, score)


def ranks(row: Row) -> Iterator[RunLine]:
    qid, docid, rank = _cut(row, 3, "qid docid rank")
    yield run_line(row, qid, docid, rank, -float(rank) if _is_number(rank) else rank)


def trec_qrels(row: Row) -> Iterator[Judgment]:
    qid, _, docid, grade = _cut(row, 4, "qid 0 docid grade")
    yield judgment(row, qid, docid, grade)


def short_qrels(row: Row) -> Iterator[Judgment]:
    qid, docid, grade = _cut(row, 3, "qid docid grade")
    yield judgment(row, qid, docid, grade)


def tsv_query(row: Row) -> Iterator[Query]:
    qid, texts = _id_and_text(row)
    yield query_of(row, qid, texts[0])


def tsv_document(row: Row) -> Iterator[Document]:
    docid, texts = _id_and_text(row)
    # Four columns are those of MS MARCO's documents: id, url, title, body.
    yield document_of(row, docid, {"title": texts[1], "text": texts[2]} if len(texts) == 3 else {"text": texts[0]})


def colon_query(row: Row) -> Iterator[Query]:
    found = _COLON.fullmatch(row.value)
    if found is None:
        raise row.error(f"the line is {row.value[:80]!r}; expected a number, a colon and a text. Correct the line.")
    yield query_of(row, found[1], found[2])


def section_query(row: Row) -> Iterator[Query]:
    yield query_of(
        row, checked_id(row, row.value.strip()), unquote(row.value.strip().removeprefix("enwiki:")).replace("/", " ")
    )


def _id_and_text(row: Row) -> tuple[str, list[str]]:
    key, *texts = row.value.split("\t")
    if not key.strip() or not texts:
        raise row.error(f"the line is {row.value[:80]!r}; expected an id, a tab and a text. Correct the line.")
    return checked_id(row, key.strip()), texts


def _columns(line: str, number: int) -> list[str]:
    """Columns separated by white space, or else by tabs, where ids may hold spaces."""
    columns = line.split()
    return columns if len(columns) == number else [column.strip() for column in line.split("\t")]


def _cut(row: Row, number: int, shape: str) -> list[str]:
    columns = _columns(row.value, number)
    if len(columns) != number:
        found = f"{row.value.strip()[:80]!r} has {counted(len(row.value.split()), 'field')}"
        raise row.error(f"{found}; expected {number}: {shape}. Correct the line.")
    return columns


def _has_columns(value: Any, number: int, numeric: Sequence[int]) -> bool:
    if not isinstance(value, str):
        return False
    columns = _columns(value, number)
    return len(columns) == number and all(_is_number(columns[i]) for i in numeric)


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False
