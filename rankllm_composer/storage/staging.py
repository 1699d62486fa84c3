"""Folders that are there as a whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankllm_composer.errors import StoreError


class Claim:
    """A file that this process, and the workers it forks, hold locked. Gone with its process, however that ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._owner = os.getpid()

    @property
    def is_held(self) -> bool:
        """True in the process that made the claim, until it is released."""
        return self._descriptor >= 0 and os.getpid() == self._owner

    def release(self) -> None:
        """Remove the file and drop the lock; does nothing in a forked process, or a second time."""
        if not self.is_held:
            return
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1


def try_claim(path: Path, wait_seconds: float = 0.0) -> Claim | None:
    """Claim a path, or None if a living process still holds it after `wait_seconds`."""
    deadline = time.monotonic() + wait_seconds
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file after it was opened here: then the lock is on nothing.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return Claim(path, descriptor)
        except FileNotFoundError:
            pass
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
            time.sleep(0.1)
        os.close(descriptor)


log = logging.getLogger(__name__)


_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def staged_folder(target: Path, *, mark: str, num_bytes: int) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its place when the block ends well, and vanishes when it does not.

    An earlier folder of the same kind is replaced; what killed processes left of either is cleaned up first.

    Args:
        target: absolute path of the folder to be.
        mark: a file that every folder of this kind holds: one without it is never replaced.
        num_bytes: that will be written, at least.
    Raises:
        StoreError: no space, something else at the path, another living process writing it, or a write that failed.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(target)
        _check_replaceable(target, mark)
        free = shutil.disk_usage(target.parent).free
        if num_bytes > free:
            raise _no_space(target, f"{free / 1e9:.2f} GB free, to be written are {num_bytes / 1e9:.2f} GB")
        stage = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
        stage.mkdir()
    except OSError as error:
        raise _write_error(target, error) from error
    try:
        with (stage / ".lock").open("w") as lock:
            # Held by the living only: a partial folder whose lock is free belongs to a killed process.
            _try_lock(lock.fileno())
            yield stage
            (stage / ".lock").unlink()
            _publish(stage, target)
    except Exception as error:
        shutil.rmtree(stage, ignore_errors=True)
        if _errno(error) is not None:
            raise _write_error(target, error) from error
        raise
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _publish(stage: Path, target: Path) -> None:
    for path in [*stage.rglob("*"), stage]:
        _fsync(path)
    previous = target.parent / f".{target.name}.previous-{secrets.token_hex(4)}"
    if target.exists():
        target.rename(previous)
    stage.rename(target)
    _fsync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _clean_up(target: Path) -> None:
    """Removes what killed processes left of this folder, and puts back a version they had moved aside."""
    for path in target.parent.glob(f".{target.name}.previous-*"):
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)
    for path in target.parent.glob(f".{target.name}.partial-*"):
        try:
            with (path / ".lock").open("r+") as lock:
                if not _try_lock(lock.fileno()):
                    raise StoreError(f"{target}: another process is writing it, in {path.name}; use another folder")
        except FileNotFoundError:
            pass
        log.warning("%s: removed, left behind by a killed process", path)
        shutil.rmtree(path, ignore_errors=True)


def _check_replaceable(target: Path, mark: str) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise StoreError(f"{target}: found a file or a link, allowed is an exported folder or nothing; move it away")
    if target.exists() and any(target.iterdir()) and not (target / mark).exists():
        raise StoreError(
            f"{target}: found a folder that is no export (no {mark}), allowed is an export or nothing; move it away",
        )


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # A file system without locks: one process a folder has to be enough.
    return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _errno(error: BaseException) -> int | None:
    """Error number of a failed write, also from safetensors, which keeps it in the text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def _write_error(target: Path, error: BaseException) -> StoreError:
    number = _errno(error)
    if number in _DISK_FULL:
        return _no_space(target, os.strerror(number).lower())
    return StoreError(f"{target}: could not be written ({error}); nothing was left there")


def _no_space(target: Path, found: str) -> StoreError:
    return StoreError(f"{target}: no space to write it ({found}); nothing was left there; free some")
