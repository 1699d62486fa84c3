"""Training records from outside: where they come from, read one by one in constant memory, and what makes one bad.

A source is read in two halves, so that several processes can share the work: `items()` finds where each record
starts and ends and is run once, by one process; `records(item)` parses and validates and is run by any.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TextIO

from rankllm_composer.errors import RecordError, SourceError
from rankllm_composer.options import SourceOptions
from rankllm_composer.prompts.record import Record, validate_record

MAX_ELEMENT_CHARS = 1 << 26


_CHUNK_CHARS = 1 << 20


# A value that the end of the buffer cuts off fails there, or at most one escape or literal before it.
_CUT_OFF_CHARS = 16


class JsonArrayError(SourceError):
    """A text that is no JSON array, or not to its end.

    Attributes:
        index: element at which it goes wrong, counted from 0; None outside the elements.
    """

    def __init__(self, index: int | None, reason: str) -> None:
        super().__init__(index, reason)
        self.index, self.reason = index, reason

    def __str__(self) -> str:
        return self.reason


def iterate_array(file: TextIO) -> Iterator[tuple[Any, int]]:
    """Elements of the one JSON array that `file` holds.

    Args:
        file: text, read from where it stands to its end.
    Yields:
        (element, its length in characters).
    Raises:
        JsonArrayError: what was found instead, what is allowed, what to do. OSError and UnicodeDecodeError of the file
            go through.
    """
    text = _SlidingText(file)
    if text.peek() != "[":
        found = repr(text.peek()) if text.peek() else "nothing"
        raise JsonArrayError(
            None,
            f"found {found} at the start, allowed in a .json file is one array of records; "
            "a file with one record a line is named .jsonl",
        )
    text.step()
    index = 0
    while index > 0 or text.peek() != "]":
        if text.peek() == "":
            raise JsonArrayError(index, "the file ends before the array does; it is cut off, fetch it again")
        yield text.decode(index)
        after = text.peek()
        if after == "]":
            break
        if after != ",":
            found = repr(after) if after else "the end of the file"
            raise JsonArrayError(
                index, f"found {found} after it, allowed is ',' or ']'; correct the file or fetch it again"
            )
        text.step()
        index += 1
    text.step()
    if text.peek():
        raise JsonArrayError(None, f"found {text.peek()!r} after the array; remove what follows it")


class _SlidingText:
    """The unread part of a file, as much of it as the value being decoded needs."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._buffer, self._position, self._at_end = "", 0, False
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Next character that is no white space; "" at the end of the file."""
        while True:
            while self._position < len(self._buffer):
                char = self._buffer[self._position]
                if char not in " \t\n\r":
                    return char
                self._position += 1
            if self._at_end:
                return ""
            self._refill(_CHUNK_CHARS)

    def step(self) -> None:
        """Pass over the character that `peek` showed."""
        self._position += 1

    def decode(self, index: int) -> tuple[Any, int]:
        """The value that starts here, and its length in characters."""
        while True:
            try:
                value, end = self._decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string")
                cut_off = cut_off or error.pos >= len(self._buffer) - _CUT_OFF_CHARS
                if self._at_end or not cut_off:
                    found = self._buffer[error.pos : error.pos + 40]
                    reason = f"no valid JSON: {error.msg} at {found!r}; correct the file or fetch it again"
                    raise JsonArrayError(index, reason) from error
            except (RecursionError, ValueError) as error:  # nested too deep, a number of thousands of digits
                raise JsonArrayError(index, f"cannot be decoded: {error}; correct the file") from error
            else:
                if end < len(self._buffer) - _CUT_OFF_CHARS or self._at_end:  # else a number may go on
                    num_chars, self._position = end - self._position, end
                    return value, num_chars
            num_pending = len(self._buffer) - self._position
            if num_pending > MAX_ELEMENT_CHARS:
                reason = (
                    f"does not end within {MAX_ELEMENT_CHARS >> 20} Mi characters; a quote is missing, correct the file"
                )
                raise JsonArrayError(index, reason)
            self._refill(max(_CHUNK_CHARS, num_pending))

    def _refill(self, num_chars: int) -> None:
        chunk = self._file.read(num_chars)
        self._at_end = not chunk
        self._buffer, self._position = self._buffer[self._position :] + chunk, 0


FILE_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


MAX_LINE_BYTES = 1 << 26


_UNREADABLE = "the file cannot be read on; write or fetch it again"


class Dropped(NamedTuple):
    """A list that a source leaves out by its own rules. `reason` is the name under which it is counted."""

    reason: str


@dataclass(frozen=True, slots=True)
class Item:
    """What one step of a source hands to whoever parses it.

    Attributes:
        index: 0-based place in the source.
        place: the same for people.
        raw: the unparsed record; can be pickled.
        num_bytes: about what its records will occupy, unpacked.
    """

    index: int
    place: str
    raw: Any
    num_bytes: int


class RecordSource(Protocol):
    """Where records come from. Sources can be pickled; `records` does not depend on the process it runs in."""

    @property
    def name(self) -> str:
        """The source for people: a file or data set name."""

    def prepare(self, folder: Path) -> RecordSource:
        """The source, ready to be read; what it leaves in `folder` must stay until all records are read."""

    def describe(self) -> dict[str, Any]:
        """What makes this source the same on another machine: names, sizes, hashes, options; no paths, no secrets."""

    def items(self) -> Iterator[Item]:
        """Every item in order. Raises ValueError where the source itself cannot be read on."""

    def records(self, item: Item) -> list[tuple[str, Record | Dropped]]:
        """Valid records of one item with their places. Raises RecordError, and then none of the item counts."""


def read_records(
    source: RecordSource | str | Path,
    *,
    split: str = "train",
    dropped: Counter[str] | None = None,
) -> Iterator[tuple[str, Record]]:
    """Valid records of a source, one at a time, in its order.

    Args:
        source: a source, or what `open_source` takes.
        split: split of a data set; has no meaning for files.
        dropped: counts what the source leaves out, by reason.
    Yields:
        (place, record), the place as in `train.json:record 17`.
    Raises:
        RecordError: a record is bad, or the file cannot be read on.
    """
    opened = open_source(source, split=split) if isinstance(source, (str, Path)) else source
    with tempfile.TemporaryDirectory() as folder:
        opened = opened.prepare(Path(folder))
        for item in opened.items():
            for place, record in opened.records(item):
                if isinstance(record, Record):
                    yield place, record
                elif dropped is not None:
                    dropped[record.reason] += 1


def open_records(options: SourceOptions) -> RecordSource:
    """Source of the records that these options describe: conversations (`input`), or retrieval files (`run`, …).

    Raises:
        SourceError: the options contradict each other.
        RecordError: `input` is no file or folder, or a file of another kind.
    """
    from rankllm_composer.sources.trec import TrecSource

    options.check()
    return TrecSource(options) if options.input is None else open_source(options.input, split=options.split)


def open_source(source: str | Path, *, split: str = "train") -> RecordSource:
    """Source of records in the published conversation layout.

    Args:
        source: a file `.json` (one array) or `.jsonl`, either with `.gz`; or a folder or HF id that
            `datasets.load_dataset` can stream.
        split: split of the data set; has no meaning for files.
    Raises:
        RecordError: no such file or folder, or a file of another kind.
    """
    path = Path(source)
    name = str(source)
    if name and path.is_dir():
        return DatasetSource(name, split)
    if path.is_file():
        if name.endswith((".jsonl", ".jsonl.gz")):
            return JsonLinesSource(name)
        if name.endswith((".json", ".json.gz")):
            return JsonArraySource(name)
        raise RecordError(path.name, None, f"found a file of another kind, allowed are {', '.join(FILE_ENDINGS)}")
    if name.endswith(FILE_ENDINGS) or name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name:
        raise RecordError(
            name,
            None,
            f"no such file or folder; allowed are files ({', '.join(FILE_ENDINGS)}), a folder that holds a data set, "
            "or a HF data set id such as owner/name; correct the path",
        )
    return DatasetSource(name, split)


@dataclass(frozen=True)
class _ConversationSource:
    """The half that all sources in the published layout share: raw record → valid Record."""

    path: str

    def items(self) -> Iterator[Item]:
        raise NotImplementedError

    @property
    def name(self) -> str:
        return Path(self.path).name

    def prepare(self, folder: Path) -> RecordSource:
        return self

    def describe(self) -> dict[str, Any]:
        return {"kind": "conversations", "files": [describe_file(self.path)]}

    def records(self, item: Item) -> list[tuple[str, Record | Dropped]]:
        raw = _decode_line(item.place, item.raw) if isinstance(item.raw, bytes) else item.raw
        return [(item.place, record_from_layout(raw, item.place))]


class JsonLinesSource(_ConversationSource):
    """`.jsonl`: a record a line. Empty lines are passed over."""

    def items(self) -> Iterator[Item]:
        index = 0
        try:
            with _open_binary(self.path) as file:
                number = 0
                while line := file.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    place = f"{self.name}:record {index} (line {number})"
                    if len(line) > MAX_LINE_BYTES:
                        reason = (
                            f"found a line of over {MAX_LINE_BYTES >> 20} MiB; a .jsonl file holds one record a line"
                        )
                        raise RecordError(place, None, reason)
                    if line.strip():
                        if index == 0 and line.lstrip().startswith(b"["):
                            reason = "found an array; name the file .json, or write one record a line"
                            raise RecordError(place, None, reason)
                        yield Item(index, place, line, len(line))
                        index += 1
        except (OSError, EOFError) as error:
            raise RecordError(f"{self.name}:record {index}", None, f"{error}; {_UNREADABLE}") from error


class JsonArraySource(_ConversationSource):
    """`.json`: one array of records."""

    def items(self) -> Iterator[Item]:
        index = 0
        try:
            with io.TextIOWrapper(_open_binary(self.path), encoding="utf-8-sig") as file:
                for index, (raw, num_chars) in enumerate(iterate_array(file)):
                    yield Item(index, f"{self.name}:record {index}", raw, num_chars)
        except JsonArrayError as error:
            place = self.name if error.index is None else f"{self.name}:record {error.index}"
            raise RecordError(place, None, str(error)) from error
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise RecordError(f"{self.name}:after record {index}", None, f"{error}; {_UNREADABLE}") from error


@dataclass(frozen=True)
class DatasetSource(_ConversationSource):
    """A data set that the `datasets` library streams: a HF id, or a folder."""

    split: str = "train"

    @property
    def name(self) -> str:
        return f"{Path(self.path).name if Path(self.path).is_dir() else self.path}[{self.split}]"

    def describe(self) -> dict[str, Any]:
        folder = Path(self.path)
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        return {"kind": "dataset", "name": self.name, "files": [describe_file(path) for path in files]}

    def items(self) -> Iterator[Item]:
        import datasets  # type: ignore[import-untyped]

        remedy = "check the id, the split and HF_TOKEN; a file is given by its path"
        try:
            stream = iter(datasets.load_dataset(self.path, split=self.split, streaming=True))
        except Exception as error:  # the library raises its own, its hub client's and plain errors here
            raise RecordError(self.name, None, f"the data set does not open: {error}; {remedy}") from error
        index = 0
        while True:
            place = f"{self.name}:record {index}"
            try:
                row = next(stream, None)
            except Exception as error:  # as above: a broken file shows only when its first row is read
                raise RecordError(place, None, f"the data set cannot be read on: {error}; {remedy}") from error
            if row is None:
                return
            turns = row.get("conversations")
            if isinstance(turns, Mapping):  # the library may keep a list of turns as one list a field
                row = {**row, "conversations": [dict(zip(turns, turn)) for turn in zip(*turns.values())]}
            yield Item(index, place, dict(row), len(str(row.get("conversations"))))
            index += 1


def record_from_layout(raw: Any, place: str) -> Record:
    """Valid Record of one parsed entry of the published layout.

    Raises:
        RecordError: the entry is no record of that layout, or a bad one.
    """
    if not isinstance(raw, Mapping):
        raise RecordError(
            place, None, f"found {type(raw).__name__}, allowed is an object with 'id' and 'conversations'; correct it"
        )
    record_id = raw.get("id")
    try:
        record = Record.from_conversations(raw)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"record {record_id!r}: ")
        raise RecordError(place, record_id if isinstance(record_id, str) else None, reason) from error
    validate_record(record, place)
    return record


def describe_file(path: str | Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file, which tell whether two machines read the same one.

    Raises:
        RecordError: the file cannot be read.
    """
    path = Path(path)
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                num_bytes += len(chunk)
    except OSError as error:
        raise RecordError(path.name, None, f"cannot be read: {error.strerror}; check the path and rights") from error
    return {"name": path.name, "bytes": num_bytes, "sha256": digest.hexdigest()}


def _decode_line(place: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RecordError(place, None, f"is no valid JSON: {error}; correct the line or leave it out") from error


def _open_binary(path: str) -> BinaryIO:
    try:
        return gzip.open(path, "rb") if path.endswith(".gz") else Path(path).open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise RecordError(Path(path).name, None, f"cannot be read: {error.strerror}; check path and rights") from error
