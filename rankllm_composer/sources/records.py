"""The interface of record sources, and the source that options describe.

A source is read in two halves, so that several processes can share the work: `items()` finds where each record starts
and ends, and runs once, in one process; `records(item)` parses and validates, and runs in any process.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rankllm_composer.errors import RecordError
from rankllm_composer.options import SourceOptions
from rankllm_composer.prompts.clients import CURRENT_CLIENT, ClientVersion
from rankllm_composer.prompts.record import Record
from rankllm_composer.screen import warn
from rankllm_composer.storage.scratch import scratch_folder


@dataclass(frozen=True, slots=True)
class Dropped:
    """A list that a source leaves out by its own rules; `reason` is the name it is counted under."""

    reason: str
    query: str | None = field(default=None, compare=False)  # its text in a prompt, where it is known


@dataclass(frozen=True, slots=True)
class Noted:
    """Something to know about a list or query that is kept; `what` is the name it is counted under."""

    what: str
    query: str | None = field(default=None, compare=False)


Made = tuple[str, "Record | Dropped | Noted"]
"""What a source makes of an item, with its place."""


def of_query(made: list[Made], query: str) -> list[Made]:
    """What was made of a query, with its text in a prompt wherever there is no record."""
    return [(place, one if isinstance(one, Record) else replace(one, query=query)) for place, one in made]


@dataclass(frozen=True, slots=True)
class Item:
    """One unparsed entry of a source: its 0-based index, its place in words, and about how large its records are."""

    index: int
    place: str
    raw: Any
    num_bytes: int


class RecordSource(Protocol):
    """A source of records. Sources can be pickled; `records` returns the same in any process."""

    @property
    def name(self) -> str:
        """Name of the file or data set, for messages."""

    def prepare(self, folder: Path) -> RecordSource:
        """Return the source, ready to be read; its files in `folder` must stay until all records are read."""

    def describe(self) -> dict[str, Any]:
        """Return what identifies the source on any machine: names, sizes, hashes, options; no paths, no secrets."""

    def items(self) -> Iterator[Item]:
        """Yield every item in order; raise RecordError or SourceError if the source itself cannot be read."""

    def records(self, item: Item) -> list[Made]:
        """Return the valid records of one item, each with its place; raise RecordError if one of them is bad."""

    @property
    def makes_lists(self) -> bool:
        """Whether the prompts are written by the source, so that the options `FROM_RUN` matter."""


def open_source(options: SourceOptions, client: ClientVersion = CURRENT_CLIENT) -> RecordSource:
    """Open the conversations (`input`) or the retrieval files (`run`, …) that options describe.

    Args:
        client: version of the inference client whose prompts are written where the source writes them.
    Raises:
        SourceError: the options contradict each other.
        RecordError: `input` is neither a file of a known kind, nor a folder, nor a data set id.
    """
    from rankllm_composer.sources.conversations import open_conversations
    from rankllm_composer.sources.trec import TrecSource

    options.check()
    if options.run is not None and options.step > options.window:
        warn(
            f"stride is {options.step} with a window of {options.window}: no list shows the "
            f"{options.step - options.window} candidates between two windows. Use at most {options.window}."
        )
    return TrecSource(options, client) if options.input is None else open_conversations(options, client)


def read_records(
    source: RecordSource, *, skip_bad: bool = False, dropped: Counter[str] | None = None
) -> Iterator[tuple[str, Record]]:
    """Valid records of a source in its order, each with a place such as `train.json:record 17`.

    Args:
        skip_bad: skip bad records instead of raising.
        dropped: counts the lists that the source leaves out, by reason.
    Raises:
        RecordError: a record is bad, or the source cannot be read.
    """
    with scratch_folder() as folder:
        prepared = source.prepare(folder)
        for item in prepared.items():
            try:
                records = prepared.records(item)
            except RecordError:
                if not skip_bad:
                    raise
                continue
            for place, record in records:
                if isinstance(record, Record):
                    yield place, record
                elif isinstance(record, Dropped) and dropped is not None:
                    dropped[record.reason] += 1


def describe_file(path: str | Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file, which identify it on any machine."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"name": path.name, "bytes": file.tell(), "sha256": digest}
    except OSError as error:
        raise unreadable_file(path, error) from error


def unreadable_file(path: str | Path, error: OSError) -> RecordError:
    """The error for a file of records that cannot be opened or read."""
    reason = f"the file cannot be read ({error.strerror}). Check its path and permissions."
    return RecordError(Path(path).name, None, reason)
