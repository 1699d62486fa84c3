"""Stop all ranks together: within seconds after a failure, or with a checkpoint on request."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from rankllm_composer.checkpoints.folder import complete_checkpoints
from rankllm_composer.distributed import seconds_without_progress
from rankllm_composer.processes import (
    drop_closed_outputs,
    end_with_parent,
    has_launcher,
    launcher_is_gone,
    machine,
    start_of,
)
from rankllm_composer.screen import report, status
from rankllm_composer.training.progress import ends_epoch

POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0
"""How long a rank may take to notice by itself that another one is gone, and to exit after it failed."""

NOTICE_SECONDS = 60.0
"""How long before a collective times out a rank without progress is reported, at most a quarter of the timeout."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Requests to stop: SIGTERM from a scheduler or a launcher, SIGHUP from a terminal that is closed."""

STOP_REQUESTED = "stop requested (SIGTERM, SIGHUP, or the launcher is gone)"

RESUME = "checkpoints are intact; rerun the same command to resume"
NOTHING_SAVED = "no checkpoint was written yet"


def describe_saved(checkpoints: Path, num_trained: Callable[[], int]) -> str:
    """Say what is lost if a run ends now, and what to do.

    Args:
        checkpoints: folder of the run's checkpoints on this machine.
        num_trained: returns the number of batches trained.
    """
    saved, trained = complete_checkpoints(checkpoints), num_trained()
    if not saved:
        lost = f", so the batches trained are lost ({trained})" if trained else ", and no batch was trained"
        return f"{NOTHING_SAVED}{lost}; rerun the same command to start again"
    path, manifest = saved[-1]
    again = f", from {path.name}: batches after it are trained again ({trained - manifest.batch})"
    return RESUME + (again if trained > manifest.batch else "")


class Preempted(Exception):
    """The run stopped on request, after it wrote a checkpoint if there was anything to save.

    Args:
        code: exit code; 130 after an interrupt, so that a shell does not go on.
    """

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class Peer(NamedTuple):
    """Another rank of this run on this machine."""

    rank: int
    process: int
    started: float | None

    def is_alive(self) -> bool:
        return self.started is not None and start_of(self.process) == self.started


class PeerWatch:
    """End this rank when another one on its machine has died, even if a collective would wait forever.

    A rank that notices the loss by itself, as an error of a collective, exits normally; any other is ended after
    `GRACE_SECONDS`. A rank whose launcher is gone is asked to stop, as by SIGTERM.

    Args:
        end: ends the process with an exit code, immediately.
    Attributes:
        find_stragglers: called after a collective timed out; returns which ranks it waited for, or "".
        find_hindmost: called before that; returns which ranks are furthest behind, or "".
        saved: returns what is lost if the run ends now, and what to do.
    """

    def __init__(self, end: Callable[[int], object] = os._exit) -> None:
        self.rank = 0
        self.peers: list[Peer] = []
        self.find_stragglers: Callable[[], str] = str
        self.find_hindmost: Callable[[], str] = str
        self.saved: Callable[[], str] = lambda: RESUME
        self._end = end
        self._started, self._stopped = threading.Event(), threading.Event()

    def watch_launcher(self) -> None:
        """Watch the launcher, if there is one. Handlers of `STOP_SIGNALS` have to be in place."""
        if has_launcher():
            threading.Thread(target=self._await_launcher, name="launcher watch", daemon=True).start()

    def start(self, timeout_seconds: float) -> None:
        """Watch the other ranks on this machine, and the progress of this one. A collective.

        Args:
            timeout_seconds: longest wait for a collective.
        """
        self.rank, here, process = dist.get_global_rank(), machine(), os.getpid()
        everyone = dist.all_gather_object((here, Peer(self.rank, process, start_of(process))))
        self._started.set()
        self.watch([peer for other, peer in everyone if other == here and peer.rank != self.rank])
        if len(everyone) > 1:
            self.watch_progress(timeout_seconds)

    def watch(self, peers: list[Peer]) -> None:
        self.peers = peers
        if peers:
            threading.Thread(target=self._look, name="peer watch", daemon=True).start()

    def watch_progress(self, timeout_seconds: float) -> None:
        """Report a rank that does not progress before a collective times out.

        A collective of gloo then raises an error, which this rank reports. NCCL ends the process by itself.
        """
        threading.Thread(target=self._await_progress, args=[timeout_seconds], name="progress", daemon=True).start()

    def stop(self) -> None:
        """Stop watching: from here on, ranks end one by one."""
        self._stopped.set()

    def lost(self, wait_seconds: float = 0.0) -> list[Peer]:
        """Return the peers that have died; wait up to `wait_seconds` for the first."""
        deadline = time.monotonic() + wait_seconds
        while not (gone := [peer for peer in self.peers if not peer.is_alive()]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return gone

    def exit_code(self, failure: BaseException) -> int:
        """Report a failure once, on the right rank, and make sure that this process ends within `GRACE_SECONDS`.

        Rank 0 reports an error that all ranks have. A failure caused by the death of another rank is reported as such.

        Returns:
            Exit code: 130 for an interrupt, 2 for an error that a user can correct, 1 for anything else.
        """
        self.stop()
        drop_closed_outputs()
        status.stop()
        is_interrupt = isinstance(failure, KeyboardInterrupt)
        if self.peers or is_interrupt:
            on_stop_signals(signal.SIG_IGN)  # the launcher sends one to the remaining ranks
        code = 130 if is_interrupt else 2 if isinstance(failure, ValueError) else 1
        patience = GRACE_SECONDS if self.rank else GRACE_SECONDS / 4  # rank 0 reports first, then exits
        gone = self.lost(patience) if code == 1 or (code == 2 and self.rank) else []
        if code == 130:
            if self.rank == 0:
                report(f"error: interrupted; {self.saved()}")
        elif any(peer.rank == 0 for peer in gone) or (self.rank and str(failure).startswith("rank 0, ")):
            report(f"rank {self.rank}: stopped because rank 0 failed")
        elif code == 1 and gone:
            report(lost_ranks_message(self.rank, gone, self.saved()))
        elif code == 2:
            report(f"error: rank {self.rank}: {failure}" if self.rank else f"error: {failure}")
            if (saved := self.saved()).startswith(f"{NOTHING_SAVED}, so"):
                report(saved)
        else:
            report("".join(traceback.format_exception(failure)).rstrip())
            stragglers = self.find_stragglers() if "timed out" in str(failure).lower() else ""
            waited = f"; it waited for {stragglers}" if stragglers else ""
            report(f"error: rank {self.rank}: {type(failure).__name__}: {failure}{waited}; {self.saved()}")
        return self._end_soon(code)

    def exit_preempted(self, request: Preempted) -> int:
        """Report a stop on request, on rank 0, and end this process within `GRACE_SECONDS`. Returns its exit code."""
        self.stop()
        drop_closed_outputs()
        status.stop()
        if self.rank == 0:
            report(str(request))
        return self._end_soon(request.code)

    def _end_soon(self, code: int) -> int:
        """End this process after `GRACE_SECONDS`, if it has peers and still runs. Returns the exit code."""

        def end_later() -> None:
            time.sleep(GRACE_SECONDS)
            self._end(code)

        if self.peers:
            threading.Thread(target=end_later, name="end", daemon=True).start()
        return code

    def _await_launcher(self) -> None:
        while not launcher_is_gone():
            if self._stopped.wait(POLL_SECONDS):
                return
        os.kill(os.getpid(), signal.SIGTERM)
        # A rank that waits for the others to connect would not notice; later, one that waits for them ends with them.
        if not self._started.wait(GRACE_SECONDS) and not self._stopped.is_set():
            report(f"rank {self.rank}: {STOP_REQUESTED} before the run started")
            self._end(1)

    def _await_progress(self, timeout_seconds: float) -> None:
        limit = timeout_seconds - min(NOTICE_SECONDS, timeout_seconds / 4)
        is_reported = False
        while not self._stopped.wait(POLL_SECONDS):
            seconds = seconds_without_progress()
            if seconds >= limit and not is_reported:
                hindmost = self.find_hindmost()
                report(
                    f"rank {self.rank}: no progress for {seconds:.0f} s; if it waits for another rank, "
                    f"parallelism.dist_timeout_seconds={timeout_seconds:g} ends the run. Furthest behind: "
                    f"{hindmost or 'unknown before the first batch'}; {self.saved()}"
                )
            is_reported = seconds >= limit

    def _look(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            gone = self.lost()
            if gone and not self._stopped.wait(GRACE_SECONDS):
                report(lost_ranks_message(self.rank, gone, self.saved()))
                self._end(1)
                return


def lost_ranks_message(rank: int, gone: list[Peer], saved: str) -> str:
    """Explain that a rank stops because others died; `saved` says what is lost."""
    ranks = " and ".join(f"rank {peer.rank} (process {peer.process})" for peer in gone)
    return (
        f"error: rank {rank}: {ranks} died. Its own error, if any, is printed above; otherwise it was killed, possibly "
        f"by the OOM killer; {saved}"
    )


def on_stop_signals(handler: Any) -> dict[int, Any]:
    """Handle `STOP_SIGNALS`; SIGHUP stays ignored where it is (nohup). Returns the handlers before."""
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, earlier in before.items():
        if number != signal.SIGHUP or earlier != signal.SIG_IGN:
            signal.signal(number, handler)
    return before


class Preemption(Callback):
    """Stop all ranks at the next batch boundary after any of them got one of `STOP_SIGNALS`, or an interrupt (Ctrl-C).

    A second interrupt raises KeyboardInterrupt at once.

    Place it after the callbacks that write files. After the last batch of an epoch it stops once the callbacks of the
    end of the epoch have run.

    Args:
        save: collective that writes a checkpoint of a state unless there is one.
        announce: called on rank 0 once a stop is requested.
        saved: returns what is lost if the run ends now.
    Raises:
        Preempted: on every rank, after the checkpoint.
    """

    def __init__(
        self,
        save: Callable[[State], None],
        announce: Callable[[], None] = lambda: None,
        saved: Callable[[int], str] = str,
    ) -> None:
        self.save = save
        self.announce = announce
        self.saved = saved
        self._num_trained = 0
        self._is_requested = self._is_interrupted = self._is_agreed = False
        self._handlers_before: dict[int, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        self._handlers_before = on_stop_signals(self._request)
        self._handlers_before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        self._num_trained = state.timestamp.batch.value

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._num_trained = state.timestamp.batch.value
        ours = 2 if self._is_interrupted else int(self._is_requested)
        requested = state.device.tensor_to_device(torch.tensor([ours], dtype=torch.int32))
        dist.all_reduce(requested, reduce_operation="MAX")
        self._is_agreed, self._is_interrupted = bool(requested.item()), requested.item() == 2
        if self._is_agreed and not ends_epoch(state):
            self._stop(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._is_agreed:
            self._stop(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self._is_requested = True
        drop_closed_outputs()
        if dist.get_global_rank() == 0:
            self.announce()

    def _interrupt(self, number: int, frame: object) -> None:
        if self._is_interrupted:
            raise KeyboardInterrupt
        self._is_interrupted = True
        self._request(number, frame)
        if dist.get_global_rank() == 0:
            with suppress(RuntimeError):  # it came in the middle of printing
                report(
                    "interrupted: stopping after this batch, with a checkpoint. Press Ctrl-C again to stop at once: "
                    f"{self.saved(self._num_trained)}"
                )

    def _stop(self, state: State) -> None:
        self.save(state)
        why, code = ("interrupted (Ctrl-C)", 130) if self._is_interrupted else (STOP_REQUESTED, 0)
        raise Preempted(
            f"{why}: wrote a checkpoint after batch {state.timestamp.batch.value}; rerun the same command to resume",
            code,
        )


def raise_preempted(number: int, frame: object) -> None:
    """Handle `STOP_SIGNALS` before and after training, when there is nothing to save."""
    del number, frame
    raise Preempted(f"{STOP_REQUESTED} outside training, nothing to save; rerun the same command to resume")


def start_worker(worker: int) -> None:
    """Initialize a loader worker: it ends with its rank, and leaves requests to stop to the rank."""
    del worker
    end_with_parent()
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
