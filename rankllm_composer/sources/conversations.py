"""Records in the published conversation layout: from JSON and JSON Lines files, or a Hugging Face data set."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rankllm_composer.errors import RecordError
from rankllm_composer.prompts.record import Record, validate_record
from rankllm_composer.sources.json_array import JsonArrayError, iterate_array
from rankllm_composer.sources.records import Dropped, Item, RecordSource, describe_file, unreadable_file

FILE_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
MAX_LINE_BYTES = 1 << 26


def open_conversations(source: str | Path, split: str = "train") -> RecordSource:
    """Open a file `.json` (one array) or `.jsonl`, either with `.gz`, or a folder or HF id of a data set to stream."""
    path, name = Path(source), str(source)
    endings = ", ".join(FILE_ENDINGS)
    if name and path.is_dir():
        return DatasetSource(name, split)
    if path.is_file():
        if name.endswith((".jsonl", ".jsonl.gz")):
            return JsonLinesSource(name)
        if name.endswith((".json", ".json.gz")):
            return JsonArraySource(name)
        raise RecordError(path.name, None, f"the file name must end in one of {endings}. Convert or rename the file.")
    if name.endswith(FILE_ENDINGS) or name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name:
        expected = f"a file ({endings}), a folder with a data set, or a HF data set id such as owner/name"
        raise RecordError(name, None, f"no such file or folder; expected {expected}. Correct the path.")
    return DatasetSource(name, split)


@dataclass(frozen=True)
class _ConversationSource:
    """The half that these sources share: raw record → validated Record."""

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
        raw = item.raw
        if isinstance(raw, bytes):
            try:
                raw = json.loads(raw.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                reason = f"invalid JSON: {error}. Correct or remove the line."
                raise RecordError(item.place, None, reason) from error
        return [(item.place, _record_from_layout(raw, item.place))]


class JsonLinesSource(_ConversationSource):
    """`.jsonl`: one record per line. Empty lines are skipped."""

    def items(self) -> Iterator[Item]:
        index = number = 0
        try:
            with _open_binary(self.path) as file:
                while line := file.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    place = f"{self.name}:record {index} (line {number})"
                    if len(line) > MAX_LINE_BYTES:
                        limit = MAX_LINE_BYTES >> 20
                        raise RecordError(place, None, f"longer than {limit} MiB. Write one record per line.")
                    if line.strip():
                        if index == 0 and line.lstrip().startswith(b"["):
                            reason = "the file holds an array. Name it .json, or write one record per line."
                            raise RecordError(place, None, reason)
                        yield Item(index, place, line, len(line))
                        index += 1
        except (OSError, EOFError) as error:
            raise _unreadable(f"{self.name}:record {index}", error) from error


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
            raise _unreadable(f"{self.name}:after record {index}", error) from error


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
        import datasets

        remedy = "Check the id, the split and HF_TOKEN; give a file by its path."
        try:
            stream = iter(datasets.load_dataset(self.path, split=self.split, streaming=True))
        except Exception as error:  # the library raises its own, its hub client's and builtin errors
            raise RecordError(self.name, None, f"cannot open the data set: {error}. {remedy}") from error
        index = 0
        while True:
            place = f"{self.name}:record {index}"
            try:
                row = next(stream, None)
            except Exception as error:  # as above: a broken file shows only when its first row is read
                raise RecordError(place, None, f"cannot read the data set: {error}. {remedy}") from error
            if row is None:
                return
            turns = row.get("conversations")
            if isinstance(turns, Mapping):  # the library may store a list of turns as one list per field
                row = {**row, "conversations": [dict(zip(turns, turn)) for turn in zip(*turns.values())]}
            yield Item(index, place, dict(row), len(str(row.get("conversations"))))
            index += 1


def _record_from_layout(raw: Any, place: str) -> Record:
    """Validated record of one parsed entry of the published layout."""
    if not isinstance(raw, Mapping):
        kind = type(raw).__name__
        raise RecordError(place, None, f"the record is {kind}; expected an object with 'id' and 'conversations'.")
    record_id = raw.get("id")
    try:
        record = Record.from_conversations(raw)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"record {record_id!r}: ")
        raise RecordError(place, record_id if isinstance(record_id, str) else None, reason) from error
    validate_record(record, place)
    return record


def _open_binary(path: str) -> BinaryIO:
    try:
        return gzip.open(path, "rb") if path.endswith(".gz") else Path(path).open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise unreadable_file(path, error) from error


def _unreadable(place: str, error: Exception) -> RecordError:
    return RecordError(place, None, f"the file cannot be read from here on: {error}. Write or fetch it again.")
