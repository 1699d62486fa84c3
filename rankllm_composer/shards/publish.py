"""Publishing a set of shards: built in a hidden folder, then moved into place, index last; one builder per set.

A build works in `.building` inside its output, so that publishing a file is a rename on one disk. The next build
removes whatever a killed one left there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankllm_composer.errors import ShardError, StoreError, counted
from rankllm_composer.screen import say
from rankllm_composer.shards.blocks import count_duplicates
from rankllm_composer.shards.index import INDEX_NAME, Shard, dump_index, index_digest, parse_index
from rankllm_composer.shards.manifest import (
    IDS_NAME,
    MANIFEST_NAME,
    QUARANTINE_NAME,
    BuildReport,
    BuildStats,
    Manifest,
    parse_manifest,
)
from rankllm_composer.storage.locks import try_lock
from rankllm_composer.storage.object_store import Folder, LocalFolder, StoredFile, open_folder
from rankllm_composer.storage.private_folder import private_folder

WORKING_INDEX_NAME = "index.json.new"
_WORK_NAME = ".building"
_LOCK_NAME = ".lock"
_SHARD_FILE = re.compile(r"shard\.\d{5,}\.[0-9a-f]{1,16}\.mds(\.[a-z0-9]+)?")
_PARTIAL_FILE = re.compile(r"\..+\.partial|index\.json\.(new|tmp)")
_UNPACKING = re.compile(r"shard\..+\.mds\.[0-9a-f]{16}")  # by a run that may be training now
_PART_FOLDER = re.compile(r"part-(\d+)-of-(\d+)(?=/)")


def find_set(folder: Folder, planned: Manifest, overwrite: bool) -> tuple[tuple[Shard, ...], BuildStats] | None:
    """Shards and counts of the planned set, None if it has to be built; raise ShardError if another is in its place."""
    index_text = folder.read(INDEX_NAME)
    if index_text is None:
        return None
    manifest = _manifest(folder)
    if manifest is None or not manifest.same_build(planned):
        if overwrite:
            return None
        found = "contains another set, built from another source or with other options"
        raise ShardError(f"{folder.name}: {found}. Choose another output, or build with --overwrite.")
    if manifest.index_sha256 != index_digest(index_text):
        return None
    shards, files = parse_index(index_text, folder.name), folder.files() or {}
    return (shards, manifest.stats) if all(_is_stored(shard, files) for shard in shards) else None


def _is_stored(shard: Shard, files: Mapping[str, StoredFile], prefix: str = "") -> bool:
    stored = files.get(f"{prefix}{shard.published.basename}")
    return stored is not None and stored.num_bytes in (None, shard.published.num_bytes)


def _manifest(folder: Folder) -> Manifest | None:
    text = folder.read(MANIFEST_NAME)
    try:
        return None if text is None else parse_manifest(text, folder.name)
    except ShardError:
        return None


def publish(source: Path, names: Sequence[str], target: Folder, report: Callable[[str], None]) -> None:
    """Move or upload the files of a set, its index last; then remove shards that the index does not list.

    In an object store, where another build may be uploading, these are only the shards of the set that was replaced.

    `source` is on the same file system as a target on disk; `names` are its files, with or without the index.
    """
    old = None if isinstance(target, LocalFolder) else target.read(INDEX_NAME)
    target.put(source, [name for name in names if name != INDEX_NAME], report)
    if (source / WORKING_INDEX_NAME).exists():
        (source / WORKING_INDEX_NAME).replace(source / INDEX_NAME)
    target.put(source, [INDEX_NAME], report)
    if isinstance(target, LocalFolder):
        for path in _leftovers(target):
            path.unlink()
        if QUARANTINE_NAME not in names:
            (target.path / QUARANTINE_NAME).unlink(missing_ok=True)
    elif old is not None:
        with suppress(ShardError):  # a damaged index
            replaced = {shard.published.basename for shard in parse_index(old, target.name)}
            _remove_replaced(target, sorted(replaced - set(names)), QUARANTINE_NAME in names, report)


def _remove_replaced(target: Folder, names: list[str], has_quarantine: bool, report: Callable[[str], None]) -> None:
    """Remove shards of the set that was replaced, and its refused records, or say that they are left."""
    if not names:
        return
    try:
        is_removed = target.remove(names if has_quarantine else [*names, QUARANTINE_NAME])
    except StoreError as error:
        report(f"{target.name}: {counted(len(names), 'shard')} of the set that was replaced may be left: {error}")
        return
    what = "removed" if is_removed else "this store cannot remove them here; left are"
    report(f"{target.name}: {what} {counted(len(names), 'shard')} of the set that was replaced, such as {names[0]}")


def _leftovers(target: LocalFolder) -> list[Path]:
    """Files in the folder of a complete set that no index lists: shards of an earlier set, partly written files."""
    shards = parse_index((target.path / INDEX_NAME).read_bytes(), target.name)
    listed = {file.basename for shard in shards for file in (shard.raw, shard.packed) if file is not None}
    found = [path for path in target.path.iterdir() if path.name not in listed]
    hour_ago = time.time() - 3600
    return [
        path
        for path in found
        if _PARTIAL_FILE.fullmatch(path.name)
        or (_UNPACKING.fullmatch(path.name) and path.stat().st_mtime < hour_ago)
        or (_SHARD_FILE.fullmatch(path.name) and not _UNPACKING.fullmatch(path.name))
    ]


def clear_leftovers(folder: Folder, staging: str | Path | None = None) -> None:
    """Remove what killed builds left beside a complete set, or in the staging folder of one in an object store.

    Nothing is done while another process builds the set, or where it cannot be written.
    """
    with suppress(ShardError, OSError):
        if not isinstance(folder, LocalFolder):
            if _staging_path(staging, folder.name).exists():
                with staging_folder(staging, folder.name):
                    pass
        elif (folder.path / _WORK_NAME).exists() or _leftovers(folder):
            with work_folder(folder.path):
                for path in _leftovers(folder):
                    path.unlink()


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """Create an empty, locked, hidden folder inside `output`, and remove it at the end."""
    existed = output.exists()
    work = output / _WORK_NAME
    if work.is_symlink():
        raise ShardError(f"{work} is a link; expected a folder of a build or nothing. Remove it.")
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
            with suppress(OSError):  # not empty: it contains a set now
                output.rmdir()


@contextmanager
def staging_folder(parent: str | Path | None, name: str) -> Iterator[Path]:
    """Create a private, locked folder for the set with the URL `name`; remove it at the end, keep it after an error."""
    path = _staging_path(parent, name)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ShardError(f"{path}: belongs to another user. Choose another folder with --staging.")
    with _lock(path, name):
        yield path
        shutil.rmtree(path)


def _staging_path(parent: str | Path | None, name: str) -> Path:
    key = hashlib.sha256(name.encode("utf-8")).hexdigest()[:16]
    return Path(parent or private_folder()) / f"rankllm-composer-{os.getuid()}-{key}"


@contextmanager
def _lock(folder: Path, what: str | Path) -> Iterator[None]:
    try:
        lock = try_lock(folder / _LOCK_NAME)
    except FileNotFoundError:  # another builder has just finished and removed the folder
        lock = None
    if lock is None:
        raise ShardError(f"{what}: another process builds this set. Wait for it, or choose another output.")
    with lock:
        yield


def part_folder(index: int, num_parts: int) -> str:
    """Name of the folder of part I of N."""
    return f"part-{index}-of-{num_parts}"


def merge_shards(output: str | Path, *, report: Callable[[str], None] = say) -> BuildReport:
    """Join the parts below `output` into one set, by an index over all of them; shards are neither moved nor read.

    Raises:
        ShardError: parts are missing, incomplete, or differ in source or options; or `output` contains a set that was
            not merged from parts.
        StoreError: the object store cannot be reached.
    """
    started = time.monotonic()
    folder = open_folder(output)
    num_parts = _num_parts(folder)
    old = folder.read(MANIFEST_NAME)
    if old is not None and parse_manifest(old, f"{folder.name}/{MANIFEST_NAME}").num_parts == 0:
        raise ShardError(f"{folder.name}: contains both parts and a set not merged from them. Remove one of the two.")
    files = folder.files() or {}
    entries: list[dict[str, Any]] = []
    stats, id_hashes = BuildStats(), array("Q")
    first: Manifest | None = None
    for index in range(1, num_parts + 1):
        name = part_folder(index, num_parts)
        where = f"{folder.name}/{name}"
        remedy = f"Build it with --part {index}/{num_parts}, then merge again."
        names = (INDEX_NAME, MANIFEST_NAME, IDS_NAME)
        index_text, manifest_text, ids = (folder.read(f"{name}/{file}") for file in names)
        if index_text is None or manifest_text is None or ids is None:
            raise ShardError(f"{where}: this part is missing or incomplete. {remedy}")
        manifest = parse_manifest(manifest_text, f"{where}/{MANIFEST_NAME}")
        if manifest.index_sha256 != index_digest(index_text) or len(ids) != 8 * manifest.stats.num_records:
            raise ShardError(f"{where}: its files belong to different builds. {remedy}")
        first = first or manifest
        _check_same_options(manifest, first, where)
        for shard in parse_index(index_text, f"{where}/{INDEX_NAME}"):
            if not _is_stored(shard, files, f"{name}/"):
                raise ShardError(f"{where}: {shard.published.basename} is missing or incomplete. {remedy}")
            entries.append(_in_subfolder(name, shard.entry))
        stats.add(manifest.stats)
        id_hashes.frombytes(ids)
    assert first is not None
    if not entries:
        found = f"the {num_parts} parts contain no record"
        raise ShardError(f"{folder.name}: {found}. Check the source they were built from.")
    stats.num_duplicates = count_duplicates(id_hashes)
    text = dump_index(entries)
    merged = replace(first, part=None, num_parts=num_parts, stats=stats, index_sha256=index_digest(text))
    folder.write(MANIFEST_NAME, merged.to_text())
    folder.write(INDEX_NAME, text)
    found = f"{counted(stats.num_records, 'record')} in {counted(len(entries), 'shard')}"
    report(f"{folder.name}: {num_parts} parts, {found}")
    return BuildReport.of(folder.name, parse_index(text, folder.name), stats, time.monotonic() - started)


def _num_parts(folder: Folder) -> int:
    files = folder.files()
    if files is None:
        raise ShardError(f"{folder.name}: this store cannot list files. Merge the parts on disk, then copy the set.")
    found = sorted({match[0] for name in files if (match := _PART_FOLDER.match(name))})
    sizes = {int(name.rpartition("-")[2]) for name in found}
    if len(sizes) != 1:
        names = ", ".join(found) or "no part"
        raise ShardError(f"{folder.name}: contains {names}; expected the parts of one build. Build or remove parts.")
    return sizes.pop()


def _check_same_options(manifest: Manifest, first: Manifest, where: str) -> None:
    for name in ("source", "options", "version"):
        value, expected = getattr(manifest, name), getattr(first, name)
        if value != expected:
            raise ShardError(f"{where}: {name} is {value}; expected {expected}, as in part 1. Build all parts alike.")


def _in_subfolder(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    entry = deepcopy(entry)
    for file in (entry["raw_data"], entry["zip_data"]):
        if file is not None:
            file["basename"] = f"{name}/{file['basename']}"
    return entry
