"""Blocks of records → shards, in one process or several.

One process reads the source and cuts it into blocks of about a shard each; any process turns a block into a shard.
The content and name of a shard depend only on the source, so a set is the same to the byte for any number of processes.
Only a few blocks are in memory at a time.
"""

from __future__ import annotations

import json
import signal
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rankllm_composer.errors import RecordError, ShardError
from rankllm_composer.processes import end_with_parent
from rankllm_composer.prompts.record import Record, id_digest
from rankllm_composer.shards.index import COLUMNS, sample_from_record
from rankllm_composer.shards.manifest import BuildStats
from rankllm_composer.sources.records import Dropped, Item, RecordSource

MAX_BLOCK_ITEMS = 1 << 14
Block = tuple[int, list[Item]]
"""Number, and consecutive items of a source (or of a part of it) that make one shard."""


@dataclass
class WrittenBlock:
    """Outcome of writing a block; `entry` is the index entry of its shard, None if no record was left."""

    entry: dict[str, Any] | None = None
    stats: BuildStats = field(default_factory=BuildStats)
    refused: list[tuple[RecordError, Any]] = field(default_factory=list)  # with the raw records
    id_hashes: array[int] = field(default_factory=lambda: array("Q"))


@dataclass(frozen=True)
class BlockWriter:
    """Writes blocks of one source as shard files in one folder; can be pickled."""

    source: RecordSource
    folder: Path
    compression: str | None
    hashes: tuple[str, ...]
    stop_at_bad: bool

    def write(self, block: Block) -> WrittenBlock:
        """Validate the records of a block and write its shard, named by its number and content.

        Different content never gets the same name, so a reader's cache of an earlier set cannot be mistaken for this
        one.
        """
        number, items = block
        written = WrittenBlock()
        records: list[Record] = []
        for item in items:
            try:
                found = self.source.records(item)
            except RecordError as error:
                written.refused.append((error, item.raw))
                if self.stop_at_bad:
                    return written
                continue
            for _, record in found:
                if isinstance(record, Record):
                    records.append(record)
                    written.stats.count_record(record)
                    written.id_hashes.frombytes(id_digest(record.id))
                elif isinstance(record, Dropped):
                    written.stats.dropped[record.reason] += 1
                else:
                    written.stats.noted[record.what] += 1
        written.stats.num_quarantined = len(written.refused)
        if records:
            written.entry = self._write_shard(number, records)
        return written

    def _write_shard(self, number: int, records: Iterable[Record]) -> dict[str, Any]:
        from streaming import MDSWriter

        scratch = self.folder / f"block.{number:05d}"
        try:
            out, hashes = str(scratch), list(self.hashes)
            writer = MDSWriter(columns=COLUMNS, out=out, compression=self.compression, hashes=hashes, size_limit=None)
        except ValueError as error:
            raise ShardError(
                f"compression is {self.compression!r} and hashes are {', '.join(self.hashes)}: {error} Expected zstd, "
                "gz, br, bz2 (each with an optional level, as in zstd:7), snappy or none, and hashes such as sha1, "
                "sha256, xxh64, xxh128."
            ) from error
        for record in records:
            writer.write(sample_from_record(record))
        # finish() would also write an index, and wait for an upload that does not happen.
        writer.flush_shard()
        writer.executor.shutdown(wait=True)
        entry: dict[str, Any] = writer.shards[0]
        published = entry["zip_data"] or entry["raw_data"]
        stem = f"shard.{number:05d}.{published['hashes'][self.hashes[0]][:16]}.mds"
        old_name = published["basename"]
        entry["raw_data"]["basename"] = stem
        if entry["zip_data"]:
            entry["zip_data"]["basename"] = f"{stem}{Path(old_name).suffix}"
        (scratch / old_name).replace(self.folder / published["basename"])
        scratch.rmdir()
        return entry


def cut_blocks(items: Iterable[Item], *, part: tuple[int, int], block_bytes: int) -> Iterator[Block]:
    """Cut the items of part (I, N), those with index mod N = I - 1, into blocks of about `block_bytes`."""
    index, num_parts = part
    number, size = 0, 0
    kept: list[Item] = []
    for item in items:
        if item.index % num_parts != index - 1:
            continue
        if kept and (size + item.num_bytes > block_bytes or len(kept) >= MAX_BLOCK_ITEMS):
            yield number, kept
            number, size, kept = number + 1, 0, []
        kept.append(item)
        size += item.num_bytes
    if kept:
        yield number, kept


def write_blocks(
    blocks: Iterable[Block], writer: BlockWriter, num_processes: int, num_alone: int = 1
) -> Iterator[WrittenBlock]:
    """Write blocks in `num_processes` processes (1 = this one), and yield the results in order.

    For at most `num_alone` blocks no processes are started; otherwise this process writes one less before it starts
    them.

    Raises:
        ShardError: a process was killed.
    """
    blocks = iter(blocks)
    if num_processes == 1:
        yield from map(writer.write, blocks)
        return
    yield from map(writer.write, islice(blocks, num_alone - 1))
    head = list(islice(blocks, 2))
    if len(head) < 2:
        yield from map(writer.write, head)
        return
    import multiprocessing

    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        pending: deque[Future[WrittenBlock]] = deque()
        for block in chain(head, blocks):
            pending.append(pool.submit(writer.write, block))
            if len(pending) > num_processes + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        remedy = "Rerun the same command with fewer processes or smaller shards."
        raise ShardError(f"a worker was killed, possibly by the OOM killer. {remedy}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def quarantine_line(error: RecordError, raw: Any) -> str:
    """A bad record as a line of `quarantine.jsonl`: its place, id, error and content."""
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raw = raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
    return json.dumps({"place": error.place, "id": error.record_id, "reason": error.reason, "record": raw}) + "\n"


def count_duplicates(id_hashes: array[int]) -> int:
    """Number of hashes that occurred before."""
    import numpy as np

    return len(id_hashes) - len(np.unique(np.frombuffer(id_hashes, dtype=np.uint64)))


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and exit when it exits; workers of a killed parent would wait forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
