"""Atomic files and folders: complete or absent, even if the writer is killed."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rankllm_composer.errors import StoreError
from rankllm_composer.screen import get_logger
from rankllm_composer.storage.locks import try_lock

log = get_logger(__name__)
_LOCK = ".lock"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write or replace a file in an existing folder, complete or not at all; text becomes UTF-8."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync(partial)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def publish_folder(stage: Path, target: Path) -> None:
    """Flush a folder to disk and rename it to `target`; an existing one is moved aside first and removed last.

    Its files get the permissions that the umask gives to new files; safetensors, for one, keeps its own to the owner.
    """
    permissions = stage.stat().st_mode & 0o666  # the stage is a new folder
    for path in [*stage.rglob("*"), stage]:
        if path.is_file():
            path.chmod(permissions)
        fsync(path)
    previous = target.parent / f".{target.name}.previous-{secrets.token_hex(4)}"
    if target.exists():
        target.rename(previous)
    stage.rename(target)
    fsync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def staged_folder(target: Path, *, mark: str, num_bytes: int) -> Iterator[Path]:
    """Fill a hidden folder beside `target`; publish it at the end of the block, or remove it if the block fails.

    An existing folder is replaced if it contains the file `mark`. Leftovers of killed processes are removed first.

    Args:
        target: absolute path of the folder.
        mark: name of a file that every folder of this kind contains.
        num_bytes: least number of bytes that will be written.
    Raises:
        StoreError: the disk is full, something else is at the path, another process is writing the folder, or a
            write failed.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(target)
        _check_replaceable(target, mark)
        free = shutil.disk_usage(target.parent).free
        if num_bytes > free:
            raise _no_space(target, f"{free / 1e9:.2f} GB free, {num_bytes / 1e9:.2f} GB needed")
        stage = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
        stage.mkdir()
        lock = try_lock(stage / _LOCK)
    except OSError as error:
        raise _write_error(target, error) from error
    assert lock is not None
    try:
        with lock:
            yield stage
            lock.path.unlink()
            publish_folder(stage, target)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        if isinstance(error, Exception) and _errno(error) is not None:
            raise _write_error(target, error) from error
        raise


def _clean_up(target: Path) -> None:
    """Remove what killed writers left of this folder, and restore a version that they had moved aside."""
    for path in target.parent.glob(f".{target.name}.previous-*"):
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)
    for path in target.parent.glob(f".{target.name}.partial-*"):
        if (path / _LOCK).exists():
            lock = try_lock(path / _LOCK)
            if lock is None:
                raise StoreError(f"{target}: another process is writing it, in {path.name}. Use another folder.")
            lock.release()
            if not lock.is_certain:
                continue
        log.warning("%s: removed, left by a killed process", path)
        shutil.rmtree(path, ignore_errors=True)


def _check_replaceable(target: Path, mark: str) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        found = "a file or a link"
    elif target.exists() and any(target.iterdir()) and not (target / mark).exists():
        found = f"a folder without {mark}"
    else:
        return
    raise StoreError(f"{target} is {found}; expected an exported folder or nothing. Move it away.")


def _errno(error: BaseException) -> int | None:
    """Error number of a failed write; safetensors has it in the text only."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match.group(1)) if match else None


def _write_error(target: Path, error: BaseException) -> StoreError:
    number = _errno(error)
    if number in _DISK_FULL:
        return _no_space(target, os.strerror(number).lower())
    return StoreError(f"{target}: could not be written ({error}); no partial folder is left behind")


def _no_space(target: Path, reason: str) -> StoreError:
    return StoreError(f"{target}: no space to write it ({reason}); no partial folder is left behind. Free some space.")
