"""A dry run of what a run writes, before its first batch: what would fail after hours fails at once."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger

from rankllm_composer.distributed import run_on_rank_zero
from rankllm_composer.errors import StoreError
from rankllm_composer.export.weights import hf_module
from rankllm_composer.training.checkpoint_callback import CheckpointFolder
from rankllm_composer.training.export_callback import ExportFolder

ADAMW_BYTES = 8
"""Two float32 averages per trained number; 8-bit AdamW keeps them in a byte each."""


class DryRun(Callback):
    """Try a checkpoint and an export before the first batch, and check that the disks have space for one of each.

    Args:
        checkpoints, exports: what will write them.
    Raises:
        CheckpointError, ModelError, StoreError: see `try_out` of both; or a disk has too little space.
    """

    def __init__(self, checkpoints: CheckpointFolder, *exports: ExportFolder) -> None:
        self.checkpoints = checkpoints
        self.exports = exports

    def fit_start(self, state: State, logger: Logger) -> None:
        needed = {self.checkpoints.folder: ("checkpoint", checkpoint_bytes(state))}
        needed |= {exports.folder: ("export", exports.num_bytes(state)) for exports in self.exports}
        run_on_rank_zero(lambda: check_space(needed), "check of the disk space")
        self.checkpoints.try_out(state)
        for exports in self.exports:
            exports.try_out(state)


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


def check_space(needed: dict[Path, tuple[str, int]]) -> None:
    """Raise StoreError if a disk has less space than the folders on it need; call it in one process.

    Args:
        needed: folder → what is written there, and its bytes.
    """
    disks: defaultdict[int, list[tuple[Path, str, int]]] = defaultdict(list)
    for folder, (what, num_bytes) in needed.items():
        place = next(path for path in (folder, *folder.parents) if path.exists())
        disks[place.stat().st_dev].append((place, what, num_bytes))
    for writers in disks.values():
        place, total = writers[0][0], sum(num_bytes for _, _, num_bytes in writers)
        free = shutil.disk_usage(place).free
        if total > free:
            parts = " and ".join(f"{num_bytes / 1e9:.3g} GB for {what}s" for _, what, num_bytes in writers)
            raise StoreError(
                f"{place}: {free / 1e9:.3g} GB free, but one of each needs {parts}. Free space, or write elsewhere "
                "(run.folder, checkpoint.folder, checkpoint.export.folder)."
            )
