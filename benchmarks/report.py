"""Describe the machine, print tables, and run functions in separate processes; shared by the benchmarks."""

from __future__ import annotations

import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

NUM_CORES = len(os.sched_getaffinity(0))
# What glibc does with freed memory moves a CPU step's time and, more, its resident memory: by itself it gives large
# blocks back to the system at once, which then clears them page by page when they are asked for again, and keeps a heap
# a thread. `heap.py` measures what this changes.
ONE_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_ARENA_MAX": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
}


def machine() -> str:
    """Hardware, versions, date, and how busy the machine is now, in one line."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "mosaicml"))
    return (
        f"{model}, {NUM_CORES} cores, {gib:.0f} GiB, no GPU; Python {platform.python_version()}, {versions}; "
        f"{datetime.date.today()}; load average at the start {os.getloadavg()[0]:.1f}"
    )


def print_head(threads: int | str, dtype: str = "float32") -> None:
    """Machine, threads and what is multiplied, ahead of a benchmark's table."""
    heap = ", one heap of large pages" if all(name in os.environ for name in ONE_HEAP) else ""
    clock = ", seconds of CPU time" if threads == 1 else ""
    print(f"{machine()}; {threads} threads, {dtype}{heap}{clock}\n", flush=True)


def print_row(cells: Sequence[Any]) -> None:
    """A line of a Markdown table, at once, so that a long benchmark shows what it has."""
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def print_columns(names: Sequence[str], *, num_text: int = 1) -> None:
    """Head of a Markdown table; the first `num_text` columns are text, the others figures."""
    print_row(names)
    print(f"|{'---|' * num_text}{'---:|' * (len(names) - num_text)}", flush=True)


def on_one_heap() -> None:
    """Start this command again where its environment does not ask for one heap of large pages that is kept."""
    if any(name not in os.environ for name in ONE_HEAP):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**ONE_HEAP, **os.environ})


def in_own_process(function: Callable[..., Any], *arguments: Any, threads: int) -> Any:
    """What a function returns in a fresh process of this many threads; peak memory there is the function's alone.

    Raises:
        BrokenProcessPool: the process was killed, for want of memory for example.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the libraries that the process loads
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_gib() -> float:
    """Highest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
