"""Exports while training: a Hugging Face folder per epoch, with a link to the best one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist

from rankllm_composer.distributed import run_on_rank_zero
from rankllm_composer.errors import ModelError
from rankllm_composer.export.model_card import CardFacts, render_card
from rankllm_composer.export.model_folder import BEST, DTYPES, ServedModel, local_path, write_model_folder
from rankllm_composer.export.weights import Weights, causal_lm_class, gather_full_state_dict, hf_module
from rankllm_composer.prompts.client_names import warn_misread
from rankllm_composer.recipe.resume import read_changes
from rankllm_composer.screen import get_logger, warn
from rankllm_composer.training.guards import EpochGuard
from rankllm_composer.training.progress import ends_epoch

log = get_logger(__name__)


class ExportFolder(Callback):
    """Export the model every few epochs or batches, and at the end of training.

    Folders are named `epoch_K`, K from 0, or `batch_N` in the middle of an epoch. All ranks gather the weights; rank 0
    writes them, and its errors are raised on every rank. Place it before the callback that writes checkpoints: a run
    killed during an export then resumes before it and exports again.

    Args:
        model: what every folder holds besides weights and card.
        facts: of the model card; progress and figures are filled in.
        interval: Composer time string in epochs or batches.
        merge_lora: False = export the adapter without the model that it changes.
        figures: number of batches trained → figures of the weights of that moment, empty if they were not measured;
            None = the Trainer's evaluation metrics.
        best_by: name of a figure, without its `eval/`; `best` in the folder is a link to the export with the highest
            one, the first of equals. None = no link.
        recipe_folder: where the run's recipe is, with the record of its changes for the card; None = no record.
    Raises:
        ModelError: the interval has another unit, or the folder is not local.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: ServedModel,
        facts: CardFacts,
        interval: str = "1ep",
        merge_lora: bool = True,
        figures: Callable[[int], Mapping[str, float]] | None = None,
        best_by: str | None = None,
        recipe_folder: Path | None = None,
    ) -> None:
        self.folder = local_path(folder)
        self.model = model
        self.facts = facts
        self.merge_lora = merge_lora
        self.figures = figures
        self.best_by = best_by
        self.recipe_folder = recipe_folder
        self._best = -math.inf
        self._interval = Time.from_input(interval, TimeUnit.EPOCH)
        if self._interval.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH) or self._interval.value < 1:
            raise ModelError(f"interval is {interval!r}; expected epochs or batches, such as 1ep or 100ba")
        self._last_batch = -1

    def init(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            warn_misread(self.folder)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        # After the last batch of an epoch, `epoch_checkpoint` exports and names the folder.
        stops_here = _is_finished(state) and not ends_epoch(state)
        if stops_here or (self._interval.unit == TimeUnit.BATCH and batch % self._interval.value == 0):
            self._export(state, f"batch_{batch}")

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        epoch = state.timestamp.epoch.value
        if _is_finished(state) or (self._interval.unit == TimeUnit.EPOCH and epoch % self._interval.value == 0):
            self._export(state, f"epoch_{epoch - 1}")

    def _export(self, state: State, name: str) -> None:
        if state.timestamp.batch.value == self._last_batch:
            return
        weights = gather_full_state_dict(state.model, merge_lora=self.merge_lora, dtype=DTYPES[self.model.dtype])
        target = self.folder / name
        run_on_rank_zero(lambda: self._write(state, target, weights), f"export of {target}")
        if self.best_by is not None:
            best, figure = self.folder / BEST, self._figures(state).get(f"eval/{self.best_by}")
            if figure is None and dist.get_global_rank() == 0:
                warn(f"best_by: no metric {self.best_by!r} at {name}; {best} is unchanged", stacklevel=2)
            if figure is not None and figure > self._best:
                self._best = figure
                run_on_rank_zero(lambda: _link(best, name), f"link to {target}")
        self._last_batch = state.timestamp.batch.value
        log.info("exported %s", target)

    def _figures(self, state: State) -> dict[str, float]:
        figures = state.eval_metric_values if self.figures is None else self.figures(state.timestamp.batch.value)
        return {name: float(value) for name, value in figures.items()}

    def _write(self, state: State, target: Path, weights: Weights) -> None:
        inner: Any = hf_module(state.model)
        adapters = getattr(inner, "peft_config", None)
        progress = f"{target.name} (after {state.timestamp.batch.value} batches)"
        counts = next((ours.latest for ours in state.callbacks if isinstance(ours, EpochGuard)), {})
        changes = () if self.recipe_folder is None else read_changes(self.recipe_folder)
        facts = replace(
            self.facts, progress=progress, figures=self._figures(state), trained_lists=counts, changes=changes
        )
        model = replace(
            self.model,
            model_class=causal_lm_class(inner),
            adapter_config=next(iter(adapters.values())) if adapters and not self.merge_lora else None,
        )
        write_model_folder(target, weights, model, render_card(facts))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "best_by": self.best_by}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("best_by", self.best_by) == self.best_by:
            self._best = state["best"]


def _link(link: Path, target: str) -> None:
    """Create or change a link atomically."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


def _is_finished(state: State) -> bool:
    elapsed = state.get_elapsed_duration()
    return elapsed is not None and elapsed.value >= 1.0
