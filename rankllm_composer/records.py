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
from typing import Any, BinaryIO, NamedTuple, Protocol

from rankllm_composer.json_array import JsonArrayError, iterate_array
from rankllm_composer.permutations import PermutationError, parse_permutation
from rankllm_composer.prompts import PromptError, Record, UserTurn, read_user_turn

FILE_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
MAX_LINE_BYTES = 1 << 26
_UNREADABLE = "the file cannot be read on; write or fetch it again"


class RecordError(ValueError):
    """A record that cannot be trained on.

    Attributes:
        place: file (or data set) and index of the record, counted from 0: `train.json:record 17`.
        record_id: its id, None if it has none.
        reason: what was found, what is allowed, what to do.
    """

    def __init__(self, place: str, record_id: str | None, reason: str) -> None:
        super().__init__(place, record_id, reason)
        self.place, self.record_id, self.reason = place, record_id, reason

    def __str__(self) -> str:
        named = "" if self.record_id is None else f"id {self.record_id!r}: "
        return f"{self.place}: {named}{self.reason}"


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


def validate_record(record: Record, place: str = "record") -> UserTurn:
    """Check that a record is one list of 2 or more passages under one query, with a complete order of them.

    The user turn may be worded otherwise than the client's: it is trained as it stands (see `read_user_turn`).

    Args:
        record: the record.
        place: where it comes from, for the error.
    Returns:
        The user turn taken apart: query, passages, identifier style.
    Raises:
        RecordError: what is wrong and what to do.
    """

    def bad(reason: str) -> RecordError:
        return RecordError(place, record.id if isinstance(record.id, str) else None, reason)

    texts = {"id": record.id, "system turn": record.system, "user turn": record.user, "response": record.response}
    if record.qid is not None:
        texts["qid"] = record.qid
    for what, text in texts.items():
        if not isinstance(text, str):
            raise bad(f"{what}: found {type(text).__name__}, allowed is text; correct the record")
        if not text.strip() and what not in ("system turn", "qid"):
            raise bad(f"{what}: found nothing, allowed is text; correct the record or leave it out")
        if not is_unicode(text):
            raise bad(f"{what}: found half of a surrogate pair, allowed is Unicode; write the text again")
    try:
        turn = read_user_turn(record.user)
    except PromptError as error:
        raise bad(str(error)) from error
    num_candidates = len(turn.passages)
    if num_candidates < 2:
        raise bad(f"user turn: found {num_candidates} passage, allowed are 2 or more; leave the record out")
    if not turn.query.strip():
        raise bad("user turn: the query is empty; correct the record or leave it out")
    try:
        parse_permutation(record.response, num_candidates, turn.style)
    except PermutationError as error:
        raise bad(str(error)) from error
    for what, values, kind in (("docids", record.docids, str), ("grades", record.grades, int)):
        if values is None:
            continue
        if len(values) != num_candidates:
            raise bad(f"{what}: found {len(values)} for {num_candidates} passages, allowed is one each; correct them")
        strange = [value for value in values if not isinstance(value, kind) or isinstance(value, bool)]
        if strange:
            raise bad(f"{what}: found {strange[0]!r}, allowed is {'text' if kind is str else 'whole numbers'}")
    for docid in record.docids or ():
        if not is_unicode(docid):
            raise bad("docids: found half of a surrogate pair, allowed is valid Unicode; correct them")
    return turn


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


def is_unicode(text: str) -> bool:
    """True if the text can be written as UTF-8; JSON can hold half of a surrogate pair, which cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
