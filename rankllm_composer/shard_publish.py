"""How a set of shards appears: built in a hidden folder, then shown whole, index last; at most one builder a set.

A build works in `.building` inside its output, so that showing a file is a rename on one disk. What a killed build
leaves there the next one removes. Locks belong to the process and end with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rankllm_composer.shard_index import INDEX_NAME, Shard, ShardError, parse_index
from rankllm_composer.shard_manifest import MANIFEST_NAME, QUARANTINE_NAME, Manifest, Tally, digest, parse_manifest
from rankllm_composer.storage import Folder, LocalFolder

WORKING_INDEX_NAME = "index.json.new"
_WORK_NAME = ".building"
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
                shutil.rmtree(path) if path.is_dir() else path.unlink()
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
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another builder may have finished and removed the folder between the two lines above.
        if not folder.exists() or os.fstat(handle).st_ino != folder.stat().st_ino:
            raise BlockingIOError
        yield
    except BlockingIOError as error:
        raise ShardError(f"{what}: another process builds this set; wait for it, or choose another output") from error
    finally:
        os.close(handle)
