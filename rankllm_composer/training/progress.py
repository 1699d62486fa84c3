"""Progress of a run: `metrics.jsonl`, one line per batch, and a progress line on the terminal."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from composer.core import State, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from rankllm_composer.errors import RunError
from rankllm_composer.escaping import for_screen
from rankllm_composer.screen import get_logger
from rankllm_composer.storage.atomic import write_atomic

log = get_logger(__name__)
LOSS_PREFIX = "loss/train/"


class MetricsFile(LoggerDestination):
    """Append logged metrics to a JSON Lines file on rank 0, flushed line by line.

    Lines, by `event`:
    - "batch", one per batch: batch (1 = the first), epoch (0 = the first), samples and tokens so far, lr of this step,
      batch_seconds, tokens_per_second of all ranks together, and every logged metric under its name, such as
      `loss/train/total`;
    - "eval" and "epoch": metrics logged by an evaluation or at the end of an epoch, if any.
    A value that is not finite is null, and `not_finite` holds it as text: nan, inf or -inf. A resumed run drops lines
    after the batch that it resumes from, and an incomplete last line; it keeps a damaged line between whole ones.

    Raises:
        RunError: on rank 0: a line could not be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._pending: dict[str, Any] = {}
        self._descriptor: int | None = None
        self._lr: float | None = None

    def after_load(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_bytes() if self.path.exists() else b""
        kept = _lines_until(before, state.timestamp.batch.value, state.timestamp.epoch.value)
        if kept != before:
            dropped = len(before[len(kept) :].splitlines())
            log.info("%s: dropped %d lines after batch %d", self.path, dropped, state.timestamp.batch.value)
            write_atomic(self.path, kept)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._descriptor is not None:
            self._pending.update({name: value for name, value in metrics.items() if not name.startswith("time/")})

    def batch_start(self, state: State, logger: Logger) -> None:
        self._lr = _learning_rate(state)  # at BATCH_END the schedule has already advanced to the next step

    def batch_end(self, state: State, logger: Logger) -> None:
        now, before = state.timestamp, state.previous_timestamp
        assert before is not None
        seconds = now.batch_wct.total_seconds()
        tokens = now.token.value - before.token.value
        speed = round(tokens / seconds, 3) if seconds > 0 else None
        values = {"samples": now.sample.value, "tokens": now.token.value, "lr": self._lr}
        self._write("batch", state, {**values, "batch_seconds": round(seconds, 6), "tokens_per_second": speed})

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self._pending:
            self._write("epoch", state)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        if self._pending:
            self._write("eval", state)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        self.eval_after_all(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, event: str, state: State, values: Mapping[str, Any] | None = None) -> None:
        pending, self._pending = self._pending, {}
        if self._descriptor is None:
            return
        place = {"event": event, "batch": state.timestamp.batch.value, "epoch": state.timestamp.epoch.value}
        line = json.dumps(_finite({**place, **(values or {}), **pending})) + "\n"
        data = line.encode()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise RunError(
                f"{self.path}: batch {state.timestamp.batch.value} could not be written ({error.strerror}); "
                "checkpoints are intact. Free space or correct the permissions, then rerun the same command to resume."
            ) from error


class ProgressLine(LoggerDestination):
    """Print epoch, batch, losses, speed and ETA in one line, on rank 0.

    On a terminal the line is redrawn in place. Elsewhere a plain line is printed for the first and the last batch, for
    the last batch of every epoch, and every `interval_seconds` in between.

    Args:
        stream: output; None = standard error.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        interval_seconds: float = 30.0,
        redraw_seconds: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._interval_seconds = interval_seconds
        self._redraw_seconds = redraw_seconds
        self._clock = clock
        self._losses: dict[str, float] = {}
        self._quality: dict[str, float] = {}
        self._lr: float | None = None
        self._speeds: deque[tuple[int, float]] = deque(maxlen=20)  # (tokens, seconds) of the last batches
        self._start = (0.0, 0.0)  # clock and fraction done when this process started
        self._last_shown: float | None = None
        self._line_open = False

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            number = _number(value)
            if number is None:
                continue
            if name.startswith(LOSS_PREFIX):
                self._losses[name.removeprefix(LOSS_PREFIX)] = number
            elif name.endswith(("first_token/ndcg@10", "generation/ndcg@10")):
                self._quality[" ".join(name.split("/")[-2:])] = number

    def fit_start(self, state: State, logger: Logger) -> None:
        self._start = (self._clock(), fraction_done(state))
        self._last_shown = None

    def batch_start(self, state: State, logger: Logger) -> None:
        self._lr = _learning_rate(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        before = state.previous_timestamp
        assert before is not None
        tokens = state.timestamp.token.value - before.token.value
        self._speeds.append((tokens, state.timestamp.batch_wct.total_seconds()))
        now = self._clock()
        pause = self._redraw_seconds if self._output.isatty() else self._interval_seconds
        ends = fraction_done(state) >= 1.0 or ends_epoch(state)
        if ends or self._last_shown is None or now - self._last_shown >= pause:
            self._last_shown = now
            self._show(self._text(state, now))

    def fit_end(self, state: State, logger: Logger) -> None:
        self.close(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        if self._line_open:
            self._output.write("\n")
            self._line_open = False

    def _text(self, state: State, now: float) -> str:
        epochs, batches = _totals(state)
        parts = [f"epoch {state.timestamp.epoch.value + 1}" + (f"/{epochs}" if epochs is not None else "")]
        parts.append(f"batch {state.timestamp.batch.value}" + (f"/{batches}" if batches is not None else ""))
        if self._losses:
            total = self._losses.get("total")
            rest = [f"{name} {value:.4g}" for name, value in self._losses.items() if name != "total"]
            if total is None:
                parts.append("loss " + ", ".join(rest))
            else:
                parts.append(f"loss {total:.4g}" + (f" ({', '.join(rest)})" if rest else ""))
        if self._lr is not None:
            parts.append(f"lr {self._lr:.3g}")
        parts += [f"{name} {value:.4f}" for name, value in self._quality.items()]
        seconds = sum(duration for _, duration in self._speeds)
        if seconds > 0:
            parts.append(f"{_short(sum(tokens for tokens, _ in self._speeds) / seconds)} tokens/s")
        parts.append(f"ETA {self._eta(state, now)}")
        return "  ".join(parts)

    def _eta(self, state: State, now: float) -> str:
        start, before = self._start
        done = fraction_done(state)
        if done <= before:
            return "?"
        seconds = round((now - start) * (1.0 - done) / (done - before))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _show(self, text: str) -> None:
        if dist.get_global_rank() != 0:
            return
        shown = for_screen(text, one_line=True)
        with suppress(OSError):  # a terminal or a pipe that was closed does not end the run
            if self._output.isatty():
                width = shutil.get_terminal_size().columns
                self._output.write(f"\r\x1b[K{shown[: width - 1]}")
                self._line_open = True
            else:
                self._output.write(shown + "\n")
            self._output.flush()

    @property
    def _output(self) -> TextIO:
        return self._stream or sys.stderr


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file, without damaged ones and an incomplete last one."""
    return [line for line, _ in _readable_lines(Path(path).read_bytes())]


def fraction_done(state: State) -> float:
    """Return the finished fraction of training, 0 to 1, by batches even if the duration is in epochs."""
    longest = state.max_duration
    if longest is None:
        return 0.0
    stamp = state.timestamp
    if longest.unit == TimeUnit.EPOCH:
        length = _batches_in_epoch(state)
        done = stamp.epoch.value + (stamp.batch_in_epoch.value / length if length else 0.0)
        return min(1.0, done / longest.value) if longest.value else 1.0
    elapsed = state.get_elapsed_duration()
    return min(1.0, elapsed.value) if elapsed is not None else 0.0


def ends_epoch(state: State) -> bool:
    """Whether the batch just trained is the last of its epoch."""
    length = _batches_in_epoch(state)
    return length is not None and state.timestamp.batch_in_epoch.value >= length


def _batches_in_epoch(state: State) -> int | None:
    return None if state.dataloader_len is None else state.dataloader_len.value


def _totals(state: State) -> tuple[int | None, int | None]:
    """Epochs and batches of the whole run, as far as its duration determines them."""
    longest, length = state.max_duration, _batches_in_epoch(state)
    if longest is not None and longest.unit == TimeUnit.EPOCH:
        return longest.value, None if length is None else longest.value * length
    return None, longest.value if longest is not None and longest.unit == TimeUnit.BATCH else None


def _learning_rate(state: State) -> float | None:
    rates = [group["lr"] for optimizer in state.optimizers for group in optimizer.param_groups]
    return float(rates[0]) if rates else None


def _short(number: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _number(value: Any) -> float | None:
    """Convert a logged value to a Python number; None for anything else, such as a table."""
    if isinstance(value, bool | int | float):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Prepare values for JSON, which has no NaN and no infinity."""
    line: dict[str, Any] = {}
    not_finite: dict[str, str] = {}
    for name, value in values.items():
        number = value if isinstance(value, str) or value is None else _number(value)
        if isinstance(number, float) and not math.isfinite(number):
            not_finite[name] = str(number)
            number = None
        elif number is None and value is not None:
            continue
        line[name] = number
    if not_finite:
        line["not_finite"] = not_finite
    return line


def _lines_until(content: bytes, batch: int, epoch: int) -> bytes:
    """Return the beginning of a metrics file up to (batch, epoch), damaged lines included.

    An evaluation at the end of an epoch has the number of the next epoch, so that (batch, epoch) orders all lines. A
    run at batch 0 is new: nothing of an older file is kept.
    """
    ends = [end for line, end in _readable_lines(content) if (line["batch"], line["epoch"]) <= (batch, epoch)]
    return content[: max(ends, default=0)] if batch > 0 else b""


def _readable_lines(content: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each line that can be parsed, with its end in bytes."""
    end = 0
    for raw in content.split(b"\n")[:-1]:  # what follows the last line break is a torn line, or nothing
        end += len(raw) + 1
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and all(type(line.get(name)) is int for name in ("batch", "epoch")):
            yield line, end
