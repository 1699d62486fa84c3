"""FSDP2 on any backend: the gradient is the mean over ranks, also where the backend only sums."""

from __future__ import annotations

import torch
import torch.distributed
from torch.distributed.fsdp import FSDPModule


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
