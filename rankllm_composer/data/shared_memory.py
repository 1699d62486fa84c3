"""Claims on shared memory and caches of one machine, each a lock that the kernel releases when its holder dies.

Streaming keeps the state of an epoch in shared memory under names that count up from 0. Leftovers of a killed run block
those names or pass for live state, and two runs that start together choose the same ones. Here every dataset claims a
random number for its names. A claim without a holder belongs to a dead run and is removed.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

from rankllm_composer.storage.locks import FileLock, try_lock

# Above the numbers that streaming reaches; 10 digits keep the longest name within the 31 characters of macOS.
_FIRST_NUMBER, _LAST_NUMBER = 10**6, 10**10 - 1
_caches: dict[Path, FileLock] = {}


def claim_cache(folder: str | Path, wait_seconds: float = 30.0) -> FileLock | None:
    """Claim the cache folder of shards until this process ends; return None if another run holds it.

    The wait covers the loader workers of a killed run, which survive it for some seconds.
    """
    digest = hashlib.blake2b(os.path.realpath(folder).encode(), digest_size=12).hexdigest()
    path = _claims_folder() / f"cache-{digest}"
    claim = _caches.get(path)
    if claim is None or not claim.is_held:
        claim = try_lock(path, wait_seconds)
        if claim is not None:
            _caches[path] = claim
            atexit.register(claim.remove)
    return claim


@contextlib.contextmanager
def private_shared_memory() -> Iterator[None]:
    """Give streaming datasets created in this context shared-memory names of no other run, live or dead."""
    from streaming.base import dataset

    original = dataset.get_shm_prefix
    dataset.get_shm_prefix = _register_names
    try:
        yield
    finally:
        dataset.get_shm_prefix = original


def clear_dead_claims() -> int:
    """Remove the shared memory and locks of dead runs; return their number."""
    num_dead = 0
    for path in _claims_folder().glob("names-*"):
        claim = try_lock(path)
        if claim is not None:
            _remove_names(int(path.name.removeprefix("names-")))
            claim.remove()
            num_dead += 1
    return num_dead


def _register_names(
    streams_local: list[str], streams_remote: Sequence[str | None], world: Any, retry: int = 0
) -> tuple[int, Any]:
    """Replace streaming's `get_shm_prefix`: same arguments and result, but with a claimed random number."""
    from streaming.base.constant import LOCALS
    from streaming.base.distributed import all_gather_object
    from streaming.base.shared.memory import SharedMemory as StreamingSharedMemory
    from streaming.base.shared.prefix import _check_self, _get_path, _pack_locals

    _check_self(streams_local)
    number, memory = None, None
    if world.is_local_leader:
        clear_dead_claims()
        number = _claim_number()
        text = _pack_locals(streams_local, number)
        memory = StreamingSharedMemory(_get_path(number, LOCALS), True, len(text))
        memory.buf[: len(text)] = text
    numbers = all_gather_object(number)
    number = numbers[world.node * world.ranks_per_node]
    assert number is not None
    return number, memory or StreamingSharedMemory(_get_path(number, LOCALS), False)


def _claim_number() -> int:
    while True:
        number = _FIRST_NUMBER + secrets.randbelow(_LAST_NUMBER - _FIRST_NUMBER)
        claim = try_lock(_claims_folder() / f"names-{number}")
        if claim is not None:
            atexit.register(_release_number, claim, number)
            return number


def _release_number(claim: FileLock, number: int) -> None:
    if claim.is_held:
        _remove_names(number)
        claim.remove()


def _remove_names(number: int) -> None:
    from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN
    from streaming.base.shared.prefix import _get_path

    for name in SHM_TO_CLEAN:
        with contextlib.suppress(FileNotFoundError):
            memory = SharedMemory(_get_path(number, name))
            memory.close()
            memory.unlink()
    for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
        (Path(tempfile.gettempdir()) / _get_path(number, name)).unlink(missing_ok=True)


def _claims_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"rankllm_composer-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
