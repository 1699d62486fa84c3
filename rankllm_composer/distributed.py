"""Collectives over ranks: tasks on rank 0 that others wait for, maxima, and averaged gradients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from composer.utils import dist
from torch.distributed.fsdp import FSDPModule

from rankllm_composer.errors import RunError

_progressed_at = time.monotonic()


def note_progress() -> None:
    """Note that this rank has just done a step, or passed a collective."""
    global _progressed_at
    _progressed_at = time.monotonic()


def seconds_without_progress() -> float:
    """How long ago this rank noted progress."""
    return time.monotonic() - _progressed_at


def reduce_over_ranks(values: list[int], operation: str) -> list[int]:
    """Reduce each number over all ranks by "SUM" or "MAX". A collective."""
    tensor = torch.tensor(values, dtype=torch.int64)
    if dist.get_world_size() > 1:
        if torch.distributed.get_backend() == "nccl":
            tensor = tensor.cuda()
        dist.all_reduce(tensor, reduce_operation=operation)
    return tensor.tolist()


def gather_numbers(values: list[int]) -> list[list[int]]:
    """Return the numbers of every rank, by rank; each passes as many. A collective, and one wait for the device."""
    tensor = torch.tensor(values, dtype=torch.int64)
    if dist.get_world_size() == 1:
        return [values]
    if torch.distributed.get_backend() == "nccl":
        tensor = tensor.cuda()
    return torch.stack(list(dist.all_gather(tensor))).tolist()


def largest_of_ranks(value: int, lockstep: bool) -> int:
    """Return the largest value of all ranks if they run in lockstep, else the value itself."""
    return reduce_over_ranks([value], "MAX")[0] if lockstep else value


HEARTBEAT_SECONDS = 10.0
"""Interval at which rank 0 reports to waiting ranks, so that no collective times out."""


def run_on_rank_zero(task: Callable[[], None], what: str) -> None:
    """Run a task on rank 0 while other ranks wait, with heartbeats instead of a collective timeout. A collective.

    Args:
        task: called on rank 0 only.
        what: name of the task, for messages.
    Raises:
        Exception: on rank 0, the error of the task.
        RunError: on every other rank, with the same text.
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
        note_progress()
        done, error = status[0]
        if done:
            break
    if failure:
        raise failure[0]
    if error is not None:
        raise RunError(f"rank 0, {what}: {error}")


def average_sharded_gradients(model: torch.nn.Module) -> float:
    """Make FSDP2 average gradients over ranks if its backend sums them. A collective; call it once after wrapping.

    FSDP2 requests `ReduceOp.AVG`. NCCL averages, but gloo (torch 2.7) returns the sum, so that gradients on CPU are too
    large by a factor of the number of ranks: Adam hides it, clipping and SGD do not. This function measures what the
    backend does and divides each reduced gradient accordingly. Modules without FSDP2 are unchanged.

    Returns:
        The divisor of each reduced gradient; 1 if the backend averages.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded or torch.distributed.get_world_size() == 1:
        return 1.0
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    ones = torch.ones(torch.distributed.get_world_size(), device=device)
    reduced = torch.empty(1, device=device)
    torch.distributed.reduce_scatter_tensor(reduced, ones, op=torch.distributed.ReduceOp.AVG)
    factor = float(reduced)
    if factor != 1.0:
        for module in sharded:
            module.set_all_reduce_hook(lambda gradient: gradient.div_(factor))  # type: ignore[arg-type]
    return factor
