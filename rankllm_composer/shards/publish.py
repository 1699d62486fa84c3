"""How a set of shards appears: built in a hidden folder, then shown whole, index last; at most one builder a set.

A build works in `.building` inside its output, so that showing a file is a rename on one disk. What a killed build
leaves there the next one removes. Locks belong to the process and end with it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankllm_composer.errors import ShardError
from rankllm_composer.shards.blocks import num_repeats
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
    parse_manifest,
)
from rankllm_composer.storage.locks import try_lock
from rankllm_composer.storage.object_store import Folder, LocalFolder, open_folder

WORKING_INDEX_NAME = "index.json.new"


_WORK_NAME = ".building"
_LOCK_NAME = ".lock"


_SHARD_FILE = re.compile(r"shard\.\d{5,}\.[0-9a-f]{1,16}\.mds(\.[a-z0-9]+)?")


def find_set(folder: Folder, planned: Manifest, overwrite: bool) -> tuple[tuple[Shard, ...], Tally] | None:
    """Shards and counts of the planned set if it is there and whole; None if it is to be built.

    Raises:
        ShardError: the folder holds another set, and `overwrite` does not say that it may go.
    """
    index_text = folder.read(INDEX_NAME)
    if index_text is None:
        return None
    manifest = _manifest(folder)
    if manifest is None or not manifest.is_of(planned):
        if overwrite:
            return None
        raise ShardError(
            f"{folder.name}: holds another set, of another source or built in another way; "
            "choose another output, or build with --overwrite"
        )
    if manifest.index_sha256 != digest(index_text):
        return None
    shards, files = parse_index(index_text, folder.name), folder.files() or {}
    stored = [(shard.published, files.get(shard.published.basename)) for shard in shards]
    whole = all(found is not None and found.num_bytes in (None, file.num_bytes) for file, found in stored)
    return (shards, manifest.tally) if whole else None


def _manifest(folder: Folder) -> Manifest | None:
    text = folder.read(MANIFEST_NAME)
    try:
        return None if text is None else parse_manifest(text, folder.name)
    except ShardError:
        return None


def publish(source: Path, names: Sequence[str], target: Folder, report: Callable[[str], None]) -> None:
    """Put the files of a set in place, its index last; then remove, on disk, shards that no index lists any more.

    Args:
        source: folder of the files; on one disk with a target on disk.
        names: the files, with or without an index.
        target: where the set appears.
        report: takes a line of progress.
    """
    target.put(source, [name for name in names if name != INDEX_NAME], report)
    if (source / WORKING_INDEX_NAME).exists():
        (source / WORKING_INDEX_NAME).replace(source / INDEX_NAME)
    target.put(source, [INDEX_NAME], report)
    if isinstance(target, LocalFolder):
        shards = parse_index((target.path / INDEX_NAME).read_bytes(), target.name)
        listed = {file.basename for shard in shards for file in (shard.raw, shard.packed) if file is not None}
        for path in target.path.iterdir():
            if _SHARD_FILE.fullmatch(path.name) and path.name not in listed:
                path.unlink()
        if QUARANTINE_NAME not in names:
            (target.path / QUARANTINE_NAME).unlink(missing_ok=True)


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """An empty hidden folder inside `output`, ours alone; removed at the end, however that comes.

    Raises:
        ShardError: another process builds this set.
    """
    existed = output.exists()
    work = output / _WORK_NAME
    work.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(work, output):
            for path in work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != _LOCK_NAME:
                    path.unlink()
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        if not existed:
            with suppress(OSError):  # it holds a set now
                output.rmdir()


@contextmanager
def staging_folder(parent: str | Path | None, name: str) -> Iterator[Path]:
    """A private folder for the set that goes to the URL `name`; removed at the end, kept after an error.

    Raises:
        ShardError: another process uses it, or it belongs to somebody else.
    """
    key = hashlib.sha256(name.encode("utf-8")).hexdigest()[:16]
    path = Path(parent or tempfile.gettempdir()) / f"rankllm-composer-{os.getuid()}-{key}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ShardError(f"{path}: belongs to somebody else; choose another folder with --staging")
    with _lock(path, name):
        yield path
        shutil.rmtree(path)


@contextmanager
def _lock(folder: Path, what: str | Path) -> Iterator[None]:
    try:
        lock = try_lock(folder / _LOCK_NAME)
    except FileNotFoundError:  # another builder finished and removed the folder
        lock = None
    if lock is None:
        raise ShardError(f"{what}: another process builds this set; wait for it, or choose another output")
    with lock:
        yield


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
    folder.write(MANIFEST_NAME, merged.to_text())
    folder.write(INDEX_NAME, text)
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
