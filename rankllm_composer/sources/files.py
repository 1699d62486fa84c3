"""Files of any container, by content and never by name: compressed or not, lines, JSON, Parquet, tagged blocks → rows.

A row is one entry of a file: an object (of JSON, Parquet, a table with named columns, a tagged block) or a line.
"""

from __future__ import annotations

import gzip
import html
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rankllm_composer.errors import SourceError, counted
from rankllm_composer.sources.json_array import JsonArrayError, iterate_array

MAX_LINE_BYTES = 1 << 26
_HEAD_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"
_KINDS_OF_BYTES = (
    (b"PK\x03\x04", "a zip archive"),
    (b"SQLite format 3", "an SQLite database"),
    (b"%PDF", "a PDF document"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"BZh", "compressed with bzip2"),
    (b"\xfd7zXZ", "compressed with xz"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
    (b"\x80", "a Python pickle"),
)
_BLOCK_START = re.compile(r"<(?:top|topic|doc|query)(?=[\s>])", re.IGNORECASE)
_TAG = re.compile(r"<(\w+)\b([^<>]*)>([^<]*)")
_ATTRIBUTE = re.compile(r"\b(\w{1,40})\s{0,9}=\s{0,9}[\"']([^\"']*)[\"']")
_TEXT = re.compile(r"<text>((?:[^<]|<(?!/?text\b))*)</text\s{0,9}>", re.IGNORECASE)
_LABEL = re.compile(r"\A(?:Number|Topic|Title|Description|Narrative)\s{0,9}:", re.IGNORECASE)

COLUMNS = frozenset(
    [
        "q0",
        "iter",
        "run",
        "id",
        "_id",
        "qid",
        "query_id",
        "query-id",
        "queryid",
        "topic_id",
        "docid",
        "doc_id",
        "doc-id",
        "pid",
        "passage_id",
        "corpus-id",
        "corpus_id",
        "docno",
        "text",
        "query",
        "title",
        "contents",
        "question",
        "url",
        "body",
        "passage",
        "score",
        "relevance",
        "grade",
        "label",
        "rank",
        "iteration",
        "tag",
        "run_id",
    ]
)
"""Names by which a first line is recognized as the names of the columns of a table."""


class Row(NamedTuple):
    """An entry of a file: its number counted from 1 (lines that are empty count), its content, and about its bytes."""

    place: str
    number: int
    value: Any
    size: int

    def error(self, reason: str) -> SourceError:
        """The error that this entry is wrong."""
        return SourceError(f"{self.place}: {reason}")


@dataclass(frozen=True)
class Container:
    """What a file is, seen from its first bytes: `lines` of JSON or text, `array`, `table`, `parquet` or `blocks`."""

    path: Path
    kind: str
    columns: tuple[str, ...] = ()


def open_binary(path: str | Path) -> BinaryIO:
    """Open a file for reading, decompressed if it is compressed with gzip or zstd."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic[:2] == b"\x1f\x8b":
            return gzip.open(path)  # type: ignore[return-value]
        if magic == b"\x28\xb5\x2f\xfd":
            import pyarrow

            return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> SourceError:
    """The error that a file cannot be opened or read."""
    return SourceError(f"{path}: the file cannot be read ({_reason(error)}). Check its path and permissions.")


def container_of(path: str | Path) -> Container:
    """Look into a file and find out what its rows are.

    Raises:
        SourceError: the file cannot be read, or it is of a kind that has no rows.
    """
    path = Path(path)
    try:
        with open_binary(path) as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, EOFError) as error:
        raise SourceError(f"{path.name}: {_damaged(error)}") from error
    if head.startswith(b"PAR1"):
        return Container(path, "parquet")
    for magic, what in _KINDS_OF_BYTES:
        if head.startswith(magic):
            raise SourceError(f"{path.name}: the file is {what}; expected text in UTF-8. Convert it.")
    if b"\0" in head:
        raise SourceError(f"{path.name}: the file is binary; expected text or Parquet. Convert it to JSON Lines.")
    text = head.removeprefix(_BOM).lstrip()
    if text[:1] == b"[" and text[1:].lstrip()[:1] in (b"{", b"[", b'"', b"]", b""):
        return Container(path, "array")
    if text[:1] == b"{":
        first, _, rest = text.partition(b"\n")
        whole = first.strip() == b"{" and rest.lstrip()[:1] == b'"'  # one object over many lines
        return Container(path, "object" if whole else "json")
    if text[:1] == b"<":
        return Container(path, "blocks")
    columns = tuple(text.split(b"\n", 1)[0].decode("utf-8", "replace").strip().split("\t"))
    if len(columns) > 1 and all(name.strip().lower() in COLUMNS for name in columns):
        return Container(path, "table", tuple(name.strip().lower() for name in columns))
    return Container(path, "text")


def read_rows(path: str | Path, *, parse: bool = True) -> Iterator[Row]:
    """Yield the rows of a file; empty lines are skipped.

    Args:
        parse: whether to decode the JSON of lines; without it their rows hold bytes, for `parse_json`.
    Raises:
        SourceError: the file cannot be read, or a row cannot be decoded; names the row.
    """
    container = container_of(path)
    name = container.path.name
    if container.kind == "parquet":
        yield from _parquet_rows(container.path)
    elif container.kind in ("array", "object"):
        yield from _array_rows(container)
    elif container.kind == "blocks":
        yield from _block_rows(container.path)
    else:
        for number, line in _lines(container.path):
            place = f"{name}:line {number}"
            if container.kind == "json":
                yield Row(place, number, parse_json(line, place) if parse else line, len(line))
                continue
            try:
                text = line.removeprefix(_BOM if number == 1 else b"").decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise SourceError(f"{place}: {error}. Write the file as UTF-8.") from error
            if container.kind == "text":
                yield Row(place, number, text, len(line))
            elif number > 1:
                cells = text.split("\t")
                if len(cells) != len(container.columns):
                    found = f"{text[:80]!r} has {counted(len(cells), 'column')}"
                    names = ", ".join(container.columns)
                    raise SourceError(
                        f"{place}: {found}; expected {len(container.columns)}: {names}. Correct the line."
                    )
                yield Row(place, number, dict(zip(container.columns, cells)), len(line))


def parse_json(line: bytes, place: str) -> Any:
    """Decode one line of JSON."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{place}: invalid JSON: {error}. Correct or remove the line.") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, with their numbers from 1."""
    number = 0
    try:
        with open_binary(path) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    limit = f"longer than {MAX_LINE_BYTES >> 20} MiB"
                    raise SourceError(f"{path.name}:line {number}: {limit}. Write one entry per line.")
                if line.strip():
                    yield number, line
    except (OSError, EOFError) as error:
        raise SourceError(f"{path.name}:after line {number}: {_damaged(error)}") from error


def _array_rows(container: Container) -> Iterator[Row]:
    """Elements of a JSON array; one object over many lines is a single row."""
    name, index = container.path.name, 0
    try:
        with io.TextIOWrapper(open_binary(container.path), encoding="utf-8-sig") as file:
            if container.kind == "object":
                yield Row(name, 1, json.load(file), 0)
                return
            for index, (value, size) in enumerate(iterate_array(file)):
                yield Row(f"{name}:record {index}", index + 1, value, size)
    except JsonArrayError as error:
        place = name if error.index is None else f"{name}:record {error.index}"
        raise SourceError(f"{place}: {error}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SourceError(f"{name}:after record {index}: {_damaged(error)}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name}: invalid JSON: {error}. Correct or refetch the file.") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=256):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{path.name}:record {number - 1}", number, value, batch.nbytes // max(1, batch.num_rows))
    except (OSError, pyarrow.ArrowException) as error:
        raise SourceError(f"{path.name}:after record {number}: {_damaged(error)}") from error


def _block_rows(path: Path) -> Iterator[Row]:
    """Tagged blocks, `<top>`, `<topic>`, `<query>` or `<DOC>`, as objects: tag in lower case → its first text."""
    kept: list[str] = []
    start, end = 0, re.compile("")
    for number, line in _lines(path):
        text = line.decode("utf-8", "replace")
        opened = None if kept else _BLOCK_START.search(text)
        if opened:
            text, start = text[opened.start() :], number
            end = re.compile(rf"</{opened[0][1:]}\s*>", re.IGNORECASE)
        if opened or kept:
            kept.append(text)
        if kept and end.search(text):
            block = "".join(kept)
            yield Row(f"{path.name}:line {start}", start, _block_fields(block), len(block))
            kept = []
    if kept:
        raise SourceError(f"{path.name}:line {start}: the block that starts here has no end. Fetch the file again.")
    if not start:
        raise SourceError(
            f"{path.name}: the file has tags but no block <top>, <topic> or <DOC>; expected TREC topics or documents, "
            "or another layout of docs/what-it-reads.md. Convert it to JSON Lines."
        )


def _block_fields(block: str) -> dict[str, str]:
    (_, attributes, _), *tags = _TAG.findall(block.replace("<![CDATA[", "").replace("]]>", ""))
    fields = {name.lower(): value for name, value in _ATTRIBUTE.findall(attributes)}
    for tag, _, text in tags:
        if cleaned := _plain(_LABEL.sub("", text.strip())):
            fields.setdefault(tag.lower(), cleaned)
    if "docno" in fields:  # a document: its text may hold further tags
        texts = _TEXT.findall(block) or re.split(r"</docno\s*>", block, maxsplit=1, flags=re.IGNORECASE)[1:]
        fields["text"] = _plain(" ".join(texts))
    return fields


def _plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^<>]*>", " ", text)).split())


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _damaged(error: Exception) -> str:
    return f"the file cannot be read from here on ({_reason(error)}). Write or fetch it again."
