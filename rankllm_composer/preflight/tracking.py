"""Attribute the memory of a training step to weights, gradients, activations, logits and communication.

The trackers of `torch.distributed._tools` (torch 2.7) see every tensor storage that is allocated, resized or freed.
They have no kind for logits. The kind of optimizer states stands for them: a planned step has no optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType, _RefType, _UpdateType
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


@dataclass
class Section:
    """A part of a step: a layer's forward or backward pass, until the next one begins, or what comes between them.

    `freed` is what was freed of other layers' tensors, except neighbors'; all arrays are bytes by part, as in PARTS.
    """

    direction: Literal["forward", "backward"] | None
    layer: int
    start: NDArray[np.int64]
    highest: NDArray[np.int64]
    end: NDArray[np.int64]
    freed: dict[int, NDArray[np.int64]] = field(default_factory=dict)


class MemoryTracker(MemTracker):
    """A tracker that separates logits from activations, and notes the peak of each section of a step."""

    def __init__(self, *model: torch.nn.Module) -> None:
        super().__init__(*model)
        self.sections: list[Section] = []

    def begin(self, direction: Literal["forward", "backward"] | None, layer: int = 0) -> None:
        """Begin a section, which ends the one before."""
        self.end()
        now = self._in_use("current")
        self.sections.append(Section(direction, layer, now, now, now))
        self._peak_mem.clear()
        self._peak_mem_snap = self.get_tracker_snapshot()

    def end(self) -> None:
        """End the last section."""
        if self.sections:
            self.sections[-1].end = self._in_use("current")
            self.sections[-1].highest = max(self._in_use("peak"), self.sections[-1].end, key=np.sum)

    def _update_snap(self, u_type: _UpdateType, winfo: Any, *old: Any, **others: Any) -> None:
        super()._update_snap(u_type, winfo, *old, **others)
        if not self.sections:
            return
        section = self.sections[-1]
        if u_type is _UpdateType.ADD and section.direction is not None:
            winfo.layer = section.layer
        layer = getattr(winfo, "layer", section.layer)
        if u_type is _UpdateType.DEL and (section.direction is None or abs(section.layer - layer) > 1):
            freed = section.freed.setdefault(layer, np.zeros(len(PARTS), np.int64))
            freed[PARTS.index(_KINDS.get(winfo.reftype, "activations"))] += winfo.mem_consumed

    def begin_at_layers(self, layers: Sequence[torch.nn.Module]) -> None:
        """Begin a section where a layer's forward pass begins, and where the gradient of its output is known."""

        def enter(layer: int, *_: Any) -> None:
            if not self._mod_tracker.is_bw:  # a layer that is recomputed belongs to its backward pass
                self.begin("forward", layer)

        def leave(layer: int, _: torch.nn.Module, inputs: Any, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if not self._mod_tracker.is_bw and output.requires_grad:
                output.register_hook(lambda _: self.begin("backward", layer))  # type: ignore[no-untyped-call]

        for number, layer in enumerate(layers):  # before the hooks of FSDP2, which gather weights
            layer.register_forward_pre_hook(partial(enter, number), prepend=True)
            layer.register_forward_hook(partial(leave, number), prepend=True)

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

    def _in_use(self, moment: Literal["current", "peak"]) -> NDArray[np.int64]:
        return np.array(list(self.bytes_by_part(moment).values()), np.int64)

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
        super().__init__(next(module for module in model.modules() if isinstance(module, FSDPModule)))

    def _count_gradient(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        super()._update_and_maybe_create_winfos(weight.grad, _FSDPRefType.UNSHARDED_GRAD)

    def _update_and_maybe_create_winfos(
        self, t: torch.Tensor, reftype: _RefType, update_existing: bool = False
    ) -> set[Any]:
        if reftype is _FSDPRefType.UNSHARDED_PARAM and t.requires_grad and not t._post_accumulate_grad_hooks:
            t.register_post_accumulate_grad_hook(self._count_gradient)  # type: ignore[no-untyped-call]
        return super()._update_and_maybe_create_winfos(t, reftype, update_existing)
