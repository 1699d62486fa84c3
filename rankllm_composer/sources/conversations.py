"""Training records from one source: a file in any layout that holds records, or a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankllm_composer.errors import RecordError, SourceError
from rankllm_composer.options import FOR_PASSAGES, SourceOptions
from rankllm_composer.prompts.clients import CURRENT_CLIENT, ClientVersion
from rankllm_composer.prompts.record import Record, repair_answer, validate_record
from rankllm_composer.prompts.user_turn import clean_query
from rankllm_composer.sources.files import Row, parse_json, read_rows
from rankllm_composer.sources.layouts import layout_of
from rankllm_composer.sources.lists import NUMBERED, described_client, record_of_graded_list, record_of_ranked_list
from rankllm_composer.sources.ranked_records import RankedList, is_ranked_list
from rankllm_composer.sources.records import Item, Made, Noted, RecordSource, describe_file, of_query
from rankllm_composer.sources.training_layouts import FIRST, HISTORY, Conversation, is_graded_list, is_history

_FILE_ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet", ".tsv", ".txt", ".gz", ".zst")


def open_conversations(options: SourceOptions, client: ClientVersion = CURRENT_CLIENT) -> RecordSource:
    """Open the `input` of options: a file, or a folder or HF id of a data set to stream."""
    name = options.input or ""
    path = Path(name)
    if name and path.is_dir():
        return DatasetSource(options, client)
    if path.is_file():
        return FileSource(options, client)
    if not is_dataset_id(name):
        expected = "a file, a folder with a data set, or a HF data set id such as owner/name"
        raise RecordError(name, None, f"no such file or folder; expected {expected}. Correct the path.")
    return DatasetSource(options, client)


def is_dataset_id(name: str) -> bool:
    """Whether a name that is no file or folder can be the id of a data set on the hub."""
    is_path = name.lower().endswith(_FILE_ENDINGS) or name.startswith(("/", ".", "~")) or name.count("/") > 1
    return bool(name) and not is_path


@dataclass(frozen=True)
class FileSource:
    """Records of one file, in any container and layout."""

    options: SourceOptions
    client: ClientVersion = CURRENT_CLIENT

    @property
    def path(self) -> str:
        """The file, or the id of a data set."""
        assert self.options.input is not None
        return self.options.input

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def makes_lists(self) -> bool:
        """Whether the first record is a query with its passages, and not a conversation."""
        for row in self._rows():
            with suppress(SourceError):
                value = _value(row)
                return is_graded_list(value) or is_ranked_list(value)
        return False

    def prepare(self, folder: Path) -> RecordSource:
        return self

    def describe(self) -> dict[str, Any]:
        return {"kind": "conversations", "files": [describe_file(self.path)]} | self._changed_options()

    def items(self) -> Iterator[Item]:
        """Yield every record, undecoded where it is a line; the invocations of a history one by one."""
        index = 0
        for row in self._rows():
            for place, raw in _split_history(row):
                yield Item(index, place, raw, row.size)
                index += 1

    def records(self, item: Item) -> list[Made]:
        row = Row(item.place, item.index + 1, item.raw, item.num_bytes)
        try:
            row = row._replace(value=_value(row))
            layout = layout_of(row, "records")
            return [made for found in layout.readers["records"](row) for made in self._made(found, item.place)]
        except SourceError as error:
            named = row.value.get("id") if isinstance(row.value, Mapping) else None
            raise _as_record_error(error, item.place, named if isinstance(named, str) else None) from error

    def _made(self, found: Any, place: str) -> list[Made]:
        if isinstance(found, RankedList):
            return of_query(record_of_ranked_list(found, self.options, place, self.client), clean_query(found.query))
        if not isinstance(found, Conversation):
            return of_query(record_of_graded_list(found, self.options, place, self.client), clean_query(found.query))
        noted: list[Made] = [(place, Noted(NUMBERED))] if found.is_numbered else []
        return [*noted, *_record_from_layout(found.fields, place, self.options.answers == "lenient")]

    def _changed_options(self) -> dict[str, Any]:
        """Options that matter for what is read, where they are not the defaults, and the client."""
        options, defaults = self.options, SourceOptions(input=self.path)
        names = (*FOR_PASSAGES, "answers")
        changed = {name: found for name in names if (found := getattr(options, name)) != getattr(defaults, name)}
        changed |= described_client(options, self.client)  # of written prompts alone, but that would be known too late
        return {"options": changed} if changed else {}

    def _rows(self) -> Iterator[Row]:
        try:
            for index, row in enumerate(read_rows(self.path, parse=False)):
                file, _, place = row.place.rpartition(":")
                line = f"{file}:record {index} ({place})" if place.startswith("line") else row.place
                yield row._replace(place=line)
        except SourceError as error:
            raise _as_record_error(error, self.name) from error


@dataclass(frozen=True)
class DatasetSource(FileSource):
    """A data set that the `datasets` library streams: a HF id, or a folder."""

    @property
    def name(self) -> str:
        folder = Path(self.path)
        config = f":{self.options.config}" if self.options.config else ""
        return f"{folder.name if folder.is_dir() else self.path}{config}[{self.options.split}]"

    def describe(self) -> dict[str, Any]:
        folder = Path(self.path)
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        described = {"kind": "dataset", "name": self.name, "files": [describe_file(path) for path in files]}
        return described | self._changed_options()

    def _rows(self) -> Iterator[Row]:
        import datasets

        remedy = "Check the id, the split, the configuration (config) and HF_TOKEN; give a file by its path."
        options = self.options
        try:
            found = datasets.load_dataset(self.path, options.config, split=options.split, streaming=True)
            stream = iter(found)
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
            index += 1
            yield Row(place, index, dict(row), len(str(row)))


def _value(row: Row) -> Any:
    return parse_json(row.value, row.place) if isinstance(row.value, bytes) else row.value


def _split_history(row: Row) -> Iterator[tuple[str, Any]]:
    """The invocations of a history of a client, each as a row of its own, so that a bad one is refused alone."""
    value = row.value
    if isinstance(value, bytes) and f'"{HISTORY}"'.encode() in value:
        value = _value(row)
    if not is_history(value):
        yield row.place, row.value
        return
    for number, invocation in enumerate(value[HISTORY]):
        yield f"{row.place} invocation {number}", {**value, HISTORY: [invocation], FIRST: number}


def _as_record_error(error: SourceError, place: str, record_id: str | None = None) -> RecordError:
    text = str(error)
    if text.startswith(f"{place}: "):
        return RecordError(place, record_id, text.removeprefix(f"{place}: "))
    found, _, reason = text.partition(": ")
    return RecordError(found, record_id, reason)


def _record_from_layout(fields: Mapping[str, Any], place: str, lenient: bool) -> list[Made]:
    """Validated record of one entry of the published layout, and what was repaired in its answer."""
    record_id = fields.get("id")
    try:
        record = Record.from_conversations(fields)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"record {record_id!r}: ")
        raise RecordError(place, record_id if isinstance(record_id, str) else None, reason) from error
    record, repairs = repair_answer(record, lenient=lenient)
    try:
        turn = validate_record(record, place)
    except RecordError as error:
        if lenient or repair_answer(record, lenient=True)[0] is record:
            raise
        reason = f"{error.reason} (--answers lenient reads it as the inference client does.)"
        raise RecordError(error.place, error.record_id, reason) from error
    notes = [*repairs, *([SEVERAL_READINGS] if turn.has_several_readings else [])]
    return [*((place, Noted(what)) for what in notes), (place, record)]


SEVERAL_READINGS = (
    "prompts in the client's words with several readings, because a line in a passage opens like the next passage; "
    "kept, but never shuffled or renamed"
)
