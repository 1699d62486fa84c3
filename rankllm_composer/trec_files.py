"""The files of retrieval experiments: TREC runs, TREC judgments, and queries or documents as JSONL.

Every reader goes through its file once, a line at a time, and names the line that is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rankllm_composer.records import is_unicode


class TrecError(ValueError):
    """A retrieval file that cannot be read, or settings that make no lists from them."""


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
        TrecError: with file and line, what was found and what is allowed.
    """
    for place, number, fields in _fields(path, 6, "qid Q0 docid rank score tag"):
        try:
            rank, score = int(fields[3]), float(fields[4])
        except ValueError as error:
            raise TrecError(f"{place}: {error}; allowed are a whole number as rank and a number as score") from error
        if math.isnan(score) or abs(rank) >= 1 << 63:
            raise TrecError(f"{place}: found rank {fields[3]}, score {fields[4]}; correct the run")
        yield RunLine(number, fields[0], fields[2], rank, score)


def read_judgments(path: str | Path) -> Iterator[Judgment]:
    """Lines of a TREC judgment file, `qid 0 docid grade`, one at a time.

    Raises:
        TrecError: with file and line, what was found and what is allowed.
    """
    for place, number, fields in _fields(path, 4, "qid 0 docid grade"):
        try:
            grade = int(fields[3])
        except ValueError as error:
            raise TrecError(f"{place}: {error}; allowed is a whole number as grade") from error
        if abs(grade) >= 1 << 31:
            raise TrecError(f"{place}: found grade {fields[3]}; correct the judgments")
        yield Judgment(number, fields[0], fields[2], grade)


def read_json_lines(path: str | Path, key: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Objects of a JSONL file of queries or documents: (line counted from 1, byte where it starts, object).

    Args:
        path: the file, not compressed.
        key: field that every object must have, as text that is not empty.
    Raises:
        TrecError: with file and line, what was found and what is allowed.
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
        raise TrecError(f"{path}: cannot be read: {error.strerror}; check path and rights") from error


def _fields(path: str | Path, num_fields: int, layout: str) -> Iterator[tuple[str, int, list[str]]]:
    path = Path(path)
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                fields = line.split()
                if fields and len(fields) != num_fields:
                    raise TrecError(
                        f"{path.name}:line {number}: found {len(fields)} fields in {line.strip()[:80]!r}, "
                        f"allowed are {num_fields}: {layout}; correct the line"
                    )
                if fields:
                    yield f"{path.name}:line {number}", number, fields
    except OSError as error:
        raise TrecError(f"{path}: cannot be read: {error.strerror}; check path and rights") from error
    except UnicodeDecodeError as error:
        raise TrecError(f"{path.name}: after line {number}: {error}; write the file as UTF-8") from error


def _json_object(line: bytes, place: str, key: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TrecError(
            f"{place}: is no valid JSON: {error}; the file holds one object a line, not compressed"
        ) from error
    if not isinstance(value, dict) or not isinstance(value.get(key), str) or not value[key].strip():
        raise TrecError(
            f"{place}: found no text under {key!r} in {str(value)[:80]}; every line is an object that has it"
        )
    if not is_unicode(value[key]):
        raise TrecError(f"{place}: {key!r} holds half of a surrogate pair; write the text again")
    return value
