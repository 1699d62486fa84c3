"""Print, warn, log and show progress: without terminal escapes, and except on standard output without secrets."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rankllm_composer.escaping import for_screen
from rankllm_composer.redaction import redact

PLAIN_SECONDS = 30.0
"""Interval of the lines about one task where the output is no terminal."""

PLAIN_WIDTH = 80


def say(text: object, *, error: bool = False, escaped: bool = False, end: str = "\n") -> None:
    """Print text at once.

    Args:
        error: print to standard error, without secrets.
        escaped: the text went through `for_screen` before colors were added to it.
    """
    shown = str(text) if escaped else for_screen(text)
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = (redact(shown) if error else shown).encode(encoding, "backslashreplace").decode(encoding)
    status.erase()
    print(shown, file=stream, end=end, flush=True)


def say_json(value: object) -> None:
    """Print a value as JSON, in ASCII, so that it needs no other escapes."""
    say(json.dumps(value, indent=2, allow_nan=False))


def report(text: object) -> None:
    """Print text to standard error: progress, warnings and errors, beside the output of a command."""
    say(text, error=True)


def warn(text: str, category: type[Warning] = UserWarning, stacklevel: int = 1) -> None:
    """Issue a warning; `stacklevel` counts from the caller, as in `warnings.warn`."""
    status.erase()
    warnings.warn(redact(for_screen(text)), category, stacklevel=stacklevel + 1)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print the warnings of this package as `warning: TEXT`, without a place in its code, in this context."""
    before = warnings.formatwarning

    def plain(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        if Path(filename).is_relative_to(Path(__file__).parent):
            return f"warning: {message}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = before


def get_logger(name: str) -> logging.Logger:
    """The logger of a module."""
    log = logging.getLogger(name)
    if _escape not in log.filters:
        log.addFilter(_escape)
    return log


def _escape(record: logging.LogRecord) -> bool:
    status.erase()
    record.msg, record.args = redact(for_screen(record.getMessage())), ()
    return True


class StatusLine:
    """What a command is doing now, on standard error.

    On a terminal one line is redrawn in place every second, and erased before anything else is printed. Elsewhere a
    plain line is printed when a task begins, whenever one is due, and every 30 s. Of tasks inside each other the
    innermost is shown. Only rank 0 shows anything.

    Args:
        stream: output; None = standard error.
        tick_seconds: interval at which the line is redrawn by itself; None = never.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        plain_seconds: float = PLAIN_SECONDS,
        redraw_seconds: float = 0.2,
        tick_seconds: float | None = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._stream = stream
        self._plain_seconds = plain_seconds
        self._redraw_seconds = redraw_seconds
        self._tick_seconds = tick_seconds
        self.forget()

    def forget(self) -> None:
        """Start over, as in a forked process, which has neither the thread nor a free lock."""
        self._lock = threading.RLock()
        self._tasks: list[Callable[[], str]] = []
        self._is_drawn = False
        self._shown_at: float | None = None
        self._ticking: tuple[threading.Thread, threading.Event] | None = None

    def begin(self, text: Callable[[], str], *, is_short: bool = False) -> None:
        """Show a task by the text that `text` returns, until `end`; where it may be short, a plain line waits 2 s."""
        if os.environ.get("RANK", "0") != "0":
            return
        with self._lock:
            self._tasks.append(text)
            if is_short and not self._is_terminal:
                self._shown_at = self.clock() - self._plain_seconds + 2
            else:
                self.update(is_due=True)
            if self._ticking is None and self._tick_seconds is not None:
                stop = threading.Event()
                thread = threading.Thread(target=self._tick, args=[stop], name="status line", daemon=True)
                self._ticking = thread, stop
                thread.start()

    def end(self, text: Callable[[], str], *, keep: bool = False) -> None:
        """Show a task no longer; `keep` leaves its line on a terminal."""
        with self._lock:
            if text not in self._tasks:
                return
            self._tasks.remove(text)
            if keep and self._is_drawn:
                with suppress(OSError, ValueError):
                    print(file=self._output, flush=True)
                self._is_drawn = False
            self.erase()
        if not self._tasks:
            self.stop()

    def stop(self) -> None:
        """End all tasks."""
        with self._lock:
            self._tasks.clear()
            self.erase()
            ticking, self._ticking = self._ticking, None
        if ticking is not None:
            ticking[1].set()
            if ticking[0] is not threading.current_thread():
                ticking[0].join()

    def update(self, *, is_due: bool = False) -> None:
        """Show the innermost task now, or where it was shown lately and nothing is due, later."""
        with self._lock, suppress(OSError, ValueError):  # a terminal or a pipe that was closed does not end the work
            if not self._tasks:
                return
            now, on_terminal = self.clock(), self._is_terminal
            pause = self._redraw_seconds if on_terminal else self._plain_seconds
            if not is_due and self._shown_at is not None and now - self._shown_at < pause:
                return
            self._shown_at = now
            shown = redact(for_screen(self._tasks[-1](), one_line=True))
            if on_terminal:
                print(f"\r\x1b[K{shown[: self.width]}", file=self._output, end="", flush=True)
                self._is_drawn = True
            else:
                print(shown, file=self._output, flush=True)

    def erase(self) -> None:
        """Clear the line, so that something else can be printed."""
        with self._lock:
            if self._is_drawn:
                self._is_drawn = False
                with suppress(OSError, ValueError):
                    print("\r\x1b[K", file=self._output, end="", flush=True)

    @property
    def width(self) -> int:
        """Characters that fit."""
        return shutil.get_terminal_size().columns - 1 if self._is_terminal else PLAIN_WIDTH

    def fitted(self, parts: Sequence[str]) -> str:
        """As many parts, from the first on, as fit."""
        line = parts[0]
        for part in parts[1:]:
            if len(line) + 2 + len(part) > self.width:
                break
            line = f"{line}  {part}"
        return line

    def _tick(self, stop: threading.Event) -> None:
        while not stop.wait(self._tick_seconds):
            self.update()

    @property
    def _output(self) -> TextIO:
        return self._stream or sys.stderr

    @property
    def _is_terminal(self) -> bool:
        return self._output.isatty() and os.environ.get("TERM") != "dumb"


status = StatusLine()
"""The line of this process."""

# No process is forked while the thread prints: the child could not print then.
os.register_at_fork(
    before=lambda: status._lock.acquire(),
    after_in_parent=lambda: status._lock.release(),
    after_in_child=lambda: status.forget(),
)


@contextmanager
def doing(what: str, *, is_short: bool = False) -> Iterator[None]:
    """Show what is being done in this context, with the time that it has taken so far; for `is_short` see `begin`."""
    started = status.clock()

    def text() -> str:
        return so_far(what, status.clock() - started)

    status.begin(text, is_short=is_short)
    try:
        yield
    finally:
        status.end(text)


def loading() -> AbstractContextManager[None]:
    """Show that a command imports what it needs."""
    return doing("loading the libraries", is_short=True)


@contextmanager
def counting(what: str, unit: str, total: int | None = None, done: int = 0) -> Iterator[Callable[[int], object]]:
    """Show how much of a task is done in this context, how fast, and how long the rest will take.

    Args:
        unit: what is counted, in the plural.
        total: their number; None = unknown.
        done: number of them that were done before.
    Yields:
        A function to call with the number of further ones that are done.
    """
    started, number = status.clock(), done

    def text() -> str:
        seconds = status.clock() - started
        count = f"{number:,}/{total:,} {unit}" if total is not None else f"{number:,} {unit}"
        parts = [shortened(what, status.width - len(count) - 2), count]
        if number > done and seconds > 0:
            speed = (number - done) / seconds
            if total is not None:
                parts.append(f"ETA {in_hours((total - number) / speed)}")
            parts.append(f"{speed:,.0f} {unit}/s" if speed >= 10 else f"{speed:.2g} {unit}/s")
        return status.fitted(parts)

    def advance(more: int) -> None:
        nonlocal number
        number += more
        status.update()

    status.begin(text)
    try:
        yield advance
    finally:
        status.end(text)


def so_far(what: str, seconds: float) -> str:
    """A task that is being done, with its time once it takes long."""
    return f"{what} …" + (f" {in_hours(seconds)}" if seconds >= 2 else "")


def shortened(text: str, room: int) -> str:
    """Text without its middle where it is longer than `room` characters, such as a long path."""
    if len(text) <= room:
        return text
    ends = max(0, room - 1)
    return f"{text[: ends - ends // 2]}…{text[len(text) - ends // 2 :]}"


def in_hours(seconds: float) -> str:
    """ "0:01:05" for 65 seconds."""
    whole = round(max(0.0, seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
