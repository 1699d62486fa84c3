"""Start Python programs in processes that have imported the large libraries already.

A launcher and its ranks are forked, where they would be executed otherwise. All else is as in a run of a user: the
code of the launchers, the tree of processes, signals, files, and every module of this package, which each process
imports anew. Only the libraries are shared, whose import takes about ten seconds of CPU time in every process.

Requests come over the socket with descriptor 0 as {"command", "folder", "environment", "new_session", "terminal"}, with
the file or terminal for the output. The answers are {"started": PID} and {"ended": PID, "code": CODE}.
"""

from __future__ import annotations

import atexit
import fcntl
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import peft  # noqa: F401
import streaming  # noqa: F401
import torch
import torch.distributed.checkpoint.format_utils
import torch.distributed.fsdp
import transformers.models.llama.tokenization_llama_fast
import transformers.models.mistral.modeling_mistral  # noqa: F401
from composer.cli import launcher
from composer.core import engine
from composer.utils import checkpoint

OURS = ("rankllm_composer", "support", "__main__")


class Forked:
    """A process that runs a Python command, with as much of the interface of `subprocess.Popen` as is used.

    Args:
        command: path of Python, then `-m` and a module or the path of a script, then arguments.
        stdout, stderr: files, None = those of this process; stderr may be `subprocess.STDOUT`.
        folder: current folder; None = that of this process.
        environment: None = that of this process.
        new_session: whether the process leads a session.
        terminal: whether `stdout` is the terminal of this session.
        text: has no effect.
    """

    def __init__(
        self,
        command: list[Any],
        stdout: Any = None,
        stderr: Any = None,
        text: bool = True,
        *,
        folder: str | None = None,
        environment: dict[str, str] | None = None,
        new_session: bool = False,
        terminal: bool = False,
    ) -> None:
        self.args, self.stdout, self.stderr = command, None, None
        self.returncode: int | None = None
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if stdout is not None:
                os.dup2(stdout.fileno(), 1)
            if stderr is not None:
                os.dup2(1 if stderr == subprocess.STDOUT else stderr.fileno(), 2)
            if new_session:
                os.setsid()
            if terminal:
                os.dup2(1, 0)
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            if folder is not None:
                os.chdir(folder)
            if environment is not None:
                os.environ.clear()
                os.environ.update(environment)
            _become(list(map(str, command[1:])))

    def poll(self) -> int | None:
        """Return the exit code if the process has ended."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _become(arguments: list[str]) -> None:
    """Run a module or script as a new interpreter would, and end this process."""
    os.closerange(3, 4096)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    is_module = arguments[0] == "-m"
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    sys.argv = arguments[is_module:]
    sys.path[0] = str(Path.cwd() if is_module else Path(arguments[0]).absolute().parent)
    tempfile.tempdir = None
    # Composer computes the name of a rank's file when it is imported.
    checkpoint._TORCH_DISTRIBUTED_CHECKPOINTS_FILENAME = f"__{os.environ.get('RANK', 0)}_0.distcp"
    _OLD_STREAMS.extend((sys.stdout, sys.stderr))
    raw = {number: io.FileIO(number, "w", closefd=False) for number in (1, 2)}
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(
        raw[1] if os.environ.get("PYTHONUNBUFFERED") else io.BufferedWriter(raw[1]), "utf-8", write_through=True
    )
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(raw[2], "utf-8", "backslashreplace", write_through=True)
    torch.seed(), numpy.random.seed()
    os._exit(_run(arguments, is_module))


_OLD_STREAMS: list[Any] = []  # kept, because they would close their descriptors


def _run(arguments: list[str], is_module: bool) -> int:
    code = 0
    try:
        if arguments[:2] == ["-m", "composer.cli.launcher"]:
            # The import of Composer, which has happened before, sets these.
            signal.signal(signal.SIGTERM, engine.sigterm_handler)
            signal.signal(signal.SIGINT, engine.sigterm_handler)
            sys.exit(launcher.main())
        elif is_module:
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException as failure:
        sys.excepthook(type(failure), failure, failure.__traceback__)
        code = 130 if isinstance(failure, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code & 0xFF


def serve(requests: socket.socket) -> None:
    """Start what is asked for until the other side closes the socket, and then end what still runs."""
    processes: list[Forked] = []
    while True:
        readable, _, _ = select.select([requests], [], [], 0.02 if processes else None)
        for process in [process for process in processes if process.poll() is not None]:
            processes.remove(process)
            requests.send(json.dumps({"ended": process.pid, "code": process.returncode}).encode())
        if not readable:
            continue
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 1)
        if not message:
            break
        with os.fdopen(descriptors[0], "wb") as output:
            asked = json.loads(message)
            process = Forked(asked.pop("command"), output, subprocess.STDOUT, **asked)
        processes.append(process)
        requests.send(json.dumps({"started": process.pid}).encode())
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)


if __name__ == "__main__":
    launcher.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})  # type: ignore[attr-defined]
    # A copy of the socket: in the processes, descriptor 0 is an empty standard input.
    connection = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    serve(connection)
