"""Cases of `gpu.py`: how one is described, run, timed and measured, and how its process is watched."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""Of a case: its name, its seconds, and one of "result", "error" and "skipped"."""

START_SECONDS = 60.0
"""Longest that a process takes to load its libraries."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


@dataclass(frozen=True)
class Setting:
    """Where the cases run: a "cuda" or "cpu" device, full or toy sizes, and a folder for their files."""

    device: str
    reduced: bool
    folder: Path


@dataclass(frozen=True)
class Case:
    """A measurement.

    Attributes:
        name: unique within its section.
        measure: returns figures by name, which become columns of a table.
        seconds: what it takes on an H100; it is not started with less time left, and stopped after three times as long.
    """

    name: str
    measure: Callable[[], dict[str, Any]]
    seconds: float


def run_cases(
    modules: Mapping[str, str],
    setting: Setting,
    finished: Sequence[str],
    deadline: float,
    emit: Callable[[Record], None],
) -> None:
    """Run the cases of sections in this process.

    Args:
        modules: section → "module:function", which returns the section's cases for a setting.
        finished: names of cases that are left out.
        deadline: of `time.time`.
        emit: called with {"started": name, "limit": seconds} before a case, and with its record after it.
    """
    for section, place in modules.items():
        module, _, function = place.partition(":")
        try:
            cases: list[Case] = list(getattr(importlib.import_module(module), function)(setting))
        except Exception as error:
            if section not in finished:
                emit({"case": section, "error": describe(error)})
            continue
        for case in cases:
            name = f"{section}: {case.name}"
            if name in finished:
                continue
            left = deadline - time.time()
            if left < case.seconds:
                emit({"case": name, "skipped": f"{left:.0f} s were left, and it takes about {case.seconds:.0f}"})
                continue
            emit({"started": name, "limit": min(3 * case.seconds, left)})
            record: Record = {"case": name}
            started = time.monotonic()
            try:
                record["result"] = case.measure()
            except Exception as error:
                record["error"] = describe(error)
            record["seconds"] = round(time.monotonic() - started, 1)
            emit(record)
            if "error" in record and not device_works(setting.device):
                os._exit(1)  # the device is unusable in this process after a fault in a kernel
            free_memory(setting.device)


def describe(error: BaseException) -> str:
    """Return an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def device_works(device: str) -> bool:
    """Whether the device still computes in this process."""
    if device != "cuda":
        return True
    import torch

    try:
        return float(torch.ones(1, device=device).add(1)) == 2.0
    except Exception:
        return False


def _work(arguments: tuple[Any, ...], results: Connection) -> None:
    os.setsid()  # so that what a case starts is stopped with it
    os.environ.update(ENVIRONMENT)
    logging.getLogger("composer").setLevel(logging.ERROR)  # it warns of each model without a tokenizer
    run_cases(*arguments, results.send)
    results.send({"done": True})


def supervise(
    modules: Mapping[str, str],
    setting: Setting,
    finished: Sequence[str],
    deadline: float,
    keep: Callable[[Record], None],
) -> None:
    """Run cases in a separate process, and start another for the rest if it dies or a case exceeds its limit.

    Args:
        keep: called with the record of each case.
    """
    finished = list(finished)
    context = multiprocessing.get_context("spawn")
    while True:
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=((modules, setting, finished, deadline), sender))
        worker.start()
        sender.close()
        running, limit, before = "the start", START_SECONDS, len(finished)
        try:
            while True:
                ready = wait([receiver, worker.sentinel], limit)
                if not ready:
                    raise TimeoutError(f"it took more than {limit:.0f} s")
                if not receiver.poll():
                    raise EOFError
                message = receiver.recv()
                if "done" in message:
                    return
                if "started" in message:
                    running, limit = message["started"], message["limit"]
                    continue
                keep(message)
                finished.append(message["case"])
                running, limit = "", START_SECONDS
        except TimeoutError as error:
            failure = str(error)
        except EOFError:
            worker.join()  # its exit code is not known before
            failure = f"its process ended with exit code {worker.exitcode}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.kill()
            worker.join()
            receiver.close()
        if running:
            keep({"case": running, "error": failure})
            finished.append(running)
        if running == "the start" or len(finished) == before:
            return


def read_records(path: Path) -> list[Record]:
    """Read the records of a file, the last of each case."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list({record["case"]: record for record in map(json.loads, lines)}.values())


# --- for the cases ---


def free_memory(device: str) -> None:
    """Return freed device memory, so that the next peak counts only what the next case uses."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def seconds_per_call(device: str, call: Callable[[], Any], calls: int, *, warm_up: int = 2) -> float:
    """Return the mean seconds of calls that follow each other without waiting for the device in between."""
    for _ in range(warm_up):
        call()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def relative_error(found: Any, expected: Any) -> float:
    """Return ‖found - expected‖ / ‖expected‖ in float64; NaN if any value is."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm())


@contextlib.contextmanager
def one_rank(device: str) -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed

    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
