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
from collections.abc import Iterator, Sequence
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

from rankllm_composer.errors import RankLLMComposerError, ShardError, StoreError
from rankllm_composer.storage.locks import FileLock, lock_private_file, try_lock
from rankllm_composer.storage.private_folder import private_folder

# Above the numbers that streaming reaches; 10 digits keep the longest name within the 31 characters of macOS.
_FIRST_NUMBER, _LAST_NUMBER = 10**6, 10**10 - 1
_SHARED_MEMORY = Path("/dev/shm")
_MIN_FREE_BYTES = 2**20  # streaming keeps 9 bytes per shard and some pages; the queues of the workers take a few more
_caches: dict[str, FileLock] = {}

MAKE_SPACE = "Free space in /dev/shm, or enlarge it (in a container: docker run --shm-size=1g)."
"""What to do if shared memory is full."""


def claim_cache(folder: str | Path, wait_seconds: float = 30.0) -> FileLock | None:
    """Claim the cache folder of shards until this process ends; return None if another run holds it.

    The wait covers the ranks of a killed run, which may take some seconds to notice that it is over.

    Raises:
        StoreError: the temporary directory cannot be written or has no locks.
    """
    digest = hashlib.blake2b(os.path.realpath(folder).encode(), digest_size=12).hexdigest()
    claim = _caches.get(digest)
    if claim is None or not claim.is_held:
        claim = _claim(f"cache-{digest}", wait_seconds)
        if claim is not None:
            _caches[digest] = claim
            atexit.register(claim.remove)
    return claim


def _claim(name: str, wait_seconds: float = 0.0) -> FileLock | None:
    claim = lock_private_file(name, wait_seconds)
    if claim is not None and not claim.is_certain:
        claim.remove()
        raise StoreError(f"{claim.path.parent}: this file system has no locks. Set TMPDIR to a folder on a local disk.")
    return claim


@contextlib.contextmanager
def private_shared_memory() -> Iterator[None]:
    """Give streaming datasets created in this context shared-memory names of no other run, live or dead.

    Streaming's lock files go into the private folder of this user: in the temporary directory, another user could
    create them first.

    Raises:
        ShardError: in this context, on every rank, if there is no space for them.
    """
    from streaming.base import dataset

    originals = dataset.get_shm_prefix, dataset.gettempdir
    dataset.get_shm_prefix = _register_names
    dataset.gettempdir = lambda: str(private_folder())
    try:
        yield
    finally:
        dataset.get_shm_prefix, dataset.gettempdir = originals


def clear_dead_claims() -> int:
    """Remove the shared memory and locks of dead runs; return their number."""
    num_dead = 0
    for path in private_folder().glob("names-*"):
        claim = try_lock(path)
        if claim is None:
            continue
        with claim:
            if claim.is_certain:
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
    number, memory, problem = None, None, None
    if world.is_local_leader:
        try:
            clear_dead_claims()
            _check_space()
            number = _claim_number()
            text = _pack_locals(streams_local, number)
            memory = StreamingSharedMemory(_get_path(number, LOCALS), True, len(text))
            memory.buf[: len(text)] = text
        except (OSError, RankLLMComposerError) as error:
            problem = str(error)
    answers = all_gather_object((number, problem))
    for _, problem in answers:
        if problem is not None:
            raise ShardError(problem)
    number = answers[world.node * world.ranks_per_node][0]
    assert number is not None
    return number, memory or StreamingSharedMemory(_get_path(number, LOCALS), False)


def _check_space() -> None:
    """Check that the shared memory of a dataset can be written; a full one ends a process by SIGBUS, without a word."""
    if not _SHARED_MEMORY.is_dir():
        return
    status = os.statvfs(_SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if free < _MIN_FREE_BYTES:
        raise ShardError(
            f"{_SHARED_MEMORY} has {free} free bytes; expected at least {_MIN_FREE_BYTES} for the state of an epoch. "
            f"{MAKE_SPACE}"
        )


def _claim_number() -> int:
    while True:
        number = _FIRST_NUMBER + secrets.randbelow(_LAST_NUMBER - _FIRST_NUMBER)
        claim = _claim(f"names-{number}")
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
        (private_folder() / _get_path(number, name)).unlink(missing_ok=True)
