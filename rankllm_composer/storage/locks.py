"""Exclusive locks on files, between the processes of a machine and, where the file system supports it, of a cluster."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
import time
from pathlib import Path

from rankllm_composer.errors import StoreError
from rankllm_composer.screen import get_logger
from rankllm_composer.storage.private_folder import private_folder

log = get_logger(__name__)
POLL_SECONDS = 0.1
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_devices_without_locks: set[int] = set()

_guard = threading.RLock()
_held: set[FileLock] = set()


class FileLock:
    """An exclusive lock on a file, of this process alone. The kernel drops it when the process ends, however it ends.

    A forked child does not keep it: the child closes its copy of the descriptor at once.

    Attributes:
        is_certain: False where nothing has locks, so that another process may have taken the lock as well.
    """

    def __init__(
        self, path: Path, descriptor: int, substitute: FileLock | None = None, is_certain: bool = True
    ) -> None:
        self.path = path
        self.is_certain = is_certain
        self._descriptor = descriptor
        self._substitute = substitute
        _held.add(self)

    @property
    def is_held(self) -> bool:
        """Whether this process took the lock and has not released it."""
        return self._descriptor >= 0

    def release(self) -> None:
        """Release the lock, if it is held."""
        with _guard:
            if not self.is_held:
                return
            if self._substitute is not None:
                self._substitute.remove()
            self._close()

    def remove(self) -> None:
        """Remove the locked file and release the lock, if it is held."""
        if self.is_held:
            self.path.unlink(missing_ok=True)
            self.release()

    def _close(self) -> None:
        _held.discard(self)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *failure: object) -> None:
        self.release()


def try_lock(path: Path, wait_seconds: float = 0.0) -> FileLock | None:
    """Lock a file, created if absent; None if another process still holds the lock after `wait_seconds`.

    Where the file system has no locks, a file of `private_folder()` is locked instead. That excludes other processes of
    this user on this machine; a warning, once per file system, says so.

    Raises:
        OSError: the file cannot be opened. A symbolic link is never followed.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            return _lock_now(path)
        except FileNotFoundError:  # its holder has just removed it
            if not path.parent.is_dir():
                raise
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_SECONDS)


def lock_private_file(name: str, wait_seconds: float = 0.0) -> FileLock | None:
    """Lock a file of `private_folder()` as `try_lock` does.

    Raises:
        StoreError: the temporary directory cannot be written.
    """
    path = private_folder() / name
    try:
        return try_lock(path, wait_seconds)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be locked ({error.strerror}). Free space there, or set TMPDIR to another folder."
        ) from error


def _lock_now(path: Path) -> FileLock:
    with _guard:  # no fork between opening the file and recording the descriptor
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                return _lock_elsewhere(path, descriptor, str(error.strerror))
            # A holder that removed the file after it was opened here leaves a lock on a file without a name.
            if not os.path.samestat(os.fstat(descriptor), path.lstat()):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            return FileLock(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise


def _lock_elsewhere(path: Path, descriptor: int, reason: str) -> FileLock:
    """Lock a file of the private folder instead of one on a file system without locks."""
    folder = private_folder()
    if path.parent == folder:
        return FileLock(path, descriptor, is_certain=False)
    digest = hashlib.blake2b(os.path.realpath(path).encode(), digest_size=12).hexdigest()
    substitute = _lock_now(folder / f"lock-{digest}")
    device = os.fstat(descriptor).st_dev
    if device not in _devices_without_locks:
        _devices_without_locks.add(device)
        log.warning(
            "%s: this file system has no locks (%s), so %s; run only one at a time",
            path,
            reason,
            "processes on other machines, or of other users, are not kept out"
            if substitute.is_certain
            else "nothing stops two processes from writing here",
        )
    return FileLock(path, descriptor, substitute, substitute.is_certain)


def _forget_in_child() -> None:
    """Close the locks of the parent in a child that has just been forked."""
    for lock in list(_held):
        lock._close()
    _guard.release()


os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_forget_in_child)
