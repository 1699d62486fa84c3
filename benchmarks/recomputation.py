"""What do recomputed layers cost, and what does keeping the output of their attention save?

    python benchmarks/recomputation.py [--shape SHAPE] [--lists 2] [--repeats 2] [--threads N]

Runs one packed step (forward, backward, optimizer) with all activations kept, with every layer recomputed but for the
output of its attention (`model.keep_attention`), and with every layer recomputed. Each value is from the second step of
a separate process. The settings alternate; values are medians. The benchmark stops if the losses differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from packed_step import Measured, measure
from report import NUM_CORES, print_header, print_machine, print_row, restart_with_one_heap, run_in_process
from workload import SHAPES, typical_lengths

SETTINGS = {"nothing": (0.0, False), "all but attention": (1.0, True), "all": (1.0, False)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--lists", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options = parser.parse_args()
    print_machine(options.threads)
    lengths = typical_lengths(options.lists)
    results: dict[str, list[Measured]] = {name: [] for name in SETTINGS}
    for _ in range(options.repeats):
        for name, (checkpointing, keeps_attention) in SETTINGS.items():
            arguments = "packed", options.shape, lengths, checkpointing, options.threads, keeps_attention
            results[name].append(run_in_process(measure, *arguments, threads=options.threads))
    losses = {result.loss for rows in results.values() for result in rows}
    if len(losses) > 1:
        sys.exit(f"the losses differ: {sorted(losses)}")
    seconds = {name: statistics.median(result.seconds for result in rows) for name, rows in results.items()}
    print(f"{options.shape}, {len(lengths)} lists, {sum(lengths):,} tokens\n")
    print_header(["recomputed", "seconds per step", "tokens/s", "time", "before GiB", "peak GiB"])
    for name, rows in results.items():
        print_row(
            [
                name,
                f"{seconds[name]:.1f}",
                f"{sum(lengths) / seconds[name]:,.0f}",
                f"{seconds[name] / seconds[next(iter(SETTINGS))]:.2f}×",
                f"{statistics.median(result.before for result in rows):.2f}",
                f"{statistics.median(result.peak for result in rows):.2f}",
            ]
        )


if __name__ == "__main__":
    restart_with_one_heap()
    main()
