"""Is torch.compile of the layers worthwhile on CPU?

    python benchmarks/compile_layers.py [--shape SHAPE] [--lists 2] [--steps 3] [--repeats 1] [--threads N]

Times the packed step with and without compiled layers (recipe key `model.compile`); every layer is recomputed. As in
training, lists differ in length from step to step, so layers are recompiled until the code accepts any length. The
first two steps include this and are reported separately, as the cost of compiling. Each measurement runs in a separate
process, alternating between the two; values are medians.
"""

from __future__ import annotations

import argparse
import statistics
from typing import NamedTuple

from report import NUM_CORES, peak_gib, print_header, print_machine, print_row, restart_with_one_heap, run_in_process
from workload import SHAPES, list_lengths, new_lists, new_model

NUM_FIRST_STEPS = 2


class Measured(NamedTuple):
    """Total seconds of the first steps, tokens per second of the later steps, last loss, and peak memory in GiB."""

    first: float
    rate: float
    loss: float
    peak: float


def measure(compiled: bool, shape: str, num_lists: int, num_steps: int, threads: int) -> Measured:
    """Time steps on lists of changing lengths, in this process."""
    import torch
    from steps import new_stepper

    torch.set_num_threads(threads)
    step = new_stepper("packed", new_model(shape), activation_checkpointing=1.0, compile_layers=compiled)
    lengths = [list_lengths(num_lists, seed) for seed in range(NUM_FIRST_STEPS + num_steps)]
    results = [step(new_lists(step_lengths, shape)) for step_lengths in lengths]
    rates = [sum(step_lengths) / seconds for step_lengths, (seconds, _) in zip(lengths, results)]
    first = sum(seconds for seconds, _ in results[:NUM_FIRST_STEPS])
    return Measured(first, statistics.median(rates[NUM_FIRST_STEPS:]), results[-1][1], peak_gib())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mistral-30m", choices=SHAPES)
    parser.add_argument("--lists", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options = parser.parse_args()
    print_machine(options.threads)
    print_header([f"layers of {options.shape}", "first 2 steps, s", "tokens/s, later steps", "peak GiB", "loss"])
    runs: dict[bool, list[Measured]] = {False: [], True: []}
    for _ in range(options.repeats):
        for compiled, results in runs.items():
            arguments = compiled, options.shape, options.lists, options.steps, options.threads
            results.append(run_in_process(measure, *arguments, threads=options.threads))
    rates = {compiled: statistics.median(r.rate for r in results) for compiled, results in runs.items()}
    for compiled, results in runs.items():
        print_row(
            [
                "compiled" if compiled else "not compiled",
                f"{statistics.median(r.first for r in results):.1f}",
                f"{rates[compiled]:,.0f}",
                f"{statistics.median(r.peak for r in results):.2f}",
                f"{results[0].loss:.5f}",
            ]
        )
    ratio = rates[True] / rates[False]
    verdict = "pays off" if ratio > 1.02 else "does not pay off"
    print(f"\nCompiled layers are {ratio:.2f}× as fast: compiling {verdict} here.")


if __name__ == "__main__":
    restart_with_one_heap()
    main()
