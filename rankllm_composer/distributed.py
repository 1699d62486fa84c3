"""Work of rank 0 that the other ranks wait for: however long it takes, and what fails there fails everywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from composer.utils import dist
from torch.distributed.fsdp import FSDPModule

from rankllm_composer.errors import RunError

if TYPE_CHECKING:
    pass


def largest_of_ranks(value: int, lockstep: bool) -> int:
    """The largest value of all ranks in lockstep; else the value itself."""
    if not lockstep:
        return value
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(value, device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return int(tensor)


def _reduce_over_ranks(values: list[int], operation: str) -> list[int]:
    tensor = torch.tensor(values, dtype=torch.int64)
    if dist.get_world_size() > 1:
        if torch.distributed.get_backend() == "nccl":
            tensor = tensor.cuda()
        dist.all_reduce(tensor, reduce_operation=operation)
    return tensor.tolist()


# Other ranks hear from rank 0 this often, so that no collective runs into its timeout.
HEARTBEAT_SECONDS = 10.0


def run_on_rank_zero(task: Callable[[], None], what: str) -> None:
    """Runs a task on rank 0 while the other ranks wait, however long it takes; a collective.

    Raises:
        Exception: on rank 0, what the task raised.
        RunError: on every other rank, the same text.
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
        raise RunError(f"rank 0, {what}: {error}")


def average_sharded_gradients(model: torch.nn.Module) -> float:
    """Make FSDP2 average gradients over ranks where its backend does not. A collective; call it once after wrapping.

    FSDP2 asks for `ReduceOp.AVG`. NCCL averages; gloo (torch 2.7) takes the request and returns the sum, so that a
    gradient on CPU is as many times too large as there are ranks: Adam hides it, clipping and SGD do not. What the
    backend really does is probed here, and divided out after each reduction.

    Args:
        model: any module that holds FSDP2 modules; others are left alone.
    Returns:
        What each reduced gradient is now divided by: 1 where the backend averages.
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
