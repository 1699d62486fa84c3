"""Records by their place in a split, outside of training: from its shards, or from what they would be built from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankllm_composer.errors import ShardError
from rankllm_composer.options import SourceOptions
from rankllm_composer.shards.index import INDEX_NAME, Shard, parse_index, record_from_sample
from rankllm_composer.storage.object_store import Folder, open_folder

if TYPE_CHECKING:
    from rankllm_composer.prompts.record import Record
    from rankllm_composer.sources.conversations import RecordSource


class RecordLookupError(ValueError):
    """There is no such record, or nothing to look it up in."""


class SplitRecords:
    """The records of a split in the order they are stored.

    Args:
        sets: (local, remote) of each set of shards, in order; remote None = all of it is in `local`.
        source: read if there are no shards; None = only shards.
    Raises:
        RecordLookupError: no shards, and no source on this machine.
        ShardError, StoreError: an index is damaged or cannot be reached.
    """

    def __init__(self, sets: Sequence[tuple[str, str | None]], source: SourceOptions | None = None) -> None:
        found = [(Path(local), open_folder(remote or local)) for local, remote in sets]
        texts = [folder.read(INDEX_NAME) for _, folder in found]
        self._source: RecordSource | None = None
        self._shards: list[tuple[Path, Folder, Shard]] = []
        if all(text is not None for text in texts):
            for (local, folder), text in zip(found, texts):
                shards = parse_index(text or b"", f"{folder.name}/{INDEX_NAME}")
                self._shards += [(local, folder, shard) for shard in shards]
            self.place = ", ".join(folder.name for _, folder in found)
            return
        missing = ", ".join(folder.name for (_, folder), text in zip(found, texts) if text is None)
        if source is None:
            raise RecordLookupError(
                f"data.train: found no shards in {missing} and no source; build them with `rankllm-composer shards "
                "build`, or name data.train.source"
            )
        self._source = _open(source, missing)
        self._skips_bad = source.on_error == "quarantine"
        self.place = f"{source.input or source.run} (no shards in {missing} yet)"

    def __len__(self) -> int:
        """How many there are; of a source they are counted by reading it."""
        if self._source is not None:
            return sum(1 for _ in self)
        return sum(shard.num_samples for _, _, shard in self._shards)

    def __getitem__(self, number: int) -> Record:
        """Record `number`, counted from 0.

        Raises:
            RecordLookupError: there are fewer.
            RecordError, ShardError: it, or one before it in a source, is damaged.
        """
        skipped = 0
        if self._source is None and number >= 0:
            for place in self._shards:
                num_samples = place[2].num_samples
                if number < skipped + num_samples:
                    return next(_read_shard(*place, first=number - skipped))
                skipped += num_samples
        elif number >= 0:
            for record in islice(self, number, None):
                return record
        raise RecordLookupError(f"record: found {number}, allowed is 0 to {len(self) - 1} in {self.place}")

    def __iter__(self) -> Iterator[Record]:
        if self._source is None:
            for place in self._shards:
                yield from _read_shard(*place, first=0)
            return
        from rankllm_composer.errors import RecordError
        from rankllm_composer.prompts.record import Record

        with tempfile.TemporaryDirectory() as scratch:
            source = self._source.prepare(Path(scratch))
            for item in source.items():
                try:
                    records = source.records(item)
                except RecordError:
                    if not self._skips_bad:
                        raise
                    continue
                yield from (record for _, record in records if isinstance(record, Record))


def _open(source: SourceOptions, missing: str) -> RecordSource:
    from rankllm_composer.sources.conversations import open_records

    if source.input is not None and not Path(source.input).exists():
        raise RecordLookupError(
            f"data.train.source.input: found {source.input}, which is not on this machine, and no shards in {missing}; "
            "build them with `rankllm-composer shards build`, or name a local file (.json, .jsonl)"
        )
    return open_records(source)


def _read_shard(local: Path, folder: Folder, shard: Shard, *, first: int) -> Iterator[Record]:
    """Records of a shard from the sample `first` on; an unpacked file in `local` is taken before a download."""
    from streaming.base.compression import decompress
    from streaming.base.format import reader_from_json

    unpacked = local / shard.raw.basename
    if unpacked.exists():
        data = unpacked.read_bytes()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            data = folder.fetch(shard.published.basename, Path(scratch)).read_bytes()
        if shard.packed is not None:
            data = decompress(shard.compression, data)
    if len(data) != shard.raw.num_bytes:
        raise ShardError(
            f"{folder.name}/{shard.raw.basename}: has {len(data):,} bytes, the index says {shard.raw.num_bytes:,}; "
            "`rankllm-composer shards verify` says more"
        )
    reader: Any = reader_from_json("", None, shard.entry)
    bounds = np.frombuffer(data, np.uint32, shard.num_samples + 1, offset=4)
    for begin, end in zip(bounds[first:-1], bounds[first + 1 :]):
        yield record_from_sample(reader.decode_sample(data[begin:end]))
