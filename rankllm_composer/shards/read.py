"""Records by their position in a split, outside training: from its shards, or from the source they are built from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rankllm_composer.errors import ShardError
from rankllm_composer.options import SourceOptions
from rankllm_composer.prompts.record import Record
from rankllm_composer.shards.index import INDEX_NAME, Shard, parse_index, record_from_sample
from rankllm_composer.shards.prepared import find_difference
from rankllm_composer.shards.unpack import unpack
from rankllm_composer.sources.records import open_source, read_records
from rankllm_composer.storage.object_store import Folder, inside, open_folder
from rankllm_composer.storage.scratch import scratch_folder


class SplitRecords:
    """The records of a split in the order they are stored.

    Args:
        sets: (local, remote) of each set of shards, in order; remote None = all of it is in `local`.
        source: read if there are no shards; None = only shards.
        rebuild: read the source also if the shards were built from another one.
    Raises:
        ShardError: there are no shards, and no source on this machine; the shards were built from another source; or an
            index is damaged.
        StoreError: an object store cannot be reached.
    """

    def __init__(
        self, sets: Sequence[tuple[str, str | None]], source: SourceOptions | None = None, rebuild: bool = False
    ) -> None:
        folders = [(Path(local), open_folder(remote or local)) for local, remote in sets]
        texts = [folder.read(INDEX_NAME) for _, folder in folders]
        self._source = source
        self._shards: list[tuple[Path, Folder, Shard]] = []
        missing = ", ".join(folder.name for (_, folder), text in zip(folders, texts) if text is None)
        if not missing and source is not None:
            (local, remote), *_ = sets
            difference = find_difference(remote or local, source, local, "data.train")
            if difference is not None and not rebuild:
                raise difference
            missing = "" if difference is None else f"{folders[0][1].name} from this source"
        if not missing:
            self._source = None
            for (local, folder), text in zip(folders, texts):
                shards = parse_index(text or b"", f"{folder.name}/{INDEX_NAME}")
                self._shards += [(local, folder, shard) for shard in shards]
            self.place = ", ".join(folder.name for _, folder in folders)
            return
        if source is None:
            remedy = "Build them with rankllm-composer shards build, or set data.train.source."
            raise _AbsentError(f"data.train: there are no shards in {missing} and no source. {remedy}")
        if source.input is not None and not Path(source.input).exists():
            raise _AbsentError(
                f"data.train.source.input: {source.input} is not on this machine, and there are no shards in "
                f"{missing}. Build them with rankllm-composer shards build, or name a local file (.json, .jsonl)."
            )
        self._records = open_source(source)
        self.place = f"{source.input or source.run} (no shards in {missing} yet)"

    @property
    def has_shards(self) -> bool:
        """True if there are shards, False if the records are read from the source."""
        return self._source is None

    def __len__(self) -> int:
        """Number of records; those of a source are counted by reading it."""
        if self._source is not None:
            return sum(1 for _ in self)
        return sum(shard.num_samples for _, _, shard in self._shards)

    def __getitem__(self, number: int) -> Record:
        """Record `number`, counted from 0; raise ShardError if there are fewer."""
        skipped = 0
        if self._source is None and number >= 0:
            for local, folder, shard in self._shards:
                if number < skipped + shard.num_samples:
                    return next(_read_shard(local, folder, shard, first=number - skipped))
                skipped += shard.num_samples
        elif number >= 0:
            for record in islice(self, number, None):
                return record
        raise ShardError(f"record is {number}; expected 0 to {len(self) - 1} in {self.place}.")

    def __iter__(self) -> Iterator[Record]:
        if self._source is None:
            for local, folder, shard in self._shards:
                yield from _read_shard(local, folder, shard, first=0)
        else:
            skip_bad = self._source.on_error == "quarantine"
            yield from (record for _, record in read_records(self._records, skip_bad=skip_bad))


def find_split(
    sets: Sequence[tuple[str, str | None]], source: SourceOptions | None = None, rebuild: bool = False
) -> SplitRecords | None:
    """The records of a split, as `SplitRecords`; None if there are no shards, and no source on this machine."""
    try:
        return SplitRecords(sets, source, rebuild)
    except _AbsentError:
        return None


class _AbsentError(ShardError):
    """There is neither a set of shards nor a source on this machine."""


def _read_shard(local: Path, folder: Folder, shard: Shard, *, first: int) -> Iterator[Record]:
    """Records of a shard from sample `first` on; an uncompressed file in `local` is read instead of a download."""
    from streaming.base.format import reader_from_json

    unpacked = inside(local, shard.raw.basename)
    if unpacked.exists():
        data = unpacked.read_bytes()
    else:
        with scratch_folder() as scratch:
            data = folder.fetch(shard.published.basename, scratch).read_bytes()
        if shard.compression is not None:
            try:
                data = unpack(data, shard.compression, shard.raw.num_bytes)
            except ValueError as error:
                place = f"{folder.name}/{shard.published.basename}"
                raise ShardError(f"{place}: {error}. Run rankllm-composer shards verify for details.") from error
    if len(data) != shard.raw.num_bytes:
        raise ShardError(
            f"{folder.name}/{shard.raw.basename}: size is {len(data):,} bytes; expected {shard.raw.num_bytes:,}. "
            "Run rankllm-composer shards verify for details."
        )
    reader: Any = reader_from_json("", None, shard.entry)
    bounds = np.frombuffer(data, np.uint32, shard.num_samples + 1, offset=4)
    for begin, end in zip(bounds[first:-1], bounds[first + 1 :]):
        yield record_from_sample(reader.decode_sample(data[begin:end]))
