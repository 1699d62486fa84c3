"""A dry run of what a run writes, before its first batch: what would fail after hours fails at once. And of a run."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger

from rankllm_composer.checkpoints.folder import complete_checkpoints
from rankllm_composer.distributed import run_on_rank_zero
from rankllm_composer.errors import StoreError
from rankllm_composer.export.weights import hf_module
from rankllm_composer.screen import doing
from rankllm_composer.training.checkpoint_callback import CheckpointFolder
from rankllm_composer.training.export_callback import ExportFolder
from rankllm_composer.training.stopping import Preempted

ADAMW_BYTES = 8
"""Two float32 averages per trained number; 8-bit AdamW keeps them in a byte each."""


class Written(NamedTuple):
    """What a run writes to one folder: so many more at once than are there now, each of this size."""

    what: str
    number: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.number} {self.what}{'s' * (self.number > 1)} of {self.num_bytes / 1e9:.3g} GB"


class DryRun(Callback):
    """Try a checkpoint and an export before the first batch, and check that the disks have space for all that are kept.

    Args:
        checkpoints, exports: what will write them.
    Raises:
        CheckpointError, ModelError, StoreError: see `try_out` of both; or a disk has too little space.
    """

    def __init__(self, checkpoints: CheckpointFolder, *exports: ExportFolder) -> None:
        self.checkpoints = checkpoints
        self.exports = exports

    def fit_start(self, state: State, logger: Logger) -> None:
        sizes = [checkpoint_bytes(state), *(exports.num_bytes(state) for exports in self.exports)]
        run_on_rank_zero(lambda: check_space(self._written(state, sizes)), "check of the disk space")
        with doing("trying out a checkpoint and an export"):
            self.checkpoints.try_out(state)
            for exports in self.exports:
                exports.try_out(state)

    def _written(self, state: State, sizes: list[int]) -> dict[Path, Written]:
        """Count what is added to each folder; a new one is complete before an old one is removed."""
        ours, (num_bytes, *rest) = self.checkpoints, sizes
        count = most_added(times_left(state, ours.interval), len(complete_checkpoints(ours.folder)), ours.keep, 1)
        written = {ours.folder: Written("checkpoint", count, num_bytes)}
        for exports, num_bytes in zip(self.exports, rest):
            spare = 1 + (exports.best_by is not None)  # the best is kept as well
            count = most_added(times_left(state, exports.interval), len(exports.own()), exports.keep, spare)
            written[exports.folder] = Written("export", count, num_bytes)
        return written


class StopBeforeUpdate(Callback):
    """Stop a run after the loss and the gradient of its first batch, before the weights change. Place it last.

    Raises:
        Preempted: on every rank.
    """

    def after_train_batch(self, state: State, logger: Logger) -> None:
        loss: Any = state.loss
        losses = loss if isinstance(loss, Mapping) else {"total": loss}
        shown = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
        if state.device.name == "gpu":
            shown += f"; {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of this GPU, without the optimizer's state"
        raise Preempted(
            f"dry run: everything up to the first update worked (losses of a microbatch: {shown}). Nothing was trained "
            "and no checkpoint written. Leave out --dry-run to train."
        )


def times_left(state: State, interval: str) -> int:
    """Return how often an interval ends in what is left of a run, its end included; 1 if that is unknown."""
    every, end, done = Time.from_input(interval), state.max_duration, state.get_elapsed_duration()
    assert end is not None and done is not None
    if every.unit == TimeUnit.DURATION:
        return math.ceil((1 - done.value) / every.value)

    def batches(time: Time[int]) -> float | None:
        per_epoch = state.dataloader_len
        if time.unit == TimeUnit.EPOCH and per_epoch is not None:
            return float(time.value * per_epoch.value)
        return float(time.value) if time.unit == TimeUnit.BATCH else None

    run, part = (end.value, every.value) if every.unit == end.unit else (batches(end), batches(every))
    return 1 if run is None or part is None else math.ceil(run * (1 - done.value) / part)


def most_added(num_due: int, num_there: int, keep: int, spare: int) -> int:
    """Return how many more than now are there at once.

    Args:
        num_due: how many will be written.
        num_there: how many there are.
        keep: how many of the newest are kept; below 1 = all.
        spare: how many there are at times besides those.
    """
    return num_due if keep < 1 else max(0, min(num_due, keep + spare - num_there))


def checkpoint_bytes(state: State) -> int:
    """Estimate the size of a checkpoint: weights, or those of the adapters, and the averages of AdamW."""
    is_lora = hasattr(hf_module(state.model), "peft_config")
    is_8bit = any("8bit" in type(optimizer).__name__ for optimizer in state.optimizers)
    average_bytes = 2 if is_8bit else ADAMW_BYTES
    return sum(
        weight.numel() * (weight.element_size() + average_bytes * weight.requires_grad)
        for weight in state.model.parameters()
        if weight.requires_grad or not is_lora
    )


def check_space(written: dict[Path, Written]) -> None:
    """Raise StoreError if a disk has less space than the folders on it need; call it in one process."""
    disks: defaultdict[int, list[tuple[Path, Written]]] = defaultdict(list)
    for folder, files in written.items():
        place = next(path for path in (folder, *folder.parents) if path.exists())
        if files.number:
            disks[place.stat().st_dev].append((place, files))
    for writers in disks.values():
        place, total = writers[0][0], sum(files.number * files.num_bytes for _, files in writers)
        free = shutil.disk_usage(place).free
        if total > free:
            parts = " and ".join(str(files) for _, files in writers)
            raise StoreError(
                f"{place}: {free / 1e9:.3g} GB free, but the run adds {parts}, {total / 1e9:.3g} GB at once. Free "
                "space, keep fewer (checkpoint.keep, checkpoint.export.keep), or write elsewhere (run.folder, "
                "checkpoint.folder, checkpoint.export.folder)."
            )
