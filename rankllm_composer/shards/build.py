"""Records → a set of MDS shards that streaming reads, on disk or in an object store, published whole or not at all.

A set is a folder: shard files, `build.json`, perhaps `quarantine.jsonl`, and `index.json`, which is written last.
"""

from __future__ import annotations

import os
import re
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rankllm_composer.errors import RecordError, ShardError
from rankllm_composer.prompts.permutations import IdentifierStyle
from rankllm_composer.shards.blocks import BlockWriter, cut_blocks, num_repeats, quarantine_line, write_blocks
from rankllm_composer.shards.index import (
    IDS_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    QUARANTINE_NAME,
    BuildReport,
    Manifest,
    Shard,
    Tally,
    digest,
    dump_index,
    parse_index,
)
from rankllm_composer.shards.publish import (
    WORKING_INDEX_NAME,
    find_set,
    part_folder,
    publish,
    staging_folder,
    work_folder,
)
from rankllm_composer.sources.conversations import RecordSource, open_source
from rankllm_composer.sources.trec import TrecSource
from rankllm_composer.storage.object_store import LocalFolder, open_folder

OnError = Literal["stop", "quarantine"]


DEFAULT_SHARD_BYTES = 16 << 20


_PROGRESS_SECONDS = 5.0


# Worker processes take seconds to import streaming; in that time one process writes about this many blocks.
_NUM_BLOCKS_ALONE = 8


def index_exists(target: str | Path) -> bool:
    """True if a set of shards has been published there: it has an index.

    Raises:
        StoreError: the object store cannot be reached.
    """
    return open_folder(target).read(INDEX_NAME) is not None


def build_shards(
    output: str | Path,
    *,
    input: str | Path | None = None,
    split: str = "train",
    run: str | None = None,
    judgments: str | None = None,
    teacher_run: str | None = None,
    queries: str | None = None,
    docs: str | None = None,
    window: int = 20,
    stride: int = 10,
    lists_per_query: int = 1,
    depth: int = 100,
    max_passage_words: int | None = None,
    identifiers: IdentifierStyle = "letters",
    seed: int = 42,
    require_relevant: bool | None = None,
    on_error: OnError = "stop",
    part: str | None = None,
    num_processes: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    compression: str | None = "zstd",
    hashes: Sequence[str] = ("xxh64",),
    overwrite: bool = False,
    staging: str | Path | None = None,
    report: Callable[[str], None] = print,
) -> BuildReport:
    """Build a set of shards from training records (`input`), or from retrieval files (`run`, `queries`, `docs`, …).

    Args:
        output: folder or object-store URL of the set.
        input, split: see `records.open_source`.
        run … require_relevant: see `trec.TrecSource`.
        on_error … report: see `build_from`.
    Returns:
        BuildReport.
    Raises:
        ShardError, RecordError, SourceError, StoreError (all ValueError): what stands in the way and what to do.
    """
    if (input is None) == (run is None):
        found = "neither" if input is None else "both"
        raise ShardError(f"input: found {found} of records (input) and a first-stage run (run); give one of them")
    if input is not None:
        strange = {"judgments": judgments, "teacher_run": teacher_run, "queries": queries, "docs": docs}
        given = [name for name, value in strange.items() if value is not None]
        if given:
            raise ShardError(
                f"input: {', '.join(given)} have no effect on records that are given whole; leave them out"
            )
        source: RecordSource = open_source(input, split=split)
    elif run is None or queries is None or docs is None:
        raise ShardError("run: found without queries or docs; lists are made from all three")
    else:
        source = TrecSource(
            run=run,
            queries=queries,
            docs=docs,
            judgments=judgments,
            teacher_run=teacher_run,
            window=window,
            stride=stride,
            lists_per_query=lists_per_query,
            depth=depth,
            max_passage_words=max_passage_words,
            identifiers=identifiers,
            seed=seed,
            require_relevant=require_relevant,
        )
    return build_from(
        source,
        output,
        on_error=on_error,
        part=part,
        num_processes=num_processes,
        shard_bytes=shard_bytes,
        compression=compression,
        hashes=hashes,
        overwrite=overwrite,
        staging=staging,
        report=report,
    )


def build_from(
    source: RecordSource,
    output: str | Path,
    *,
    on_error: OnError = "stop",
    part: str | None = None,
    num_processes: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    compression: str | None = "zstd",
    hashes: Sequence[str] = ("xxh64",),
    overwrite: bool = False,
    staging: str | Path | None = None,
    report: Callable[[str], None] = print,
) -> BuildReport:
    """Build a set of shards from a source of records, or part I of N of it below `output`.

    The set is the same to the byte whatever the number of processes. Run again with the same arguments, a finished
    build does nothing, a killed one starts anew, and an interrupted upload goes on.

    Args:
        source: where the records come from.
        output: folder or object-store URL of the set.
        on_error: "stop" at the first bad record, or "quarantine": write bad records to `quarantine.jsonl`.
        part: "I/N" builds every N-th record, from the I-th on, into `output/part-I-of-N`; `merge_shards` joins parts.
        num_processes: processes that parse, validate and compress; None = one for each CPU this process may use, once
            a source proves large enough to be worth their start.
        shard_bytes: about how large a shard is before compression.
        compression: streaming's name of it (`zstd`, `zstd:7`, `gz`, …); None = none.
        hashes: streaming's names of the hashes that the index holds (`xxh64`, `sha1`, …), at least one.
        overwrite: replace a set that was built from something else.
        staging: folder where a set for an object store is built first; None = one in the temporary folder, named for
            the output, removed after the upload.
        report: takes a line of progress.
    Returns:
        BuildReport.
    Raises:
        ShardError, RecordError, SourceError, StoreError (all ValueError): what stands in the way and what to do.
    """
    started = time.monotonic()
    index, num_parts = _parse_part(part)
    if on_error not in ("stop", "quarantine"):
        raise ShardError(f"on_error: found {on_error!r}, allowed are stop, quarantine")
    if not 1 <= shard_bytes < 1 << 30:
        raise ShardError(f"shard_bytes: found {shard_bytes}, allowed is 1 to {(1 << 30) - 1}")
    if num_processes is not None and num_processes < 1:
        raise ShardError(f"num_processes: found {num_processes}, allowed is 1 or more, or none for all CPUs")
    if not hashes:
        raise ShardError("hashes: found none, allowed is at least one, e.g. xxh64; shards are named and checked by it")
    options = {"on_error": on_error, "shard_bytes": shard_bytes, "compression": compression, "hashes": sorted(hashes)}
    planned = Manifest(source.describe(), options, None if part is None else f"{index}/{num_parts}")
    folder = open_folder(output) if part is None else open_folder(output, part_folder(index, num_parts))
    there = find_set(folder, planned, overwrite)
    if there is not None:
        report(f"{folder.name}: the same set is there already")
        return BuildReport.of(folder.name, *there, time.monotonic() - started, was_there=True)

    def build(target: LocalFolder) -> tuple[tuple[Shard, ...], Tally]:
        with work_folder(target.path) as work:
            writer = BlockWriter(source.prepare(work), work, compression, tuple(sorted(hashes)), on_error == "stop")
            names, shards, tally = _write_set(writer, planned, (index, num_parts), num_processes, report)
            publish(work, names, target, report)
        return shards, tally

    try:
        if isinstance(folder, LocalFolder):
            shards, tally = build(folder)
        else:
            with staging_folder(staging, folder.name) as stage:
                local = LocalFolder(stage / "set")
                shards, tally = find_set(local, planned, overwrite=True) or build(local)
                publish(local.path, list(local.files()), folder, report)
    except OSError as error:
        raise ShardError(f"{folder.name}: cannot be written: {error}; free space or choose another output") from error
    return BuildReport.of(folder.name, shards, tally, time.monotonic() - started)


def _parse_part(part: str | None) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part or "1/1")
    if match is None or int(match[1]) > int(match[2]):
        raise ShardError(f"part: found {part!r}, allowed is I/N with I from 1 to N, e.g. 1/4")
    return int(match[1]), int(match[2])


def _write_set(
    writer: BlockWriter,
    planned: Manifest,
    part: tuple[int, int],
    num_processes: int | None,
    report: Callable[[str], None],
) -> tuple[list[str], tuple[Shard, ...], Tally]:
    """All files of a set in the writer's folder, the index under its working name; returns their names."""
    started = reported = time.monotonic()
    tally, id_hashes = Tally(), array("Q")
    entries: list[dict[str, Any]] = []
    folder, name = writer.folder, writer.source.name
    blocks = cut_blocks(writer.source.items(), part=part, block_bytes=planned.options["shard_bytes"])
    with (folder / QUARANTINE_NAME).open("w", encoding="utf-8") as quarantine:
        count, num_alone = num_processes or len(os.sched_getaffinity(0)), 1 if num_processes else _NUM_BLOCKS_ALONE
        for written in write_blocks(blocks, writer, count, num_alone):
            if written.refused and writer.stop_at_bad:
                error = written.refused[0][0]
                reason = f"{error.reason} (or build with --on-error quarantine, which goes on without it)"
                raise RecordError(error.place, error.record_id, reason)
            quarantine.writelines(quarantine_line(error, raw) for error, raw in written.refused)
            if written.entry is not None:
                entries.append(written.entry)
            tally.add(written.tally)
            id_hashes.extend(written.id_hashes)
            if time.monotonic() - reported >= _PROGRESS_SECONDS:
                reported = time.monotonic()
                speed = tally.num_records / (reported - started)
                report(f"{name}: {tally.num_records:,} records, {len(entries):,} shards, {speed:,.0f} records/s")
    tally.num_duplicates = num_repeats(id_hashes)
    if not entries and planned.part is None:
        counts = {"bad": tally.num_quarantined, **tally.dropped}
        told = ", ".join(f"{number:,} {what}" for what, number in counts.items())
        raise ShardError(f"{name}: no record is left to build from ({told}); check that it is the right source")
    text = dump_index(entries)
    names = [(entry["zip_data"] or entry["raw_data"])["basename"] for entry in entries] + [MANIFEST_NAME]
    (folder / MANIFEST_NAME).write_text(replace(planned, tally=tally, index_sha256=digest(text)).to_text(), "utf-8")
    (folder / WORKING_INDEX_NAME).write_text(text, encoding="utf-8")
    if tally.num_quarantined:
        names.append(QUARANTINE_NAME)
    if planned.part is not None:
        (folder / IDS_NAME).write_bytes(id_hashes.tobytes())
        names.append(IDS_NAME)
    speed = tally.num_records / (time.monotonic() - started)
    report(f"{name}: {tally.num_records:,} records in {len(entries):,} shards, {speed:,.0f} records/s")
    for number, what in (
        (tally.num_quarantined, f"bad records, written to {QUARANTINE_NAME}"),
        (tally.num_duplicates, "records whose id came before; they are kept (shards verify --records names them)"),
        (
            tally.num_other_wordings,
            "prompts in another wording than the client's; they train as they stand, the client will ask otherwise",
        ),
        *((number, f"dropped: {reason}") for reason, number in sorted(tally.dropped.items())),
    ):
        if number:
            report(f"{name}: {number:,} {what}")
    return names, parse_index(text, INDEX_NAME), tally
