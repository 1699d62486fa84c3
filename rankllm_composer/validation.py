"""How well the model ranks while it trains: held-out windows by both decodings, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist

from rankllm_composer.evaluation import DECODINGS, Decoding, evaluate_windows, summarise
from rankllm_composer.weights import hf_module

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankllm_composer.contract import DecodingContract
    from rankllm_composer.prompts import Record

PREFIX = "eval/"


class Validation(Callback):
    """Ranks windows every so many epochs or batches, and at the end; logs what `evaluation.summarise` tells.

    The figures are of the windows of all ranks, each counted once, and the same on every rank.

    Args:
        records: this rank's share of the windows; ranks may have different numbers, or none.
        tokenizer: of the model.
        contract: how the model is read.
        interval: Composer time string.
        decodings: "first_token", "generation" or both.
        batch_tokens: tokens in one forward pass.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        tokenizer: PreTrainedTokenizerBase,
        contract: DecodingContract,
        interval: str,
        decodings: Sequence[Decoding] = DECODINGS,
        batch_tokens: int = 16384,
    ) -> None:
        self.figures: dict[str, float] = {}
        self._records = records
        self._tokenizer = tokenizer
        self._contract = contract
        self._decodings = tuple(decodings)
        self._batch_tokens = batch_tokens
        self._is_due = create_interval_scheduler(interval, checkpoint_events=False, final_events={Event.BATCH_END})

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event in (Event.BATCH_END, Event.EPOCH_END) and self._is_due(state, event):
            model: Any = hf_module(state.model)
            own = evaluate_windows(
                model,
                self._tokenizer,
                self._records,
                self._contract,
                decodings=self._decodings,
                batch_tokens=self._batch_tokens,
                lockstep=dist.get_world_size() > 1,
            )
            every = [result for share in dist.all_gather_object(own) for result in share]
            self.figures = {PREFIX + name: value for name, value in summarise(every).items()}
            logger.log_metrics(self.figures)
