"""Attribute the memory of a training step to weights, gradients, activations, logits and communication.

The trackers of `torch.distributed._tools` (torch 2.7) see every tensor storage that is allocated, resized or freed.
They have no kind for logits. The kind of optimizer states stands for them: a planned step has no optimizer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType, _RefType
from torch.distributed.fsdp import FSDPModule

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
_KINDS: dict[_RefType, str] = {  # all others are activations
    _MemRefType.PARAM: "weights",
    _MemRefType.BUFFER: "weights",
    _MemRefType.GRAD: "gradients",
    _MemRefType.OPT: "logits",
    _FSDPRefType.SHARDED_PARAM: "weights",
    _FSDPRefType.BUFFER: "weights",
    _FSDPRefType.SHARDED_GRAD: "gradients",
    _FSDPRefType.OPT: "logits",
    _FSDPRefType.UNSHARDED_PARAM: "buffers",
    _FSDPRefType.UNSHARDED_GRAD: "buffers",
    _FSDPRefType.ALL_GATHER: "buffers",
    _FSDPRefType.REDUCE_SCATTER: "buffers",
}


class MemoryTracker(MemTracker):
    """A tracker that separates logits from activations."""

    def count_logits(self, enabled: bool) -> None:
        """Count new tensors as logits, or stop doing so."""
        self._in_opt = enabled

    def count_logits_of(self, output_head: torch.nn.Module) -> None:
        """Count what the output head allocates as logits, until the gradient of its input is computed."""

        def start(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self.count_logits(True)
            if inputs[0].requires_grad:
                inputs[0].register_hook(stop)  # type: ignore[no-untyped-call]

        def stop(*_: Any) -> None:
            self.count_logits(False)

        output_head.register_forward_pre_hook(start)
        output_head.register_forward_hook(stop)

    def bytes_by_part(self, moment: Literal["current", "peak"]) -> dict[str, int]:
        """Bytes in use on the CPU: part → bytes."""
        found = dict.fromkeys(PARTS, 0)
        for kind, size in self.get_tracker_snapshot(moment)[torch.device("cpu")].items():
            if isinstance(kind, _RefType):  # not the total
                found[_KINDS.get(kind, "activations")] += size
        return found


class ReplicaTracker(MemoryTracker):
    """Track a model that each rank holds in full, with or without frozen weights.

    torch's hooks per module fail on frozen weights and copy a snapshot per module and operation. One hook per trained
    weight suffices to separate its gradient from activations.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.track_external(model)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self._count_gradient)  # type: ignore[no-untyped-call]

    def _count_gradient(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        self._update_and_maybe_create_winfos(weight.grad, _MemRefType.GRAD)

    def _ignore_module(self, *_: Any) -> None:
        """Collect no statistics per module."""

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _ignore_module  # type: ignore[assignment]


class ShardTracker(MemoryTracker, FSDPMemTracker):
    """Track a model that FSDP2 shards.

    torch counts a gathered weight's gradient as an activation until the backward pass of its module ends. Here it
    counts as communication as soon as it exists.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        FSDPMemTracker.__init__(self, next(module for module in model.modules() if isinstance(module, FSDPModule)))

    def _count_gradient(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        super()._update_and_maybe_create_winfos(weight.grad, _FSDPRefType.UNSHARDED_GRAD)

    def _update_and_maybe_create_winfos(
        self, t: torch.Tensor, reftype: _RefType, update_existing: bool = False
    ) -> set[Any]:
        if reftype is _FSDPRefType.UNSHARDED_PARAM and t.requires_grad and not t._post_accumulate_grad_hooks:
            t.register_post_accumulate_grad_hook(self._count_gradient)  # type: ignore[no-untyped-call]
        return super()._update_and_maybe_create_winfos(t, reftype, update_existing)
