"""Exclusive locks on files, between the processes of a machine and, where the file system supports it, of a cluster."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from rankllm_composer.screen import get_logger

log = get_logger(__name__)
POLL_SECONDS = 0.1
_devices_without_locks: set[int] = set()


class FileLock:
    """An exclusive lock on a file. The kernel drops it when the process ends, however it ends.

    A forked child shares the lock but cannot release it: while the child lives, nobody else gets the lock.

    Where the file system has no locks, a warning names the path once per file system and the lock counts as held:
    from then on nothing stops a second process.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._owner = os.getpid()

    @property
    def is_held(self) -> bool:
        """Whether this process took the lock and has not released it."""
        return self._descriptor >= 0 and os.getpid() == self._owner

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self.is_held:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """Remove the locked file and release the lock, if it is held."""
        if self.is_held:
            self.path.unlink(missing_ok=True)
            self.release()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *failure: object) -> None:
        self.release()


def try_lock(path: Path, wait_seconds: float = 0.0) -> FileLock | None:
    """Lock a file, created if absent; None if another process still holds the lock after `wait_seconds`."""
    deadline = time.monotonic() + wait_seconds
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _flock(descriptor, path)
            # A holder that removed the file after it was opened here leaves a lock on a file without a name.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return FileLock(path, descriptor)
        except FileNotFoundError:
            pass
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
            time.sleep(POLL_SECONDS)
        os.close(descriptor)


def _flock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        device = os.fstat(descriptor).st_dev
        if device not in _devices_without_locks:
            _devices_without_locks.add(device)
            log.warning(
                "%s: this file system has no locks (%s), so nothing stops two processes from writing here; "
                "run only one at a time",
                path,
                error.strerror,
            )
