"""Exports while training: a Hugging Face folder per epoch, with a link to the best one."""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist

from rankllm_composer.distributed import run_on_rank_zero
from rankllm_composer.errors import counted, shown_path
from rankllm_composer.export.model_card import CardFacts, render_card
from rankllm_composer.export.model_folder import (
    BEST,
    DTYPES,
    ServedModel,
    check_export,
    exported_bytes,
    exports_in,
    is_whole,
    local_path,
    write_model_folder,
)
from rankllm_composer.export.weights import Weights, causal_lm_class, gather_full_state_dict, hf_module, meta_state_dict
from rankllm_composer.prompts.client_names import warn_misread
from rankllm_composer.recipe.resume import read_changes
from rankllm_composer.recipe.sections import Export
from rankllm_composer.screen import doing, get_logger, warn
from rankllm_composer.training.folders import EXPORT_NAME, export_of_another_run
from rankllm_composer.training.guards import EpochGuard
from rankllm_composer.training.progress import ends_epoch

log = get_logger(__name__)


class ExportFolder(Callback):
    """Export the model every few epochs or batches, and at the end of training.

    Folders are named `epoch_K`, K from 0, or `batch_N`. A checkpoint of the same step is written first; a run that
    resumes from it makes up for an export that failed, was killed, or is gone. All ranks gather the weights; rank 0
    writes them, and its errors are raised on every rank. Place it before the callback that writes checkpoints, and
    after those whose state a checkpoint holds.

    Args:
        model: what every folder holds besides weights and card.
        facts: of the model card; progress and figures are filled in.
        options: when to export and what to keep; its folder is not used.
        save: collective that writes a checkpoint of a state unless there is one.
        figures: number of batches trained → figures of the weights of that moment, empty if they were not measured;
            None = the Trainer's evaluation metrics.
        best_by: name of a figure, without its `eval/`; `best` in the folder is a link to the export with the highest
            one, the first of equals. None = no link.
        recipe_folder: where the run's recipe is, with the record of its changes for the card; None = no record.
    Raises:
        ModelError: the folder is not local.
        StoreError: on rank 0: the folder holds exports of another run, or a folder could not be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: ServedModel,
        facts: CardFacts,
        options: Export | None = None,
        save: Callable[[State], None] = lambda state: None,
        figures: Callable[[int], Mapping[str, float]] | None = None,
        best_by: str | None = None,
        recipe_folder: Path | None = None,
    ) -> None:
        options = options or Export()
        self.folder = local_path(folder)
        self.model = model
        self.facts = facts
        self.interval = options.interval
        self.keep = options.keep
        self.merge_lora = options.merge_lora
        self.save = save
        self.figures = figures
        self.best_by = best_by
        self.recipe_folder = recipe_folder
        self._interval = Time.from_input(options.interval, TimeUnit.EPOCH)
        self._run = secrets.token_hex(8)  # a checkpoint restores it
        self._best: dict[str, Any] = {"figure": -math.inf, "name": None}
        self._measured: dict[str, Any] = {"batch": -1}  # figures and counts of the newest export, for its card
        self._last_batch = -1

    # --- when ---------------------------------------------------------------------------------------------------------

    def init(self, state: State, logger: Logger) -> None:
        run = [self._run]
        dist.broadcast_object_list(run, src=0)
        self._run = run[0]
        if dist.get_global_rank() == 0:
            warn_misread(self.folder, self.model.contract.client_version)

    def after_load(self, state: State, logger: Logger) -> None:
        """Refuse the exports of another run, and make up for an export that is due but not there."""
        run_on_rank_zero(self._check_own, f"check of {self.folder}")
        name = self._name(state) if state.timestamp.batch.value > 0 else None
        is_missing = [name is not None and dist.get_global_rank() == 0 and not is_whole(self.folder / name)]
        dist.broadcast_object_list(is_missing, src=0)
        if name is not None and is_missing[0]:
            self._export(state, name)
        else:
            run_on_rank_zero(self._tidy, f"exports in {self.folder}")

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        # After the last batch of an epoch, `epoch_checkpoint` exports: a checkpoint is written only then.
        if not ends_epoch(state):
            self._export_if_due(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._export_if_due(state)

    def _export_if_due(self, state: State) -> None:
        name = self._name(state)
        if name is None or state.timestamp.batch.value == self._last_batch:
            return
        figures = self._figures(state)
        lists = next((ours.latest for ours in state.callbacks if isinstance(ours, EpochGuard)), {})
        self._measured = {"batch": state.timestamp.batch.value, "figures": figures, "lists": dict(lists)}
        if self.best_by is not None:
            figure = figures.get(f"eval/{self.best_by}")
            if figure is None and dist.get_global_rank() == 0:
                best = shown_path(self.folder / BEST)
                warn(f"best_by: no metric {self.best_by!r} at {name}; {best} is unchanged", stacklevel=2)
            if figure is not None and figure > self._best["figure"]:
                self._best = {"figure": figure, "name": name}
        self.save(state)
        self._export(state, name)

    def _name(self, state: State) -> str | None:
        """Name of the export that is due after the batch just trained; None if none is."""
        batch, epoch = state.timestamp.batch.value, state.timestamp.epoch.value
        ends = state.timestamp.batch_in_epoch.value == 0
        if self._interval.unit == TimeUnit.BATCH and batch % self._interval.value == 0:
            return f"batch_{batch}"
        if ends and (
            _is_finished(state) or (self._interval.unit == TimeUnit.EPOCH and not epoch % self._interval.value)
        ):
            return f"epoch_{epoch - 1}"
        return f"batch_{batch}" if _is_finished(state) else None

    # --- what ---------------------------------------------------------------------------------------------------------

    def try_out(self, state: State) -> None:
        """Try everything that an export needs except for the weights, in a temporary folder. A collective.

        Raises:
            ModelError: what would be exported does not fit together, or cannot be saved and loaded.
            StoreError: the folder cannot be written.
        """
        weights = meta_state_dict(state.model, merge_lora=self.merge_lora)
        run_on_rank_zero(lambda: self._try_out(state, weights), f"dry run of an export to {self.folder}")

    def _try_out(self, state: State, weights: Weights) -> None:
        card = render_card(replace(self.facts, progress="dry run"))
        check_export(self.folder, weights, self._served(state), card)

    def num_bytes(self, state: State) -> int:
        """Return the size of one export's weights."""
        return exported_bytes(meta_state_dict(state.model, merge_lora=self.merge_lora), self.model.dtype)

    def _export(self, state: State, name: str) -> None:
        target = self.folder / name
        with doing(f"exporting {shown_path(target)}"):
            weights = gather_full_state_dict(state.model, merge_lora=self.merge_lora, dtype=DTYPES[self.model.dtype])
            run_on_rank_zero(lambda: self._write(state, target, weights), f"export of {target}")
            run_on_rank_zero(self._tidy, f"exports in {self.folder}")
        self._last_batch = state.timestamp.batch.value
        log.info("exported %s", target)

    def _figures(self, state: State) -> dict[str, float]:
        figures = state.eval_metric_values if self.figures is None else self.figures(state.timestamp.batch.value)
        return {name: float(value) for name, value in figures.items()}

    def _write(self, state: State, target: Path, weights: Weights) -> None:
        batch = state.timestamp.batch.value
        measured = self._measured if self._measured["batch"] == batch else {}
        changes = () if self.recipe_folder is None else read_changes(self.recipe_folder)
        progress = f"{target.name} (after {counted(batch, 'batch')})"
        facts = replace(
            self.facts,
            progress=progress,
            figures=measured.get("figures", {}),
            trained_lists=measured.get("lists", {}),
            changes=changes,
        )
        write_model_folder(target, weights, self._served(state), render_card(facts), run=self._run, batch=batch)

    def _served(self, state: State) -> ServedModel:
        inner: Any = hf_module(state.model)
        adapters = getattr(inner, "peft_config", None)
        return replace(
            self.model,
            model_class=causal_lm_class(inner),
            adapter_config=next(iter(adapters.values())) if adapters and not self.merge_lora else None,
        )

    def _tidy(self) -> None:
        """Link the best export, and remove those beyond the newest `keep`."""
        link, best = self.folder / BEST, self._best["name"]
        if best is not None and (self.folder / best).is_dir() and not (link.is_symlink() and link.readlink() == best):
            _link(link, best)
        ours = self.own()
        for name in ours[: -self.keep] if self.keep > 0 else ():
            if not (link.is_symlink() and link.readlink().name == name):
                shutil.rmtree(self.folder / name, ignore_errors=True)
                log.info("removed %s", self.folder / name)

    def own(self) -> list[str]:
        """Return the names of the exports of this run, the oldest first."""
        return [name for name, content in exports_in(self.folder).items() if content and content.run == self._run]

    def _check_own(self) -> None:
        """Refuse a folder with exports of another run, which this one would replace."""
        for name, content in exports_in(self.folder).items():
            if EXPORT_NAME.fullmatch(name) and (content is None or content.run != self._run):
                raise export_of_another_run(self.folder / name)

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        # As text: of a sharded checkpoint, only names that the new process has too would be read.
        content = {"best_by": self.best_by, "best": self._best, "measured": self._measured}
        return {"run": self._run, "content": json.dumps(content)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        content = json.loads(state["content"])
        self._run, self._measured = state["run"], content["measured"]
        if content["best_by"] == self.best_by:
            self._best = content["best"]


def _link(link: Path, target: str) -> None:
    """Create or change a link atomically."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


def _is_finished(state: State) -> bool:
    elapsed = state.get_elapsed_duration()
    return elapsed is not None and elapsed.value >= 1.0
