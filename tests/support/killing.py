"""Start runs, kill them at a chosen moment, and compare their results with those of uninterrupted runs."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch

from rankllm_composer.checkpoints.folder import MANIFEST
from support.launching import TRAIN
from support.warm_python import WarmProcess

NOT_COMPARED = ("batch_seconds", "tokens_per_second")


class Run:
    """A started `composer -n RANKS train.py …` that can be watched and killed.

    Args:
        recipe: path of the recipe.
        overrides: `key=value` arguments; the run's folder is `run` in `folder`.
        folder: working directory.
        ranks: number of ranks.
        is_patient: start it with `python -m rankllm_composer.launch` instead of `composer`.
        on_terminal: let it write to a terminal of its own; only where `is_warm`.
        is_warm: fork its processes from one that has imported the libraries, instead of starting Python anew.
    """

    def __init__(
        self,
        recipe: Path,
        overrides: list[str],
        folder: Path,
        ranks: int = 2,
        *,
        is_patient: bool = False,
        on_terminal: bool = False,
        is_warm: bool = True,
    ) -> None:
        self.folder = folder
        self.temporary = folder / "temporary"  # separate, so that its leftovers are known
        self.temporary.mkdir(parents=True, exist_ok=True)
        self._output = folder / f"output-{len(list(folder.glob('output-*.txt')))}.txt"  # an earlier run may still write
        output = self._output.open("wb")
        launcher = ["-m", "rankllm_composer.launch" if is_patient else "composer.cli.launcher"]
        command = [*launcher, "-n", str(ranks), TRAIN, recipe, *overrides, "run.folder=run"]
        environment = {**os.environ, "TMPDIR": str(self.temporary)}
        self._terminal, slave = os.openpty() if on_terminal else (-1, output.fileno())
        if is_warm:
            self.process: WarmProcess | subprocess.Popen[bytes] = WarmProcess(
                command, slave, folder=folder, environment=environment, new_session=True, terminal=on_terminal
            )
        else:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=slave,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        self._copying: tuple[int, threading.Thread] | None = None
        if on_terminal:  # open here until the run has ended: without any writer, reading from it fails
            self._copying = (slave, threading.Thread(target=self._copy_terminal, args=[output], daemon=True))
            self._copying[1].start()
        else:
            output.close()

    def _copy_terminal(self, output: BinaryIO) -> None:
        readable = select.poll()  # select.select takes no descriptor above 1,023, which a whole test run can exceed
        readable.register(self._terminal, select.POLLIN)
        with contextlib.suppress(OSError):
            while readable.poll() and (text := os.read(self._terminal, 4096)):
                output.write(text)
                output.flush()

    def close_terminal(self) -> None:
        self._stop_writing()
        os.close(self._terminal)

    def _stop_writing(self) -> threading.Thread | None:
        """Close this end of the terminal that the run writes to; the thread that copies it ends with the run."""
        if self._copying is None:
            return None
        slave, thread = self._copying
        self._copying = None
        os.close(slave)
        return thread

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def wait_until(self, moment: Callable[[], bool], timeout: float = 1800) -> None:
        """Wait until `moment()`; fail if the run ends before."""
        deadline = time.monotonic() + timeout
        while not moment():
            assert self.process.poll() is None, f"ended too early:\n{self.output()}"
            assert time.monotonic() < deadline, f"timed out:\n{self.output()}"
            time.sleep(0.005)

    def batches(self) -> int:
        """Number of batches trained so far, over all starts."""
        path = self.folder / "run" / "metrics.jsonl"
        return sum(1 for _ in path.open()) if path.exists() else 0

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        folder = self.folder / "run" / "checkpoints"
        staged = {name for name in _names_in(folder / ".partial") if name.startswith("ep")}
        # The dry run at startup writes one of the step that it starts from.
        return bool(staged - {"ep0-ba0"} - set(_names_in(folder)))

    def is_exporting(self) -> bool:
        """Whether a model folder is being written."""
        return any(".partial-" in name for name in _names_in(self.folder / "run" / "hf"))

    def is_pruning(self) -> bool:
        """Whether a checkpoint is being removed."""
        folder = self.folder / "run" / "checkpoints"
        return any(name.startswith("ep") and not (folder / name / MANIFEST).exists() for name in _names_in(folder))

    def is_building(self) -> bool:
        """Whether shards are being built."""
        return (self.folder / "shards" / ".building").exists()

    def ranks(self) -> list[psutil.Process]:
        """The living training processes, rank 0 first."""
        return _children(self.process.pid)

    def living_launcher(self) -> list[psutil.Process]:
        """The launcher, unless it has ended."""
        return [psutil.Process(self.process.pid)] if self.process.poll() is None else []

    def workers(self) -> list[psutil.Process]:
        """The loader workers of all ranks."""
        return [child for rank in self.ranks() for child in _children(rank.pid) if not _is_tracker(child)]

    def shared_memory(self) -> set[Path]:
        """Shared-memory segments that the processes of the run have open."""
        maps = []
        for process in processes_of_session(self.process.pid):
            with contextlib.suppress(OSError):  # the process has ended
                maps += Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        paths = {Path(line.split(maxsplit=5)[-1]) for line in maps}
        return {path for path in paths if path.parent == Path("/dev/shm")}

    def locks(self) -> list[Path]:
        """Lock files of the run, or of killed ones."""
        return [path for name in ("names-*", "cache-*", "*_filelock") for path in self.temporary.rglob(name)]

    def leftovers(self) -> list[Path]:
        """What is left in the temporary directory, beside the private folder of the user."""
        return [path for path in self.temporary.rglob("*") if not path.name.startswith("rankllm_composer-")]

    def finish(self, timeout: float = 1800) -> int:
        """Return the launcher's exit code once every process of the run is gone; fail if one stays."""
        code = self.process.wait(timeout)
        deadline = time.monotonic() + 300
        while left := [process.pid for process in processes_of_session(self.process.pid)]:
            assert time.monotonic() < deadline, f"left behind: {left}\n{self.output()}"
            time.sleep(0.05)
        if (copying := self._stop_writing()) is not None:
            copying.join(60)
        return code


def processes_of_session(session: int) -> Iterator[psutil.Process]:
    """Yield living processes that a launcher started, including children of its dead children."""
    for process in psutil.process_iter(["status"]):
        try:
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                yield process
        except ProcessLookupError:
            pass


def _children(process: int) -> list[psutil.Process]:
    """Living children of a process, the oldest first; none if it has ended."""
    try:
        living = [child for child in psutil.Process(process).children() if child.status() != psutil.STATUS_ZOMBIE]
        return sorted(living, key=lambda child: (child.create_time(), child.pid))
    except psutil.NoSuchProcess:
        return []


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208
    except OSError:
        return []


def _is_tracker(process: psutil.Process) -> bool:
    """Whether this is the helper process of Python that removes shared memory."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True


def kill(processes: list[psutil.Process], number: int = signal.SIGKILL) -> bool:
    """Send a signal to processes; return whether one of them was alive."""
    was_alive = False
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            was_alive = True
    return was_alive


def comparable_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl without values that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in NOT_COMPARED} for line in lines]


def checkpoint_content(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint by dotted name, without times and identities (weights, optimizer, …)."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = checkpoint / "rank0.pt"
    if not path.exists():
        path = checkpoint.parent / f"{checkpoint.name}.unsharded"
        dcp_to_torch_save(checkpoint, path)
    flat = dict(_flatten(torch.load(path, weights_only=False), ""))
    return {name: value for name, value in flat.items() if not name.endswith(("_wct", ".repr", "ExportFolder.run"))}


def _flatten(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _flatten(value, f"{prefix}.{name}")
    elif isinstance(tree, list | tuple) and len(tree) < 100:
        for index, value in enumerate(tree):
            yield from _flatten(value, f"{prefix}.{index}")
    else:
        yield prefix, tree


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names whose values differ in any bit, or that only one has."""
    return sorted(one.keys() ^ other.keys()) + [n for n in one.keys() & other.keys() if not _same(one[n], other[n])]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one.tolist() == other.tolist() if hasattr(one, "tolist") else one == other
