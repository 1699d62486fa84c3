"""Builds a set of MDS shards on disk or in an object store; it is published complete or not at all.

A set is a folder with shard files, `build.json`, possibly `quarantine.jsonl`, and `index.json`, which is written last.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rankllm_composer.errors import RecordError, ShardError, counted, counted_as, shell_line
from rankllm_composer.options import BuildOptions, SourceOptions
from rankllm_composer.screen import counting, doing, say
from rankllm_composer.shards.blocks import BlockWriter, count_duplicates, cut_blocks, quarantine_line, write_blocks
from rankllm_composer.shards.index import INDEX_NAME, Shard, dump_index, index_digest, parse_index
from rankllm_composer.shards.manifest import IDS_NAME, MANIFEST_NAME, QUARANTINE_NAME, BuildReport, BuildStats, Manifest
from rankllm_composer.shards.publish import (
    WORKING_INDEX_NAME,
    clear_leftovers,
    find_set,
    part_folder,
    publish,
    staging_folder,
    work_folder,
)
from rankllm_composer.sources.hold_out import HeldOut
from rankllm_composer.sources.records import RecordSource, open_source
from rankllm_composer.storage.object_store import LocalFolder, is_remote, open_folder

DEFAULTS = BuildOptions()

# Worker processes take seconds to import streaming; in that time one process writes about this many blocks.
_NUM_BLOCKS_ALONE = 8


def index_exists(target: str | Path) -> bool:
    """True if a complete set of shards is there, which is one with an index."""
    return open_folder(target).read(INDEX_NAME) is not None


def build_shards(
    output: str | Path, source: SourceOptions, options: BuildOptions = DEFAULTS, report: Callable[[str], None] = say
) -> BuildReport:
    """Build a set of shards from training records or from retrieval files; with `options.hold_out` two, split by query.

    Args:
        output: folder or object-store URL of the set.
        source: what the records are read or made from.
        options: how the set is written.
        report: called with each line of progress.
    Returns:
        The report of the training set.
    Raises:
        ShardError, RecordError, SourceError, StoreError: what stands in the way and what to do.
    """
    opened = open_source(source, options.client_version)
    if not options.hold_out:
        return build_from(opened, output, source.on_error, options, report)
    apart = HeldOut(opened, options.hold_out, True, skips_bad=source.on_error == "quarantine")
    build_from(apart, held_out(output), source.on_error, options, report)
    return build_from(HeldOut(opened, options.hold_out, False), output, source.on_error, options, report)


def held_out(output: str | Path) -> str:
    """Folder or URL of the held-out set beside a set."""
    return f"{str(output).rstrip('/')}-held-out"


def next_steps(output: str | Path, options: BuildOptions = DEFAULTS) -> str:
    """What to do with the sets that `build_shards` wrote: commands to paste, and keys of a recipe."""
    if options.part is not None:
        return f"once all parts are built: {shell_line('rankllm-composer', 'shards', 'merge', output)}"
    sets = {"train": str(output), **({"eval": held_out(output)} if options.hold_out else {})}
    place = "remote" if is_remote(output) else "local"
    lines = [f"check it: {shell_line('rankllm-composer', 'shards', 'verify', name)}" for name in sets.values()]
    keys = " and ".join(f"data.{split}.{place}={name}" for split, name in sets.items())
    return "\n".join([*lines, f"train on it: set {keys} in a recipe (rankllm-composer recipes list)"])


def build_from(
    source: RecordSource,
    output: str | Path,
    on_error: Literal["stop", "quarantine"] = "stop",
    options: BuildOptions = DEFAULTS,
    report: Callable[[str], None] = say,
) -> BuildReport:
    """Build a set of shards from a source of records, or part I of N of it below `output`.

    The set is the same to the byte for any number of processes. When rerun with the same arguments, a finished build
    does nothing, a killed one starts over, and an interrupted upload resumes. Part "I/N" builds every N-th record, from
    the I-th on, into `output/part-I-of-N`. Other arguments and errors are those of `build_shards`.
    """
    started = time.monotonic()
    index, num_parts = map(int, (options.part or "1/1").split("/"))
    if index > num_parts:
        raise ShardError(f"part is {options.part!r}; expected I/N with I from 1 to N, e.g. 1/4.")
    written = {
        "on_error": on_error,
        "shard_bytes": options.shard_bytes,
        "compression": options.compression,
        "hashes": sorted(options.hashes),
    }
    with doing("reading the source", is_short=True):
        planned = Manifest(source.describe(), written, options.part)
    folder = open_folder(output) if options.part is None else open_folder(output, part_folder(index, num_parts))
    existing = find_set(folder, planned, options.overwrite)
    if existing is not None:
        report(f"{folder.name}: the same set exists already")
        clear_leftovers(folder, options.staging)
        return BuildReport.of(folder.name, *existing, time.monotonic() - started, existed=True)

    def build(target: LocalFolder) -> tuple[tuple[Shard, ...], BuildStats]:
        with work_folder(target.path) as work:
            hashes = tuple(sorted(options.hashes))
            with doing("reading the source", is_short=True):
                prepared = source.prepare(work)
            writer = BlockWriter(prepared, work, options.compression, hashes, on_error == "stop")
            names, shards, stats = _write_set(writer, planned, (index, num_parts), options.num_processes, report)
            publish(work, names, target, report)
        return shards, stats

    try:
        if isinstance(folder, LocalFolder):
            shards, stats = build(folder)
        else:
            with staging_folder(options.staging, folder.name) as stage:
                local = LocalFolder(stage / "set")
                shards, stats = find_set(local, planned, overwrite=True) or build(local)
                with doing(f"uploading to {folder.name}"):
                    publish(local.path, list(local.files()), folder, report)
    except OSError as error:
        raise ShardError(f"{folder.name}: cannot be written: {error}. Free space or choose another output.") from error
    return BuildReport.of(folder.name, shards, stats, time.monotonic() - started)


def _write_set(
    writer: BlockWriter,
    planned: Manifest,
    part: tuple[int, int],
    num_processes: int | None,
    report: Callable[[str], None],
) -> tuple[list[str], tuple[Shard, ...], BuildStats]:
    """Write all files of a set to the writer's folder, the index under its working name; return their names."""
    started = time.monotonic()
    stats, id_hashes = BuildStats(), array("Q")
    entries: list[dict[str, Any]] = []
    folder, name = writer.folder, writer.source.name
    blocks = cut_blocks(writer.source.items(), part=part, block_bytes=planned.options["shard_bytes"])
    with (
        (folder / QUARANTINE_NAME).open("w", encoding="utf-8") as quarantine,
        counting(f"building from {name}", "records") as advance,
    ):
        count, num_alone = num_processes or len(os.sched_getaffinity(0)), 1 if num_processes else _NUM_BLOCKS_ALONE
        for written in write_blocks(blocks, writer, count, num_alone):
            if written.refused and writer.stop_at_bad:
                error = written.refused[0][0]
                reason = f"{error.reason} (--on-error quarantine skips bad records.)"
                raise RecordError(error.place, error.record_id, reason)
            quarantine.writelines(quarantine_line(error, raw) for error, raw in written.refused)
            if written.entry is not None:
                entries.append(written.entry)
            stats.add(written.stats)
            id_hashes.extend(written.id_hashes)
            advance(written.stats.num_records)
    stats.num_duplicates = count_duplicates(id_hashes)
    if not entries and planned.part is None:
        listed = ", ".join(
            [f"{stats.num_quarantined:,} bad", *(counted_as(number, what) for what, number in stats.dropped.items())]
        )
        raise ShardError(f"{name}: no record is left to build from ({listed}). Check that it is the right source.")
    text = dump_index(entries)
    names = [(entry["zip_data"] or entry["raw_data"])["basename"] for entry in entries] + [MANIFEST_NAME]
    manifest = replace(planned, stats=stats, index_sha256=index_digest(text))
    (folder / MANIFEST_NAME).write_text(manifest.to_text(), encoding="utf-8")
    (folder / WORKING_INDEX_NAME).write_text(text, encoding="utf-8")
    if stats.num_quarantined:
        names.append(QUARANTINE_NAME)
    if planned.part is not None:
        (folder / IDS_NAME).write_bytes(id_hashes.tobytes())
        names.append(IDS_NAME)
    speed = stats.num_records / (time.monotonic() - started)
    found = f"{counted(stats.num_records, 'record')} in {counted(len(entries), 'shard')}"
    report(f"{name}: {found}, {speed:,.0f} records/s")
    for number, noun, what in (
        (stats.num_quarantined, "bad record", f", written to {QUARANTINE_NAME}"),
        (stats.num_duplicates, "record", " with a duplicate id; kept (shards verify --records lists them)"),
        (
            stats.num_nonstandard_prompts,
            "nonstandard prompt",
            ", which the inference client would write differently; kept unchanged",
        ),
    ):
        if number:
            report(f"{name}: {counted(number, noun)}{what}")
    for counts, fate in ((stats.dropped, "left out: "), (stats.noted, "")):
        for what, number in sorted(counts.items()):
            report(f"{name}: {fate}{counted_as(number, what)}")
    return names, parse_index(text, INDEX_NAME), stats
