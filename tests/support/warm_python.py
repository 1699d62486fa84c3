"""Run Python commands in processes that have imported the large libraries already: see workers/warm_python.py."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SERVER = Path(__file__).parents[1] / "workers" / "warm_python.py"


class WarmProcess:
    """A started command, with as much of the interface of `subprocess.Popen` as is used.

    Args:
        command: arguments of Python.
        output: descriptor that receives standard output and error.
        folder: current folder.
        environment: variables; those that libraries read when imported have no effect.
        new_session: whether it leads a session.
        terminal: whether `output` is the terminal of this session.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        output: int,
        *,
        folder: Path,
        environment: Mapping[str, str] = os.environ,
        new_session: bool = False,
        terminal: bool = False,
    ) -> None:
        self.returncode: int | None = None
        request = {
            "command": [sys.executable, *map(str, command)],
            "folder": str(folder),
            "environment": dict(environment),
            "new_session": new_session,
            "terminal": terminal,
        }
        self.pid = _server().start(request, output)

    def poll(self) -> int | None:
        """Return the exit code if the process has ended."""
        if self.returncode is None:
            self.returncode = _server().ended(self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a warm process", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Server:
    """The process that is forked, started once per process of pytest."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen([sys.executable, SERVER], stdin=theirs, start_new_session=True)
        theirs.close()
        self._ended: dict[int, int] = {}
        atexit.register(self._close)

    def start(self, request: Mapping[str, Any], output: int) -> int:
        socket.send_fds(self._socket, [json.dumps(request).encode()], [output])
        while "started" not in (answer := self._receive()):
            pass
        started: int = answer["started"]
        self._ended.pop(started, None)  # of an earlier process with this number
        return started

    def ended(self, process: int) -> int | None:
        self._socket.setblocking(False)
        try:
            while True:
                self._receive()
        except BlockingIOError:
            return self._ended.get(process)
        finally:
            self._socket.setblocking(True)

    def _receive(self) -> dict[str, int]:
        message = self._socket.recv(1 << 16)
        assert message, "the server of warm processes has ended"
        answer: dict[str, int] = json.loads(message)
        if "ended" in answer:
            self._ended[answer["ended"]] = answer["code"]
        return answer

    def _close(self) -> None:
        self._socket.close()
        self._process.wait()


_servers: list[_Server] = []


def _server() -> _Server:
    if not _servers:
        _servers.append(_Server())
    return _servers[0]
