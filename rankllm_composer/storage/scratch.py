"""Temporary folders that the next process removes if the one that made them was killed."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankllm_composer.storage.locks import try_lock
from rankllm_composer.storage.private_folder import private_folder

_LOCK_SUFFIX = ".lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Create a folder in the temporary directory of this user and remove it at the end.

    Folders of killed processes are removed first.
    """
    remove_dead_scratch()
    folder = private_folder() / f"scratch-{secrets.token_hex(8)}"
    lock = try_lock(folder.with_suffix(_LOCK_SUFFIX))
    assert lock is not None
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.remove()


def remove_dead_scratch() -> None:
    """Remove the scratch folders of processes that have ended."""
    for path in private_folder().glob(f"scratch-*{_LOCK_SUFFIX}"):
        lock = try_lock(path)
        if lock is None:
            continue
        with lock:
            if lock.is_certain:
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                lock.remove()
