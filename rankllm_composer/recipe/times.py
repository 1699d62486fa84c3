"""Composer time strings: the units that each key takes, and times in optimizer updates."""

from __future__ import annotations

import math
import re
from functools import partial

UNITS: dict[str, tuple[str, ...]] = {
    "run.max_duration": ("ep", "ba", "sp"),
    "schedule.warmup": ("ep", "ba", "sp", "dur"),
    "checkpoint.interval": ("ep", "ba", "sp", "tok", "dur"),
    "checkpoint.export.interval": ("ep", "ba"),
    "evaluation.interval": ("ep", "ba", "sp", "tok", "dur"),
}
"""Key → units of its time: epochs, batches (optimizer updates), samples (lists), tokens, share of the run."""

EXAMPLES = {"ep": "3ep", "ba": "50ba", "sp": "4000sp", "tok": "1000000tok", "dur": "0.1dur"}


def time_pattern(key: str) -> str:
    """The regular expression of the times that a key takes: above zero, except for a warmup."""
    units, is_zero_allowed = UNITS[key], key == "schedule.warmup"
    counts = "|".join(unit for unit in units if unit != "dur")
    pattern = f"[0-9]+({counts})" if is_zero_allowed else f"0*[1-9][0-9]*({counts})"
    if "dur" in units:  # the only unit that takes fractions, of the run
        pattern += r"|(0?\.[0-9]+|[01](\.0*)?)dur" if is_zero_allowed else r"|(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)dur"
    return f"^({pattern})$"


def parse_time(text: str) -> tuple[float, str] | None:
    """A Composer time string, "50ba", as (50.0, "ba"); None for other text. Only `dur` may be a fraction, of the run.

    Source:
        composer.core.time.Time, which reads the same strings.
    """
    match = re.fullmatch(r"(\d+)(ep|ba|sp|tok)|(0?\.\d+|[01](?:\.0*)?)(dur)", text)
    if match is None:
        return None
    number, unit = (part for part in match.groups() if part is not None)
    return float(number), unit


def updates_in(
    time: str, *, lists_per_update: int, updates_per_epoch: int | None = None, num_updates: int | None = None
) -> int | None:
    """Convert a Composer time string to optimizer steps, rounded up.

    Args:
        time: in epochs (ep), batches (ba), samples (sp) or fractions of the run (dur).
        updates_per_epoch: None = unknown.
        num_updates: steps of the run, for fractions of it; None = unknown.
    Returns:
        None for epochs or fractions of unknown length.
    Raises:
        ValueError: another unit.
    """
    match parse_time(time):
        case (number, "ba"):
            return int(number)
        case (number, "sp"):
            return math.ceil(number / lists_per_update)
        case (number, "ep"):
            return None if updates_per_epoch is None else int(number) * updates_per_epoch
        case (number, "dur"):
            return None if num_updates is None else math.ceil(number * num_updates)
    raise ValueError(
        f"time is {time!r}; expected epochs (3ep), batches (50ba), samples (4000sp) or a fraction of the run (0.1dur)"
    )


def explain_warmup(
    warmup: str, max_duration: str, *, lists_per_update: int, updates_per_epoch: int | None = None
) -> str | None:
    """One sentence about a warmup that is at least as long as its run; None for a shorter one, or if it is unknown."""
    in_updates = partial(updates_in, lists_per_update=lists_per_update, updates_per_epoch=updates_per_epoch)
    num_updates = in_updates(max_duration)
    num_warmup = in_updates(warmup, num_updates=num_updates)
    if num_updates is None or num_warmup is None or num_warmup < max(1, num_updates):
        return None
    return (
        f"schedule.warmup is {warmup}, {num_warmup:,} updates, but the run has {num_updates:,} (run.max_duration "
        f"{max_duration}): the learning rate ends at {(num_updates - 1) / num_warmup:.0%} of optimizer.lr. Set "
        f"schedule.warmup={num_updates // 10}ba, or train longer."
    )
