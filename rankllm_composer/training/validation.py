"""How well the model ranks while it trains: held-out windows by both decodings, shared out over the ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist

from rankllm_composer.export.weights import hf_module
from rankllm_composer.options import DECODINGS
from rankllm_composer.ranking.evaluation import (
    EvaluationOptions,
    evaluate_windows,
    position_matrix,
    summarize,
    window_ndcg,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankllm_composer.prompts.contract import DecodingContract
    from rankllm_composer.prompts.record import Record

PREFIX = "eval/"
EVALUATIONS_FILE = "evaluations.jsonl"


class Validation(Callback):
    """Rank windows at an interval and at the end of training; log the figures of `evaluation.summarize`.

    The figures are of the windows of all ranks, each counted once, and the same on every rank.

    Args:
        records: this rank's share of the windows; ranks may have different numbers, or none.
        interval: Composer time string.
        options: how the windows are ranked; None for the defaults.
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
        details: Path | None = None,
    ) -> None:
        self.figures: dict[str, float] = {}
        self._records = records
        self._tokenizer = tokenizer
        self._contract = contract
        self._options = options
        self._details = details
        self._last_batch = -1
        ends = {Event.BATCH_END, Event.EPOCH_END}  # of training, depending on the unit of its duration
        self._is_due = create_interval_scheduler(interval, checkpoint_events=False, final_events=ends)

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        # At the end of training, both the batch and the epoch are due.
        if event in (Event.BATCH_END, Event.EPOCH_END) and self._is_due(state, event) and batch != self._last_batch:
            self._last_batch = batch
            model: Any = hf_module(state.model)
            results = evaluate_windows(
                model, self._tokenizer, self._records, self._contract, self._options, lockstep=dist.get_world_size() > 1
            )
            results = [result for part in dist.all_gather_object(results) for result in part]
            self.figures = {PREFIX + name: value for name, value in summarize(results).items()}
            logger.log_metrics(self.figures)
            if self._details is not None and dist.get_global_rank() == 0:
                positions = {name: position_matrix(results, name) for name in DECODINGS}
                details = {
                    "batch": batch,
                    "epoch": state.timestamp.epoch.value,
                    "ndcg@10": {result.id: window_ndcg(result) for result in results},
                    "positions": {name: counts.tolist() for name, counts in positions.items() if counts.size},
                }
                with self._details.open("a") as file:
                    file.write(json.dumps(details) + "\n")

    def figures_after(self, num_batches: int) -> dict[str, float]:
        """Return the figures of the model after `num_batches`; empty if it was not evaluated then."""
        return self.figures if num_batches == self._last_batch else {}


def read_details(path: Path) -> Iterator[dict[str, Any]]:
    """Read the results of evaluations, by batch; of a batch evaluated again after resuming, the last one.

    Yields:
        batch, epoch; "ndcg@10": window → "presented" or decoding → figure, of windows with a relevant candidate;
        "positions": decoding → counts, see `position_matrix`.
    """
    results = {}
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError, RecursionError):  # incomplete line of a killed run, which is written again
            details = json.loads(line)
            if isinstance(details, dict) and type(details.get("batch")) is int:
                results[details["batch"]] = details
    yield from (results[batch] for batch in sorted(results))
