"""The history of a run: when it trained, on which machine, with which versions, from which data."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from rankllm_composer import __version__
from rankllm_composer.screen import get_logger
from rankllm_composer.training.run_files import read_history

log = get_logger(__name__)
MAX_LENGTHS = 1000
_PACKAGES = ("torch", "mosaicml", "mosaicml-streaming", "transformers")


class RunHistory(Callback):
    """Add lines to a file on rank 0, for the report; a file that cannot be written is named in the log.

    Lines, by `event`:
    - "start", one per process that trained: time (UTC), batch (those trained before), ranks, machine, versions,
      parameters, trained_parameters, and `facts`;
    - "lengths", once: tokens of the first lists that rank 0 read;
    - "end": time and batch. A killed process leaves none.

    Args:
        facts: what the caller knows of model and data.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.facts = dict(facts)
        self._lengths: list[int] | None = []
        self._is_open = False

    def fit_start(self, state: State, logger: Logger) -> None:
        devices = dist.all_gather_object(_device_name(state))
        if dist.get_global_rank() != 0:
            return
        if any(line.get("event") == "lengths" for line in read_history(self.path)):
            self._lengths = None
        weights = list(state.model.parameters())
        machine = {"machine": describe_machine(devices), "versions": versions(), "ranks": dist.get_world_size()}
        sizes = {
            "parameters": sum(weight.numel() for weight in weights),
            "trained_parameters": sum(weight.numel() for weight in weights if weight.requires_grad),
        }
        self._is_open = True
        self._add("start", state, {**machine, **sizes, **self.facts})

    def batch_start(self, state: State, logger: Logger) -> None:
        if self._is_open and self._lengths is not None:
            rows = [row.encoded for row in state.batch["sequences"]]
            self._lengths += [len(encoded.input_ids) for encoded in rows if encoded is not None]
            if len(self._lengths) >= MAX_LENGTHS:
                self._add_lengths(state)

    def close(self, state: State, logger: Logger) -> None:
        if self._is_open:
            if self._lengths:
                self._add_lengths(state)
            self._add("end", state, {})
            self._is_open = False

    def _add_lengths(self, state: State) -> None:
        self._add("lengths", state, {"tokens": (self._lengths or [])[:MAX_LENGTHS]})
        self._lengths = None

    def _add(self, event: str, state: State, values: Mapping[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = json.dumps({"event": event, "time": now, "batch": state.timestamp.batch.value, **values})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            log.warning("%s: could not be written (%s)", self.path, error.strerror)


def describe_machine(devices: list[str]) -> str:
    """Describe what a run trains on, by the device of each rank: "8 × NVIDIA H100 80GB HBM3", or the CPU and memory."""
    gpus = Counter(name for name in devices if name)
    if gpus:
        return ", ".join(f"{number} × {name}" for name, number in gpus.items())
    model = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [model, f"{num_cores} core{'s' * (num_cores > 1)}"]
    with suppress(OSError, ValueError, AttributeError):
        parts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Versions of this package, of those that train, and of Python, by name."""
    found = {"rankllm-composer": __version__}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | {"Python": platform.python_version()}


def _device_name(state: State) -> str:
    """Name of this rank's GPU; empty on a CPU."""
    return torch.cuda.get_device_name() if state.device.name == "gpu" else ""
