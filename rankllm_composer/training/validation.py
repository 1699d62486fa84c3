"""How well the model ranks while it trains: held-out windows by both decodings, shared out over the ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from composer.core import Callback, Event, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist

from rankllm_composer.errors import PromptError, RunError, counted
from rankllm_composer.export.weights import hf_module
from rankllm_composer.options import DECODINGS, Decoding
from rankllm_composer.prompts.identifier_tokens import identifier_token_ids, separator_token_ids
from rankllm_composer.prompts.lists import ListCounts, unreadable_decodings
from rankllm_composer.prompts.permutations import parse_permutation
from rankllm_composer.prompts.windows import record_window
from rankllm_composer.ranking.evaluation import (
    EvaluationOptions,
    WindowResult,
    evaluate_windows,
    position_matrix,
    summarize,
    window_ndcg,
)
from rankllm_composer.screen import doing, say
from rankllm_composer.storage.atomic import write_atomic
from rankllm_composer.training.run_files import PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankllm_composer.prompts.contract import DecodingContract
    from rankllm_composer.prompts.record import Record
    from rankllm_composer.recipe.sections import Evaluation


def measurable(
    evaluation: Evaluation, seed: int, tokenizer: PreTrainedTokenizerBase, contract: DecodingContract, lists: ListCounts
) -> tuple[EvaluationOptions, str | None, list[str]]:
    """Choose how windows of these kinds can be ranked: as the recipe says, or by the other decoding.

    Returns:
        How to rank; the name of the figure by which the best export is chosen; and a sentence for every change.
    Raises:
        RunError: neither decoding can rank them.
    """
    reasons = unreadable_decodings(tokenizer, contract.objective, lists)
    left: list[Decoding] = [name for name in evaluation.decodings if name not in reasons]
    left = left or [name for name in DECODINGS if name not in reasons]
    if not left:
        raise RunError(
            f"evaluation: no decoding can rank the windows of data.eval ({'; '.join(reasons.values())}). Build "
            "data.eval with the identifiers and the window of data.train, or set evaluation: null."
        )
    best_by, constrained = evaluation.best_by, evaluation.constrained
    sentences = []
    for name in evaluation.decodings:
        if name in reasons:
            sentences.append(
                f"evaluation.decodings: data.eval cannot be ranked by {name} and is ranked by {', '.join(left)} "
                f"instead: {reasons[name]}"
            )
            best_by = best_by and best_by.replace(f"{name}/", f"{left[0]}/")
    if best_by != evaluation.best_by:
        sentences.append(f"evaluation.best_by: the best export is chosen by {best_by} instead of {evaluation.best_by}")
    if constrained and "generation" in left:
        try:
            for style, size in lists:
                identifier_token_ids(tokenizer, size, style, contract.objective)
                separator_token_ids(tokenizer, style)
        except PromptError as error:
            constrained = False
            sentences.append(f"evaluation.constrained: answers are generated without constraints: {error}")
    options = EvaluationOptions(
        decodings=left,
        constrained=constrained and "generation" in left,
        num_shuffles=evaluation.num_shuffles,
        bias_decodings=("first_token",) if "first_token" in left else ("generation",),
        seed=seed,
    )
    return options, best_by, sentences


class Validation(Callback):
    """Rank windows at an interval and at the end of training; log the figures of `evaluation.summarize`.

    Every window is read, and one of each rank is ranked, before the first batch. The figures are of the windows of all
    ranks, each counted once, and the same on every rank.

    Args:
        records: this rank's share of the windows; ranks may have different numbers, or none.
        interval: Composer time string.
        options: how the windows are ranked; None for the defaults.
        best_by: figure by which the best export is chosen, if any; the export reads it here.
        patience: evaluations in a row without a new best figure after which the training ends, by the mechanism of
            Composer's EarlyStopper; None = it does not. A checkpoint holds the count.
        details: file to which rank 0 adds a line per evaluation, see `read_details`; None = not written.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        tokenizer: PreTrainedTokenizerBase,
        contract: DecodingContract,
        interval: str,
        options: EvaluationOptions | None = None,
        best_by: str | None = None,
        patience: int | None = None,
        details: Path | None = None,
    ) -> None:
        self.figures: dict[str, float] = {}
        self.best_by = best_by
        self.patience = patience
        self._watched: dict[str, Any] = {"best_by": best_by, "figure": None, "batch": 0, "num_since": 0}
        self._records = records
        self._tokenizer = tokenizer
        self._contract = contract
        self._options = options or EvaluationOptions()
        self._details = details
        self._last_batch = -1
        ends = {Event.BATCH_END, Event.EPOCH_END}  # of training, depending on the unit of its duration
        self._is_due = create_interval_scheduler(interval, checkpoint_events=False, final_events=ends)

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.AFTER_LOAD and self.has_stopped:  # before the checkpoint
            state.stop_training()
        if event == Event.FIT_START:
            with doing("ranking a first held-out window"):
                self._try_out(state)
        batch = state.timestamp.batch.value
        # At the end of training, both the batch and the epoch are due.
        if event in (Event.BATCH_END, Event.EPOCH_END) and self._is_due(state, event) and batch != self._last_batch:
            self._last_batch = batch
            with doing(f"ranking the held-out windows after batch {batch}"):
                results = self._rank(state, self._records, self._options)
                results = [result for part in dist.all_gather_object(results) for result in part]
            self.figures = {PREFIX + name: value for name, value in summarize(results).items()}
            logger.log_metrics(self.figures)
            self._watch(state)
            if self._details is not None and dist.get_global_rank() == 0:
                positions = {name: position_matrix(results, name) for name in DECODINGS}
                details = {
                    "batch": batch,
                    "epoch": state.timestamp.epoch.value,
                    "ndcg@10": {result.id: window_ndcg(result) for result in results},
                    "positions": {name: counts.tolist() for name, counts in positions.items() if counts.size},
                }
                _add_line(self._details, json.dumps(details), batch)

    @property
    def has_stopped(self) -> bool:
        """Whether the training ended, or has to end, because the figure did not rise."""
        return self.patience is not None and self._watched["num_since"] >= self.patience

    def _watch(self, state: State) -> None:
        watched, figure = self._watched, self.figures.get(f"{PREFIX}{self.best_by}")
        if figure is None:
            return
        if watched["figure"] is None or figure > watched["figure"]:
            watched.update(figure=figure, batch=state.timestamp.batch.value, num_since=0)
            return
        watched["num_since"] += 1
        if self.has_stopped:
            state.stop_training()
            if dist.get_global_rank() == 0:
                say(
                    f"stopped early at batch {state.timestamp.batch.value}: {self.best_by} has not risen above "
                    f"{watched['figure']:.4f} (batch {watched['batch']}) in "
                    f"{counted(watched['num_since'], 'evaluation')}"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"watched": json.dumps(self._watched)}  # as text, as of a sharded checkpoint only known names are read

    def load_state_dict(self, state: dict[str, Any]) -> None:
        watched = json.loads(state["watched"])
        if watched["best_by"] == self.best_by:
            self._watched = watched

    def _try_out(self, state: State) -> None:
        for record in self._records:
            window = record_window(record, self._tokenizer)
            parse_permutation(record.response, window.num_candidates, window.style)
            if self._options.num_shuffles:
                record_window(record, self._tokenizer, range(window.num_candidates))
        self._rank(state, self._records[:1], replace(self._options, num_shuffles=0))

    def _rank(self, state: State, records: Sequence[Record], options: EvaluationOptions) -> list[WindowResult]:
        model: Any = hf_module(state.model)
        lockstep = dist.get_world_size() > 1
        with training_precision(state):
            return evaluate_windows(model, self._tokenizer, records, self._contract, options, lockstep=lockstep)

    def figures_after(self, num_batches: int) -> dict[str, float]:
        """Return the figures of the model after `num_batches`; empty if it was not evaluated then."""
        return self.figures if num_batches == self._last_batch else {}


def training_precision(state: State) -> AbstractContextManager[None]:
    """The precision of the forward pass of training, for a forward pass of the HF model alone."""
    model = getattr(state.model, "module", state.model)  # without DDP around it
    if getattr(model, "bf16_on_cpu", False):  # by itself, in its own forward pass
        return torch.autocast("cpu", torch.bfloat16)
    return get_precision_context(state.precision, state.precision_config)


def _add_line(path: Path, line: str, batch: int) -> None:
    """Add a line to a file, which is replaced as a whole; what a killed writer left of a line stays apart."""
    try:
        content = path.read_bytes() if path.exists() else b""
        if content and not content.endswith(b"\n"):
            content += b"\n"
        write_atomic(path, content + line.encode() + b"\n")
    except OSError as error:
        raise RunError(
            f"{path}: the evaluation after batch {batch} could not be written ({error.strerror}); earlier checkpoints "
            "are intact. Free space or correct the permissions, then rerun the same command to resume."
        ) from error
