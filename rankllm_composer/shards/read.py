"""Records by their position in a split, outside training: from its shards, or from the source they are built from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rankllm_composer.errors import ShardError
from rankllm_composer.options import IRDS, SourceOptions
from rankllm_composer.prompts.clients import CURRENT_CLIENT, ClientVersion
from rankllm_composer.prompts.record import Record
from rankllm_composer.shards.index import INDEX_NAME, Shard, ShardFile, record_from_sample
from rankllm_composer.shards.manifest import read_set
from rankllm_composer.shards.prepared import find_difference
from rankllm_composer.shards.unpack import difference, unpack
from rankllm_composer.sources.conversations import is_dataset_id
from rankllm_composer.sources.records import open_source, read_records
from rankllm_composer.storage.object_store import Folder, LocalFolder, inside, open_folder
from rankllm_composer.storage.scratch import scratch_folder


class SplitRecords:
    """The records of a split in the order they are stored.

    Args:
        sets: (local, remote) of each set of shards, in order; remote None = all of it is in `local`.
        source: read if there are no shards; None = only shards.
        rebuild: read the source also if the shards were built from another one.
        client: version of the inference client whose prompts the records should have.
        fetch: called with the id of a data set that is not on this machine, before its records are streamed from the
            hub; None = they are not.
    Raises:
        ShardError: there are no shards, and no source on this machine; the shards were built from another source; or an
            index is damaged.
        StoreError: an object store cannot be reached.
    """

    def __init__(
        self,
        sets: Sequence[tuple[str, str | None]],
        source: SourceOptions | None = None,
        rebuild: bool = False,
        client: ClientVersion = CURRENT_CLIENT,
        fetch: Callable[[str], object] | None = None,
    ) -> None:
        folders = [(Path(local), open_folder(remote or local)) for local, remote in sets]
        texts = [folder.read(INDEX_NAME) for _, folder in folders]
        self._source = source
        self._shards: list[tuple[Path, Folder, Shard]] = []
        missing = ", ".join(folder.name for (_, folder), text in zip(folders, texts) if text is None)
        if not missing and source is not None:
            cache, remote = sets[0]
            difference = find_difference(remote or cache, source, cache, "data.train", client)
            if difference is not None and not rebuild:
                raise difference
            missing = "" if difference is None else f"{folders[0][1].name} from this source"
        if not missing:
            self._source = None
            for local, folder in folders:
                self._shards += [(local, folder, shard) for shard in read_set(folder)[0]]
            self.place = ", ".join(folder.name for _, folder in folders)
            return
        if source is None:
            remedy = "Build them with rankllm-composer shards build, or set data.train.source."
            raise _AbsentError(f"data.train: there are no shards in {missing} and no source. {remedy}")
        key, name = ("run", source.run or "") if source.input is None else ("input", source.input)
        is_absent = not name.startswith(IRDS) and not Path(name).exists()
        if is_absent and key == "input" and is_dataset_id(name) and fetch:
            fetch(name)
        elif is_absent:
            raise _AbsentError(
                f"data.train.source.{key}: {name} is not on this machine, and there are no shards in {missing}. "
                "Build them with rankllm-composer shards build where it is, or name a file that is here."
            )
        self._records = open_source(source, client)
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
    sets: Sequence[tuple[str, str | None]],
    source: SourceOptions | None = None,
    rebuild: bool = False,
    client: ClientVersion = CURRENT_CLIENT,
) -> SplitRecords | None:
    """The records of a split, as `SplitRecords`; None if there are no shards, and no source on this machine."""
    try:
        return SplitRecords(sets, source, rebuild, client)
    except _AbsentError:
        return None


class _AbsentError(ShardError):
    """There is neither a set of shards nor a source on this machine."""


def _read_shard(local: Path, folder: Folder, shard: Shard, *, first: int) -> Iterator[Record]:
    """Records of a shard from sample `first` on; an uncompressed file in `local` is read instead of a download."""
    from streaming.base.format import reader_from_json

    def refuse(file: ShardFile, problem: object) -> ShardError:
        return ShardError(f"{folder.name}/{file.basename}: {problem}. Run rankllm-composer shards verify for details.")

    unpacked = inside(local, shard.raw.basename)
    if unpacked.exists():
        data = unpacked.read_bytes()
    else:
        data = _fetch(folder, shard.published)
        problem = difference(data, shard.published)
        if problem is not None:
            raise refuse(shard.published, problem)
        if shard.compression is not None:
            try:
                data = unpack(data, shard.compression, shard.raw.num_bytes)
            except ValueError as error:
                raise refuse(shard.published, error) from error
    found = int.from_bytes(data[:4], "little")
    problem = difference(data, shard.raw)
    if problem is None and found != shard.num_samples:
        problem = f"contains {found:,} lists; expected {shard.num_samples:,} by the index"
    if problem is not None:
        raise refuse(shard.raw, problem)
    reader: Any = reader_from_json("", None, shard.entry)
    bounds = np.frombuffer(data, np.uint32, shard.num_samples + 1, offset=4)
    for begin, end in zip(bounds[first:-1], bounds[first + 1 :]):
        yield record_from_sample(reader.decode_sample(data[begin:end]))


def _fetch(folder: Folder, file: ShardFile) -> bytes:
    """Content of a file; from a store, fetched a second time if it does not match the index."""
    with scratch_folder() as scratch:
        for is_last in (isinstance(folder, LocalFolder), True):
            path = folder.fetch(file.basename, scratch)
            if not path.exists():
                raise ShardError(f"{folder.name}/{file.basename}: is missing. Fetch or build it again.")
            data = path.read_bytes()
            if is_last or difference(data, file) is None:
                break
            path.unlink()
    return data
