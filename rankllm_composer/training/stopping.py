"""Stop all ranks together: within seconds after a failure, or with a checkpoint on request."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from rankllm_composer.distributed import seconds_without_progress
from rankllm_composer.processes import (
    drop_closed_outputs,
    end_with_parent,
    has_launcher,
    launcher_is_gone,
    machine,
    start_of,
)
from rankllm_composer.screen import report
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


class Preempted(Exception):
    """The run stopped on request, after it wrote a checkpoint if there was anything to save."""


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
    """

    def __init__(self, end: Callable[[int], object] = os._exit) -> None:
        self.rank = 0
        self.peers: list[Peer] = []
        self.find_stragglers: Callable[[], str] = str
        self.find_hindmost: Callable[[], str] = str
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
        if self.peers:
            on_stop_signals(signal.SIG_IGN)  # the launcher sends one to the remaining ranks
        code = 130 if isinstance(failure, KeyboardInterrupt) else 2 if isinstance(failure, ValueError) else 1
        patience = GRACE_SECONDS if self.rank else GRACE_SECONDS / 4  # rank 0 reports first, then exits
        gone = self.lost(patience) if code == 1 or (code == 2 and self.rank) else []
        if code == 130:
            if self.rank == 0:
                report(f"error: interrupted; {RESUME}")
        elif any(peer.rank == 0 for peer in gone) or (self.rank and str(failure).startswith("rank 0, ")):
            report(f"rank {self.rank}: stopped because rank 0 failed")
        elif code == 1 and gone:
            report(lost_ranks_message(self.rank, gone))
        elif code == 2:
            report(f"error: rank {self.rank}: {failure}" if self.rank else f"error: {failure}")
        else:
            report("".join(traceback.format_exception(failure)).rstrip())
            stragglers = self.find_stragglers() if "timed out" in str(failure).lower() else ""
            waited = f"; it waited for {stragglers}" if stragglers else ""
            report(f"error: rank {self.rank}: {type(failure).__name__}: {failure}{waited}; {RESUME}")
        return self._end_soon(code)

    def exit_preempted(self, request: Preempted) -> int:
        """Report a stop on request, on rank 0, and end this process within `GRACE_SECONDS`. Returns exit code 0."""
        self.stop()
        drop_closed_outputs()
        if self.rank == 0:
            report(str(request))
        return self._end_soon(0)

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
                    f"{hindmost or 'unknown before the first batch'}; {RESUME}"
                )
            is_reported = seconds >= limit

    def _look(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            gone = self.lost()
            if gone and not self._stopped.wait(GRACE_SECONDS):
                report(lost_ranks_message(self.rank, gone))
                self._end(1)
                return


def lost_ranks_message(rank: int, gone: list[Peer]) -> str:
    """Explain that a rank stops because others died."""
    ranks = " and ".join(f"rank {peer.rank} (process {peer.process})" for peer in gone)
    return (
        f"error: rank {rank}: {ranks} died. Its own error, if any, is printed above; otherwise it was killed, possibly "
        f"by the OOM killer; {RESUME}"
    )


def on_stop_signals(handler: Any) -> dict[int, Any]:
    """Handle `STOP_SIGNALS`; SIGHUP stays ignored where it is (nohup). Returns the handlers before."""
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, earlier in before.items():
        if number != signal.SIGHUP or earlier != signal.SIG_IGN:
            signal.signal(number, handler)
    return before


class Preemption(Callback):
    """Stop all ranks at the next batch boundary after any of them got one of `STOP_SIGNALS`.

    Place it after the callbacks that write files. After the last batch of an epoch it stops once the callbacks of the
    end of the epoch have run.

    Args:
        save: collective that writes a checkpoint of a state unless there is one.
        announce: called on rank 0 once a stop is requested.
    Raises:
        Preempted: on every rank, after the checkpoint.
    """

    def __init__(self, save: Callable[[State], None], announce: Callable[[], None] = lambda: None) -> None:
        self.save = save
        self.announce = announce
        self._is_requested = self._is_agreed = False
        self._handlers_before: dict[int, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        self._handlers_before = on_stop_signals(self._request)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        requested = state.device.tensor_to_device(torch.tensor([self._is_requested], dtype=torch.int32))
        dist.all_reduce(requested, reduce_operation="MAX")
        self._is_agreed = bool(requested.item())
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

    def _stop(self, state: State) -> None:
        self.save(state)
        raise Preempted(
            f"{STOP_REQUESTED}: wrote a checkpoint after batch {state.timestamp.batch.value}; "
            "rerun the same command to resume"
        )


def raise_preempted(number: int, frame: object) -> None:
    """Handle `STOP_SIGNALS` before and after training, when there is nothing to save."""
    del number, frame
    raise Preempted(f"{STOP_REQUESTED} outside training, nothing to save; rerun the same command to resume")


def start_worker(worker: int) -> None:
    """Initialize a loader worker: it ends with its rank, and leaves requests to stop to the rank."""
    del worker
    end_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
