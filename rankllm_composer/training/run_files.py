"""The files that a run writes into its folder for its report, and their readers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
HISTORY_FILE = "history.jsonl"
LOSS_PREFIX = "loss/train/"
PREFIX = "eval/"
TRAINED_LISTS = {"trained": "data/lists_trained", "too_long": "data/lists_too_long"}
"""Lists of an epoch so far: name → name of the metric."""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file, without damaged ones and an incomplete last one."""
    return [line for line, _ in readable_lines(Path(path).read_bytes())]


def readable_lines(content: bytes) -> Iterator[tuple[dict[str, Any], int]]:
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


def read_details(path: Path) -> Iterator[dict[str, Any]]:
    """Read the results of evaluations, by batch; of a batch evaluated again after resuming, the last one.

    Yields:
        batch, epoch; "ndcg@10": window → "presented" or decoding → figure, of windows with a relevant candidate;
        "positions": decoding → counts, see `position_matrix`.
    """
    results = {}
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError, RecursionError):  # incomplete line of a killed run, which is written again
            details = json.loads(line)
            if isinstance(details, dict) and type(details.get("batch")) is int:
                results[details["batch"]] = details
    yield from (results[batch] for batch in sorted(results))


def read_history(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a history in order, without what killed or foreign writers left; none without a file."""
    content = path.read_bytes() if path.is_file() else b""
    for raw in content.split(b"\n"):
        with suppress(ValueError, RecursionError):
            line = json.loads(raw)
            if isinstance(line, dict):
                yield line
