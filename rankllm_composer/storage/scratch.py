"""Temporary folders that the next process removes if the one that made them was killed."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankllm_composer.storage.locks import lock_private_file, try_lock
from rankllm_composer.storage.private_folder import SCRATCH_PREFIX, private_folder

_LOCK_SUFFIX = ".lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Create a folder in the temporary directory of this user and remove it at the end.

    Folders of killed processes are removed first.

    Raises:
        StoreError: the temporary directory cannot be written.
    """
    remove_dead_scratch()
    name = f"{SCRATCH_PREFIX}{secrets.token_hex(6)}"
    # Another process that starts now may hold the lock for a moment, to find out whether this one is alive.
    lock = lock_private_file(name + _LOCK_SUFFIX, wait_seconds=60)
    assert lock is not None
    folder = lock.path.with_suffix("")
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.remove()


@contextmanager
def temporary_files_in_scratch() -> Iterator[None]:
    """Let this process, its libraries included, put temporary files into a scratch folder."""
    before = tempfile.tempdir
    with scratch_folder() as folder:
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


def remove_dead_scratch() -> None:
    """Remove the scratch folders of processes that have ended."""
    for path in private_folder().glob(f"{SCRATCH_PREFIX}*{_LOCK_SUFFIX}"):
        lock = try_lock(path)
        if lock is None:
            continue
        with lock:
            if lock.is_certain:
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                lock.remove()
