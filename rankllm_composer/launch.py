"""Composer's launcher with enough time to write a checkpoint; same arguments as `composer`.

    python -m rankllm_composer.launch -n 8 rankllm_composer/train.py yamls/first_mistral.yaml

On SIGTERM, `composer` forwards it to its ranks and kills them 30 s later, possibly in the middle of a checkpoint. This
launcher waits until they exit by themselves, and treats SIGHUP (a closed terminal) and an interrupt (Ctrl-C) alike; a
second interrupt leaves them 10 s. After a failure it waits no longer than `composer` does, and it prints no traceback
of its own around the error of a rank.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rankllm_composer.errors import RunError
from rankllm_composer.processes import LAUNCHER_VARIABLE, drop_closed_outputs
from rankllm_composer.screen import doing, report, say
from rankllm_composer.storage.scratch import temporary_files_in_scratch

STOP_TIMEOUT = datetime.timedelta(hours=1)
STOP_AT_ONCE = datetime.timedelta(seconds=10)
REPORTED_BY_RANKS = (2, 130)
"""Exit codes of a rank that has said itself why it ends."""
OTHER_MACHINES = ("WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which the launcher trains on several machines."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the ranks of this machine and wait for them. Returns the exit code.

    Args:
        arguments: of the launcher; None = those of this process.
    """
    given = sys.argv
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    try:
        with temporary_files_in_scratch():  # of the libraries, and the output of the ranks
            if arguments is not None:
                sys.argv = ["composer", *arguments]
            return _launch()
    except ValueError as error:  # arguments that contradict each other
        report(f"error: {error}")
        return 2
    finally:
        sys.argv = given
        del os.environ[LAUNCHER_VARIABLE]


def _launch() -> int:
    with doing("starting the ranks"):
        from composer.cli import launcher

    asked: list[datetime.datetime] = []

    def wait_for_checkpoints(number: int, frame: object) -> None:
        for stop in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(stop, signal.SIG_IGN)  # a second signal would make it give up
        drop_closed_outputs()
        asked.append(datetime.datetime.now())
        if len(asked) == 2:  # a second interrupt, which the ranks have got too
            launcher.CLEANUP_TIMEOUT = asked[1] - asked[0] + STOP_AT_ONCE
            return
        launcher.CLEANUP_TIMEOUT = STOP_TIMEOUT
        raise KeyboardInterrupt  # the launcher handles this as a request to stop

    # Composer sets handlers when imported that make the launcher print a traceback of where it waited.
    signal.signal(signal.SIGTERM, wait_for_checkpoints)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
        signal.signal(signal.SIGHUP, wait_for_checkpoints)
    signal.signal(signal.SIGINT, wait_for_checkpoints)
    launcher.log.addFilter(_is_news)
    print_exit_status = launcher._print_process_exit_status

    def print_once(global_rank: int, process: subprocess.Popen[str]) -> None:
        """Of a rank that ended with a readable error, print only that: rank 0 has printed its own."""
        if process.returncode not in REPORTED_BY_RANKS:
            print_exit_status(global_rank, process)
        elif process.stderr is not None:
            process.stderr.seek(0)
            if errors := [line.rstrip() for line in process.stderr if line.startswith("error: ")]:
                report("\n".join(errors))

    launcher._print_process_exit_status = print_once
    with _only_news_from(launcher):
        return int(launcher.main())


@contextlib.contextmanager
def _only_news_from(launcher: Any) -> Iterator[None]:
    """Leave out in this context what the launcher prints at the end of every run, and on an interrupt."""
    launcher.print = lambda text: None if text.startswith(("Waiting up to", "Ctrl-C received")) else say(text)
    try:
        yield
    finally:
        del launcher.print


def train_arguments(recipe: Path, overrides: Sequence[str], num_ranks: int | None) -> list[str]:
    """The launcher's arguments that train a recipe on this machine.

    Args:
        num_ranks: None = one per GPU, or one without a GPU.
    Raises:
        RunError: the environment holds variables of a launcher, left over from another run.
    """
    left = [name for name in ("RANK", "LOCAL_RANK") if name in os.environ]
    if "WORLD_SIZE" in os.environ and not all(name in os.environ for name in OTHER_MACHINES):
        left.append("WORLD_SIZE")
    if left:
        shown = " ".join(f"{name}={shlex.quote(os.environ[name])}" for name in left)
        raise RunError(
            f"the environment has {shown}; expected no variables of another launcher. Unset {', '.join(left)}; on "
            f"several machines set {', '.join(OTHER_MACHINES)} and nothing else."
        )
    number = [] if num_ranks is None else ["-n", str(num_ranks)]
    return [*number, str(Path(__file__).with_name("train.py")), str(recipe), *overrides]


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log line of the launcher says more than that a rank ended with a readable error."""
    text = record.getMessage()
    return not any(f"exit code {code}." in text or text.endswith(f"with code {code}") for code in REPORTED_BY_RANKS)


if __name__ == "__main__":
    sys.exit(main())
