"""Stop a run on a loss or gradient that is not finite, on an update without a list, and on an incomplete epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from rankllm_composer.errors import RunError, counted
from rankllm_composer.escaping import in_one_line
from rankllm_composer.screen import say
from rankllm_composer.training.run_files import TRAINED_LISTS

MAX_IDS_SHOWN = 20


class LossGuard(Callback):
    """Check loss and gradient before the optimizer step; stop every rank if any is not finite.

    Composer's NaNMonitor checks only the loss, ignores infinity, and stops one rank after the step.

    Args:
        max_skipped_updates: number of optimizer steps in a run that are skipped instead, and counted as
            `loss/skipped_updates`, across resumptions. The learning rate advances as usual.
    Raises:
        RunError: on every rank.
    """

    def __init__(self, max_skipped_updates: int = 0) -> None:
        self.max_skipped_updates = max_skipped_updates
        self.num_skipped = 0
        self._microbatches: list[tuple[list[str], torch.Tensor]] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        self._microbatches = []

    def after_loss(self, state: State, logger: Logger) -> None:
        loss: Any = state.loss
        total = loss["total"] if isinstance(loss, Mapping) else loss
        self._microbatches.append((list(state.batch["record_ids"]), total.detach().isfinite().all()))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        weights = [(name, weight.grad) for name, weight in state.model.named_parameters() if weight.requires_grad]
        gradients = [part for _, gradient in weights if gradient is not None for part in [_local(gradient)]]
        finite = [is_finite for _, is_finite in self._microbatches]
        if any(part.numel() for part in gradients):
            largest = torch.nn.utils.get_total_norm([part for part in gradients if part.numel()], math.inf)
            finite.append(largest.isfinite())
        # One reduction, and one wait for the device: is anything not finite, and how many ranks have each gradient?
        has_gradient = torch.tensor([gradient is not None for _, gradient in weights], dtype=torch.int32)
        is_bad = ~torch.stack(finite).all()
        flags = torch.cat([is_bad.to(torch.int32).reshape(1), state.device.tensor_to_device(has_gradient)])
        dist.all_reduce(flags, reduce_operation="SUM")
        num_bad, *counts = flags.tolist()
        _check_gradients(state, [name for name, _ in weights], counts)
        if num_bad:
            self._refuse(state, torch.stack(finite[: len(self._microbatches)]).tolist())
        if self.num_skipped:
            logger.log_metrics({"loss/skipped_updates": self.num_skipped})

    def _refuse(self, state: State, finite: list[bool]) -> None:
        bad_ids = [name for (ids, _), is_finite in zip(self._microbatches, finite) if not is_finite for name in ids]
        all_ids = [name for ids, _ in self._microbatches for name in ids]
        parts = dist.all_gather_object((bad_ids, all_ids))
        where = "; ".join(f"rank {rank}: {_shown(ids)}" for rank, (ids, _) in enumerate(parts) if ids)
        if where:
            problem = f"the loss is not finite ({where})"
        else:
            ids = [name for _, ids in parts for name in ids]
            problem = f"the gradient is not finite although all losses are (lists of the batch: {_shown(ids)})"
        if self.num_skipped >= self.max_skipped_updates:
            skipped = f", after {self.num_skipped} skipped updates" if self.num_skipped else ""
            raise RunError(
                f"batch {state.timestamp.batch.value + 1}: {problem}{skipped}; the weights are unchanged since the "
                "previous batch. Inspect these lists, then resume from the last checkpoint: with a lower optimizer.lr "
                "and 'run.accept_changes=[optimizer.lr]', or with a higher optimizer.max_skipped_updates."
            )
        self.num_skipped += 1
        for weight in state.model.parameters():
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_skipped = int(state["num_skipped"])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a sharded tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _shown(ids: list[str]) -> str:
    more = f" and {len(ids) - MAX_IDS_SHOWN} more" if len(ids) > MAX_IDS_SHOWN else ""
    return in_one_line(ids[:MAX_IDS_SHOWN]) + more


def _check_gradients(state: State, names: list[str], counts: list[int]) -> None:
    """Raise RunError if a trained weight has a gradient on some ranks only.

    Ranks would have reduced the gradients of different weights as one, as in a model whose tokens choose its layers.

    Args:
        names, counts: each weight, and the number of ranks on which it has a gradient.
    """
    differing = [name for name, count in zip(names, counts) if 0 < count < dist.get_world_size()]
    if differing:
        raise RunError(
            f"batch {state.timestamp.batch.value + 1}: {len(differing)} weights, such as {differing[0]}, have a "
            "gradient on some ranks only, so the gradients of the ranks were mixed up; the weights are unchanged since "
            "the previous batch. Train this model on one rank."
        )


class EpochGuard(Callback):
    """Count and log the lists of each epoch; stop the run if an epoch was incomplete or an update has no list.

    Logs after each batch, for the epoch so far and over all ranks: `data/lists_trained`, `data/lists_too_long`. Rank 0
    prints them at the end of each epoch. An epoch that the Trainer cuts short (`train_subset_num_batches`) is counted
    but not checked.

    Raises:
        RunError: on every rank: before an update, all its lists are too long; after an epoch, lists are missing.
    """

    def __init__(self) -> None:
        self._counts = dict.fromkeys(TRAINED_LISTS, 0) | {"padding": 0}
        self._total = 0
        self._rows: list[Any] = []
        self._batch: Mapping[str, int] = {}
        self.latest: dict[str, int] = {}
        """Lists trained and left out in the epoch of the latest batch, by the names of `TRAINED_LISTS`, and "total":
        those trained in all epochs."""

    def batch_start(self, state: State, logger: Logger) -> None:
        self._rows = state.batch["sequences"]

    def before_forward(self, state: State, logger: Logger) -> None:
        self._batch = state.batch["num_rows"]
        if not self._batch["trained"]:
            parts = dist.all_gather_object([row.record_id for row in self._rows if row.record_id])
            ids = [name for part in parts for name in part]
            raise RunError(
                f"batch {state.timestamp.batch.value + 1}: all its lists are longer than data.max_length_tokens "
                f"({_shown(ids)}), so the update would learn from none. Raise data.max_length_tokens, or "
                "start a new run on shards with fewer words per passage, or with more lists per batch."
            )

    def fit_start(self, state: State, logger: Logger) -> None:
        sample_in_epoch = state.timestamp.sample_in_epoch.value
        if sum(self._counts.values()) != sample_in_epoch:  # resumed from a checkpoint without these counts
            self._counts = {"trained": min(sample_in_epoch, _epoch_size(state)), "too_long": 0, "padding": 0}

    def batch_end(self, state: State, logger: Logger) -> None:
        for name in self._counts:
            self._counts[name] += self._batch[name]
        self._total += self._batch["trained"]
        self.latest = {name: self._counts[name] for name in TRAINED_LISTS} | {"total": self._total}
        logger.log_metrics({metric: self._counts[name] for name, metric in TRAINED_LISTS.items()})

    def epoch_end(self, state: State, logger: Logger) -> None:
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        if state.dataloader_len is None or int(state.dataloader_len) < len(state.train_dataloader):  # type: ignore[arg-type]
            return
        num_read, expected = counts["trained"] + counts["too_long"], _epoch_size(state)
        epoch = state.timestamp.epoch.value  # counted from 1, as the progress line does
        if num_read != expected:
            raise RunError(
                f"epoch {epoch}: {num_read} lists were read ({counts['too_long']} of them too long); expected "
                f"{expected}. The input ended early: check the shards (rankllm-composer shards verify), then resume "
                "from the last checkpoint."
            )
        if dist.get_global_rank() == 0:
            left_out = f"{counts['too_long']:,} left out as longer than data.max_length_tokens"
            say(f"epoch {epoch}: {counted(counts['trained'], 'list')} trained, {left_out}")

    def state_dict(self) -> dict[str, Any]:
        return {**self._counts, "total": self._total, "latest": self.latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._counts = {name: int(state[name]) for name in self._counts}
        self._total = int(state["total"])
        self.latest = {name: int(number) for name, number in state.get("latest", {}).items()}


def _epoch_size(state: State) -> int:
    return int(state.train_dataloader.dataset.epoch_size)  # type: ignore[union-attr]
