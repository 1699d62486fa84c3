"""A machine that is taken away: a signal, a checkpoint at the next batch, a clean end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from composer.core import Callback
from composer.utils import dist

from rankllm_composer.clean_stop import Preempted

if TYPE_CHECKING:
    from composer.core import State
    from composer.loggers import Logger


class Preemption(Callback):
    """Stops all ranks at the next batch boundary once any of them got SIGTERM, or lost the launcher that started it.

    Stands behind the callbacks that write. At the last batch of an epoch the stop waits for what the end of the epoch
    does.

    Args:
        save: writes a checkpoint of a state, where there is none; a collective.
        ends_epoch: whether the batch just trained is the last of its epoch.
    Raises:
        Preempted: on every rank, after the checkpoint.
    """

    def __init__(self, save: Callable[[State], None], ends_epoch: Callable[[State], bool]) -> None:
        self.save = save
        self.ends_epoch = ends_epoch
        self._launcher = os.getppid()
        self._is_asked = self._is_agreed = False
        self._handler_before: Any = signal.SIG_DFL

    def fit_start(self, state: State, logger: Logger) -> None:
        del state, logger
        self._handler_before = signal.signal(signal.SIGTERM, self._ask)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        del logger
        asked = torch.tensor([self._is_asked or os.getppid() != self._launcher], dtype=torch.int32)
        asked = state.device.tensor_to_device(asked)
        dist.all_reduce(asked, reduce_operation="MAX")
        self._is_agreed = bool(asked.item())
        if self._is_agreed and not self.ends_epoch(state):
            self._stop(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        del logger
        if self._is_agreed:
            self._stop(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        del state, logger
        signal.signal(signal.SIGTERM, self._handler_before)

    def _ask(self, number: int, frame: object) -> None:
        del number, frame
        self._is_asked = True

    def _stop(self, state: State) -> None:
        self.save(state)
        raise Preempted(
            f"asked to stop (SIGTERM, or the launcher is gone): stopped after batch {state.timestamp.batch.value} "
            "with a checkpoint of it; start again with the same command to go on from there"
        )


def stop_where_nothing_is_lost(number: int, frame: object) -> None:
    """Answer to SIGTERM before and after training.

    Raises:
        Preempted: at once.
    """
    del number, frame
    raise Preempted(
        "asked to stop (SIGTERM) where there is nothing to save; start again with the same command to go on from there"
    )


def ignore_sigterm(worker: int) -> None:
    """What a loader worker does first: a signal to the whole process group is the trainer's to answer."""
    del worker
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
