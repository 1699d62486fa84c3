"""Records of a share of the queries, to evaluate on, and those of the others, to train on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankllm_composer.errors import RecordError
from rankllm_composer.prompts.record import Record, record_key
from rankllm_composer.sources.records import Item, Made, RecordSource


@dataclass(frozen=True)
class HeldOut:
    """One side of a source that is split by query; a `RecordSource`.

    The side of a record depends only on the text of its query, so all lists of a query are on one side, in any process
    and in a later build of a longer source.

    Args:
        source: the source.
        share: share of the queries that are held out, 0 to 1.
        is_held_out: which side: the held-out queries, or the others.
        skips_bad: leave bad records, whose query is not known, to the other side.
    """

    source: RecordSource
    share: float
    is_held_out: bool
    skips_bad: bool = False

    @property
    def name(self) -> str:
        return f"{self.source.name}{' (held out)' if self.is_held_out else ''}"

    @property
    def makes_lists(self) -> bool:
        return self.source.makes_lists

    def prepare(self, folder: Path) -> HeldOut:
        return replace(self, source=self.source.prepare(folder))

    def describe(self) -> dict[str, Any]:
        return self.source.describe() | {"hold_out": self.share, "is_held_out": self.is_held_out}

    def items(self) -> Iterator[Item]:
        """Yield the items of the source."""
        return self.source.items()

    def records(self, item: Item) -> list[Made]:
        """Return what the source makes of an item, less what belongs to the other side.

        A note without a query is on a record of the item; a query without a text counts among those to train on.
        """
        try:
            found = self.source.records(item)
        except RecordError:
            if self.skips_bad:
                return []
            raise
        queries = [made.turn.query if isinstance(made, Record) else made.query for _, made in found]
        known = next(filter(None, queries), None)
        return [made for made, query in zip(found, queries) if self._has(query or known)]

    def _has(self, query: str | None) -> bool:
        return (query is not None and is_held_out(query, self.share)) == self.is_held_out


def is_held_out(query: str, share: float) -> bool:
    """Whether a share of the queries that is held out contains this one, by its text in a prompt."""
    return record_key(" ".join(query.casefold().split())) / 2**63 < share
