"""Does torch.compile of the layers pay on CPU?

    python benchmarks/compile_layers.py [--shape SHAPE] [--lists 2] [--steps 3] [--repeats 1] [--threads N]

The packed step with `compile_layers` off and on (the recipe key `model.compile`), every layer recomputed. Lists differ
in length from step to step, as they do in training, so that compiled code is made again until it takes any length; two
such steps come first and are reported apart, as what compiling costs. Each run is a process of its own, off and on
alternate, figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
from typing import NamedTuple

from report import NUM_CORES, in_own_process, on_one_heap, peak_gib, print_columns, print_head, print_row
from workload import SHAPES, list_lengths, new_lists, new_model

NUM_FIRST_STEPS = 2


class Measured(NamedTuple):
    """Seconds of the first steps together, tokens a second of those after, last loss, GiB at the peak."""

    first: float
    rate: float
    loss: float
    peak: float


def measure(compiled: bool, shape: str, num_lists: int, num_steps: int, threads: int) -> Measured:
    """Steps on lists of changing lengths, in this process."""
    import torch
    from steps import new_stepper

    torch.set_num_threads(threads)
    step = new_stepper("packed", new_model(shape), activation_checkpointing=1.0, compile_layers=compiled)
    lengths = [list_lengths(num_lists, seed) for seed in range(NUM_FIRST_STEPS + num_steps)]
    taken = [step(new_lists(some, shape)) for some in lengths]
    rates = [sum(some) / seconds for some, (seconds, _) in zip(lengths, taken)]
    first = sum(seconds for seconds, _ in taken[:NUM_FIRST_STEPS])
    return Measured(first, statistics.median(rates[NUM_FIRST_STEPS:]), taken[-1][1], peak_gib())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mistral-30m", choices=SHAPES)
    parser.add_argument("--lists", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options = parser.parse_args()
    print_head(options.threads)
    print_columns([f"layers of {options.shape}", "first 2 steps, s", "tokens/s after", "peak GiB", "loss"])
    runs: dict[bool, list[Measured]] = {False: [], True: []}
    for _ in range(options.repeats):
        for compiled, results in runs.items():
            arguments = compiled, options.shape, options.lists, options.steps, options.threads
            results.append(in_own_process(measure, *arguments, threads=options.threads))
    rates = {compiled: statistics.median(r.rate for r in results) for compiled, results in runs.items()}
    for compiled, results in runs.items():
        print_row(
            [
                "compiled" if compiled else "as they are",
                f"{statistics.median(r.first for r in results):.1f}",
                f"{rates[compiled]:,.0f}",
                f"{statistics.median(r.peak for r in results):.2f}",
                f"{results[0].loss:.5f}",
            ]
        )
    ratio = rates[True] / rates[False]
    print(f"\nCompiled layers are {ratio:.2f}× as fast: {'they pay' if ratio > 1.02 else 'they do not pay'} here.")


if __name__ == "__main__":
    on_one_heap()
    main()
