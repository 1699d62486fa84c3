"""Parts of a set, built anywhere → one set: an index over all of them."""

from __future__ import annotations

import re
import tempfile
import time
from array import array
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankllm_composer.shard_blocks import num_repeats
from rankllm_composer.shard_index import INDEX_NAME, ShardError, dump_index, parse_index
from rankllm_composer.shard_manifest import (
    IDS_NAME,
    MANIFEST_NAME,
    BuildReport,
    Manifest,
    Tally,
    digest,
    parse_manifest,
)
from rankllm_composer.storage import Folder, LocalFolder, open_folder

_PART_FOLDER = re.compile(r"part-(\d+)-of-(\d+)(?=/)")


def part_folder(index: int, num_parts: int) -> str:
    """Name of the folder of part I of N."""
    return f"part-{index}-of-{num_parts}"


def merge_shards(output: str | Path, *, report: Callable[[str], None] = print) -> BuildReport:
    """Join the parts below `output` into one set, by an index over all of them; no shard is moved or read.

    Args:
        output: folder or object-store URL that the parts were built into.
        report: takes a line of progress.
    Returns:
        BuildReport of the whole set.
    Raises:
        ShardError: parts are missing, incomplete, or not of one source and one way of building; or `output` holds a
            set that was not merged from parts.
        StoreError: the object store cannot be reached.
    """
    started = time.monotonic()
    folder = open_folder(output)
    num_parts = _num_parts(folder)
    old = folder.read(MANIFEST_NAME)
    if old is not None and parse_manifest(old, f"{folder.name}/{MANIFEST_NAME}").num_parts == 0:
        raise ShardError(f"{folder.name}: holds a set of its own beside the parts; remove it, or the parts")
    files = folder.files() or {}
    entries: list[dict[str, Any]] = []
    tally, id_hashes = Tally(), array("Q")
    first: Manifest | None = None
    for index in range(1, num_parts + 1):
        name = part_folder(index, num_parts)
        where = f"{folder.name}/{name}"
        again = f"build it with --part {index}/{num_parts}, then merge again"
        texts = [folder.read(f"{name}/{file}") for file in (INDEX_NAME, MANIFEST_NAME, IDS_NAME)]
        index_text, manifest_text, ids = texts
        if index_text is None or manifest_text is None or ids is None:
            raise ShardError(f"{where}: this part is missing or not complete; {again}")
        manifest = parse_manifest(manifest_text, f"{where}/{MANIFEST_NAME}")
        if manifest.index_sha256 != digest(index_text) or len(ids) != 8 * manifest.tally.num_records:
            raise ShardError(f"{where}: its files are not of one build; {again}")
        first = first or manifest
        _check_alike(manifest, first, where)
        for shard in parse_index(index_text, f"{where}/{INDEX_NAME}"):
            stored = files.get(f"{name}/{shard.published.basename}")
            if stored is None or stored.num_bytes not in (None, shard.published.num_bytes):
                raise ShardError(f"{where}: {shard.published.basename} is missing or not whole; {again}")
            entries.append(_below(name, shard.entry))
        tally.add(manifest.tally)
        id_hashes.frombytes(ids)
    assert first is not None
    if not entries:
        raise ShardError(f"{folder.name}: the {num_parts} parts hold no record; check the source they were built from")
    tally.num_duplicates = num_repeats(id_hashes)
    text = dump_index(entries)
    merged = replace(first, part=None, num_parts=num_parts, tally=tally, index_sha256=digest(text))
    beside = folder.path if isinstance(folder, LocalFolder) else None
    with tempfile.TemporaryDirectory(dir=beside, prefix=".merging-") as scratch:
        (Path(scratch) / MANIFEST_NAME).write_text(merged.to_text(), encoding="utf-8")
        (Path(scratch) / INDEX_NAME).write_text(text, encoding="utf-8")
        for name in (MANIFEST_NAME, INDEX_NAME):
            folder.put(Path(scratch), [name], report)
    report(f"{folder.name}: {num_parts} parts, {tally.num_records:,} records in {len(entries):,} shards")
    return BuildReport.of(folder.name, parse_index(text, folder.name), tally, time.monotonic() - started)


def _num_parts(folder: Folder) -> int:
    files = folder.files()
    if files is None:
        raise ShardError(f"{folder.name}: this store lists no files; merge the parts on disk, then copy the set")
    found = sorted({match[0] for name in files if (match := _PART_FOLDER.match(name))})
    sizes = {int(name.rpartition("-")[2]) for name in found}
    if len(sizes) != 1:
        told = ", ".join(found) or "no part"
        raise ShardError(f"{folder.name}: found {told}, allowed are the parts of one build; build or remove parts")
    return sizes.pop()


def _check_alike(manifest: Manifest, first: Manifest, where: str) -> None:
    for what, here, there in (
        ("source", manifest.source, first.source),
        ("options", manifest.options, first.options),
        ("version", manifest.version, first.version),
    ):
        if here != there:
            raise ShardError(f"{where}: its {what} is {here}, that of part 1 is {there}; build all parts alike")


def _below(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    entry = deepcopy(entry)
    for file in (entry["raw_data"], entry["zip_data"]):
        if file is not None:
            file["basename"] = f"{name}/{file['basename']}"
    return entry
