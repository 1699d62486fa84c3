"""What the rows of files hold, one entry at a time: queries, documents, run lines, judgments; and their checks."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rankllm_composer.errors import PromptError
from rankllm_composer.prompts.record import is_unicode
from rankllm_composer.prompts.user_turn import document_text
from rankllm_composer.sources.files import Row

QUERY_IDS = ("qid", "query_id", "query-id", "queryid", "question_id", "topic_id", "_id", "id", "num", "number", "docno")
QUERY_TEXTS = ("text", "query", "title", "question", "contents", "content", "query_txt")
DOCUMENT_IDS = ("docid", "doc_id", "doc-id", "pid", "passage_id", "corpus-id", "corpus_id", "docno", "_id", "id")
DOCUMENT_TEXTS = ("text", "segment", "contents", "content", "body", "passage")


class Query(NamedTuple):
    """A query and the place of its row."""

    place: str
    qid: str
    text: str


class Document(NamedTuple):
    """A document: its text as the inference client shows it, or what is wrong with it."""

    place: str
    docid: str
    text: str
    problem: str = ""


class RunLine(NamedTuple):
    """A candidate of a query. `line` is that of its row; `rank` is None in a layout without ranks."""

    line: int
    qid: str
    docid: str
    rank: int | None
    score: float


class Judgment(NamedTuple):
    """The grade of a document for a query. `line` is that of its row."""

    line: int
    qid: str
    docid: str
    grade: int


class Permutation(NamedTuple):
    """An order of the candidates in row `line` of a run, as 0-based positions, best first."""

    line: int
    positions: tuple[int, ...]


def find_key(value: Any, keys: Sequence[str]) -> str | None:
    """The first of the keys under which an object has a text or a whole number."""
    if not isinstance(value, Mapping):
        return None
    return next((key for key in keys if key in value and as_id(value[key]) is not None), None)


def as_id(value: object) -> str | None:
    """An id as text: a text, or a whole number, which may be written 1.0; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def identifier(row: Row, value: Any, keys: Sequence[str]) -> str:
    """The id of an object, under the first of the keys that it has."""
    key = find_key(value, keys)
    found = (as_id(value[key]) or "").strip() if key is not None else ""
    if not found:
        names = ", ".join(map(repr, keys[:3]))
        raise row.error(f"no id under {names} in {str(value)[:80]}; expected an object that has it. Correct the row.")
    return checked_id(row, found)


def checked_id(row: Row, found: str) -> str:
    """An id that can be written as UTF-8."""
    if not is_unicode(found):
        raise row.error("an id contains an unpaired surrogate. Write the text as valid Unicode.")
    return found


def query_of(row: Row, qid: str, value: Any) -> Query:
    """A query with its first text."""
    text = value if isinstance(value, str) else next((value[key] for key in QUERY_TEXTS if value.get(key)), None)
    if not isinstance(text, str) or not text.strip() or not is_unicode(text):
        raise row.error(f"query {qid!r} has no text under 'text'. Correct or remove it.")
    return Query(row.place, qid, text.strip())


def document_of(row: Row, docid: str, value: Mapping[str, Any] | str) -> Document:
    """A document with its text; what is wrong with it matters only if a list shows it."""
    try:
        text = document_text({"text": value} if isinstance(value, str) else value)
    except PromptError as error:
        return Document(row.place, docid, "", str(error))
    if not is_unicode(text):
        return Document(row.place, docid, "", "its text contains an unpaired surrogate. Write it as valid Unicode.")
    return Document(row.place, docid, text)


def whole(value: object) -> int:
    """A whole number, which may be written 1.0; raise ValueError if it is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str | float) or (number := float(value)) != int(number):
        raise ValueError(value)
    return int(value) if isinstance(value, str) and value.lstrip("+-").isdecimal() else int(number)


def run_line(row: Row, qid: str, docid: str, rank: object, score: object) -> RunLine:
    """A line of a run. Scores are rounded to 32 bits, as in trec_eval, where nearly equal ones tie."""
    try:
        place, value = None if rank is None else whole(rank), float(score)  # type: ignore[arg-type]
    except (ValueError, OverflowError, TypeError):
        place, value = 0, math.nan
    if math.isnan(value) or abs(place or 0) >= 1 << 63:
        raise row.error(f"rank is {rank!r} and score {score!r}; expected numbers. Correct the line.")
    return RunLine(row.number, checked_id(row, qid), checked_id(row, docid), place, ctypes.c_float(value).value)


def judgment(row: Row, qid: str, docid: str, grade: object) -> Judgment:
    """A judgment; its grade may be written 1.0."""
    try:
        value = whole(grade)
    except (ValueError, OverflowError, TypeError):
        raise row.error(f"grade is {grade!r}; expected a whole number. Correct the line.") from None
    if abs(value) >= 1 << 31:
        raise row.error(f"grade is {grade}; expected a 32-bit integer. Correct the line.")
    return Judgment(row.number, checked_id(row, qid), checked_id(row, docid), value)
