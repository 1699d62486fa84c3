"""How do allocator settings change the time and memory of a step on CPU?

    python benchmarks/heap.py [--shape SHAPE] [--lists 1] [--repeats 2] [--threads N]

Runs one packed step (forward, backward, optimizer; every layer recomputed) with glibc's default settings, and with
those of `make demo` and the other benchmarks (`report.ONE_HEAP`): a single heap of large pages that keeps freed memory
for reuse. Each value is from the second step of a separate process. The two settings alternate; values are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics

from packed_step import Measured, measure
from report import NUM_CORES, ONE_HEAP, print_header, print_machine, print_row, run_in_process
from workload import SHAPES, typical_lengths

SETTINGS = {"glibc defaults": False, "single heap, large pages": True}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--lists", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options = parser.parse_args()
    print_machine(options.threads)
    lengths = typical_lengths(options.lists)
    results: dict[str, list[Measured]] = {name: [] for name in SETTINGS}
    for _ in range(options.repeats):
        for name, is_one_heap in SETTINGS.items():
            for variable, value in ONE_HEAP.items():
                os.environ.pop(variable, None)
                if is_one_heap:
                    os.environ[variable] = value
            arguments = "packed", options.shape, lengths, 1.0, options.threads
            results[name].append(run_in_process(measure, *arguments, threads=options.threads))
    seconds = {name: statistics.median(result.seconds for result in rows) for name, rows in results.items()}
    print(f"{options.shape}, {len(lengths)} lists, {sum(lengths):,} tokens\n")
    print_header(["allocator", "seconds per step", "tokens/s", "speed", "peak GiB"])
    for name, rows in results.items():
        print_row(
            [
                name,
                f"{seconds[name]:.1f}",
                f"{sum(lengths) / seconds[name]:,.0f}",
                f"{seconds[next(iter(SETTINGS))] / seconds[name]:.2f}×",
                f"{statistics.median(result.peak for result in rows):.2f}",
            ]
        )


if __name__ == "__main__":
    main()
