"""Work of rank 0 that the other ranks wait for: however long it takes, and what fails there fails everywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from composer.utils import dist

# Other ranks hear from rank 0 this often, so that no collective runs into its timeout.
HEARTBEAT_SECONDS = 10.0


class RankZeroError(ValueError):
    """What failed on rank 0, as the other ranks hear of it."""


def run_on_rank_zero(task: Callable[[], None], what: str) -> None:
    """Runs a task on rank 0 while the other ranks wait, however long it takes; a collective.

    Raises:
        Exception: on rank 0, what the task raised.
        RankZeroError: on every other rank, the same text.
    """
    if dist.get_world_size() == 1:
        task()
        return
    failure: list[BaseException] = []

    def attempt() -> None:
        try:
            task()
        except BaseException as error:
            failure.append(error)

    worker = threading.Thread(target=attempt, name=what, daemon=True) if dist.get_global_rank() == 0 else None
    if worker is not None:
        worker.start()
    while True:
        status: list[Any] = [None]
        if worker is not None:
            worker.join(HEARTBEAT_SECONDS)
            status = [(not worker.is_alive(), str(failure[0]) if failure else None)]
        dist.broadcast_object_list(status, src=0)
        done, error = status[0]
        if done:
            break
    if failure:
        raise failure[0]
    if error is not None:
        raise RankZeroError(f"rank 0, {what}: {error}")
