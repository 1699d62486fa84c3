"""Progress of a run: `metrics.jsonl`, one line per batch, and a progress line on the terminal."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer.core import State, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from rankllm_composer.errors import RunError
from rankllm_composer.screen import StatusLine, get_logger, in_hours, so_far, status
from rankllm_composer.storage.atomic import write_atomic
from rankllm_composer.training.run_files import LOSS_PREFIX, readable_lines

log = get_logger(__name__)


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
                f"{self.path}: batch {state.timestamp.batch.value} could not be written ({error.strerror}); earlier "
                "checkpoints are intact. Free space or correct the permissions, then rerun the same command to resume."
            ) from error


class ProgressLine(LoggerDestination):
    """Show epoch, batch, ETA, speed, nDCG and losses in one line of 80 columns, on rank 0.

    On a terminal the line is redrawn in place. Elsewhere a plain line is printed for the first and the last batch, for
    the last batch of every epoch, and every 30 s in between.

    Args:
        line: where it is shown; None = the line of this process.
    """

    def __init__(self, line: StatusLine | None = None) -> None:
        self._line = line or status
        self._losses: dict[str, float] = {}
        self._quality: dict[str, float] = {}
        self._lr: float | None = None
        self._speeds: deque[tuple[int, float]] = deque(maxlen=20)  # (tokens, seconds) of the last batches
        self._start: tuple[float, float] | None = None  # clock and fraction done before the first batch
        self._first = "reading and training the first batch"
        self._parts: tuple[list[str], list[str]] | None = None  # before and after the ETA
        self._end: float | None = None  # clock when the run will end

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            number = _number(value)
            if number is None:
                continue
            if name.startswith(LOSS_PREFIX):
                self._losses[name.removeprefix(LOSS_PREFIX)] = number
            elif name.endswith(("first_token/ndcg@10", "generation/ndcg@10")):
                self._quality[name.split("/")[-2]] = number

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self._start is None:
            compiled = getattr(getattr(state.model, "module", state.model), "_is_compiled", False)
            self._first = "compiling the layers, and training the first batch" if compiled else self._first
            self._start = (self._line.clock(), fraction_done(state))
            if dist.get_global_rank() == 0:
                self._line.begin(self._text)

    def batch_start(self, state: State, logger: Logger) -> None:
        self._lr = _learning_rate(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        before = state.previous_timestamp
        assert before is not None
        tokens = state.timestamp.token.value - before.token.value
        self._speeds.append((tokens, state.timestamp.batch_wct.total_seconds()))
        is_first, is_last = self._parts is None, fraction_done(state) >= 1.0 or ends_epoch(state)
        self._parts, self._end = self._described(state), self._expected_end(state)
        self._line.update(is_due=is_first or is_last)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.close(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        self._line.end(self._text, keep=self._parts is not None)

    def _text(self) -> str:
        if self._parts is None:
            seconds = 0.0 if self._start is None else self._line.clock() - self._start[0]
            return so_far(self._first, seconds)
        eta = "?" if self._end is None else in_hours(self._end - self._line.clock())
        return self._line.fitted([*self._parts[0], f"ETA {eta}", *self._parts[1]])

    def _described(self, state: State) -> tuple[list[str], list[str]]:
        epochs, batches = _totals(state)
        place = [f"epoch {state.timestamp.epoch.value + 1}" + (f"/{epochs}" if epochs is not None else "")]
        place.append(f"batch {state.timestamp.batch.value}" + (f"/{batches}" if batches is not None else ""))
        parts = []
        seconds = sum(duration for _, duration in self._speeds)
        if seconds > 0:
            parts.append(f"{_short(sum(tokens for tokens, _ in self._speeds) / seconds)} tokens/s")
        if self._quality:  # of the first decoding; a line has no room for another
            parts.append(f"nDCG@10 {next(iter(self._quality.values())):.3f}")
        if (total := self._losses.get("total")) is not None:
            parts.append(f"loss {total:.4g}")
        parts += [f"{name} {value:.3g}" for name, value in self._losses.items() if name != "total"]
        return place, parts if self._lr is None else [*parts, f"lr {self._lr:.3g}"]

    def _expected_end(self, state: State) -> float | None:
        assert self._start is not None
        (start, before), now, done = self._start, self._line.clock(), fraction_done(state)
        return None if done <= before else now + (now - start) * (1.0 - done) / (done - before)


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
    ends = [end for line, end in readable_lines(content) if (line["batch"], line["epoch"]) <= (batch, epoch)]
    return content[: max(ends, default=0)] if batch > 0 else b""
