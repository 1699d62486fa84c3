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
# How glibc handles freed memory affects the time of a CPU step and, even more, its resident memory. By default it
# returns large blocks to the system immediately, which clears them page by page on the next allocation, and it keeps
# one heap per thread. `heap.py` measures the difference.
ONE_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_ARENA_MAX": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
}


def machine() -> str:
    """Describe the hardware, versions, date and current load in one line."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "mosaicml"))
    return (
        f"{model}, {NUM_CORES} cores, {gib:.0f} GiB, no GPU; Python {platform.python_version()}, {versions}; "
        f"{datetime.date.today()}; load average at start {os.getloadavg()[0]:.1f}"
    )


def print_machine(threads: int | str, dtype: str = "float32") -> None:
    """Print the machine, number of threads and dtype above a benchmark's table."""
    heap = ", single heap, large pages" if all(name in os.environ for name in ONE_HEAP) else ""
    clock = ", CPU time in seconds" if threads == 1 else ""
    print(f"{machine()}; {threads} threads, {dtype}{heap}{clock}\n", flush=True)


def print_row(cells: Sequence[Any]) -> None:
    """Print a row of a Markdown table and flush it, so that a long benchmark shows its progress."""
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def print_header(names: Sequence[str], *, num_text: int = 1) -> None:
    """Print the header of a Markdown table; the first `num_text` columns are text, the others numbers."""
    print_row(names)
    print(f"|{'---|' * num_text}{'---:|' * (len(names) - num_text)}", flush=True)


def restart_with_one_heap() -> None:
    """Restart this command with the variables of `ONE_HEAP` unless they are already set."""
    if any(name not in os.environ for name in ONE_HEAP):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**ONE_HEAP, **os.environ})


def run_in_process(function: Callable[..., Any], *arguments: Any, threads: int) -> Any:
    """Return the result of a function that is run in a new process, so that its peak memory can be measured.

    Args:
        function: importable, so that it can be pickled.
        arguments: of the function.
        threads: number of OpenMP threads.

    Raises:
        BrokenProcessPool: the process was killed, for example by the OOM killer.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the libraries that the new process loads
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_gib() -> float:
    """Return the peak resident memory of this process so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
