"""How does the cost per token change with the length of lists and the size of microbatches?

    python benchmarks/scaling.py [--tokens 256,1024,2048,4096] [--lists 1,4,16] [--shape SHAPE] [--threads N]

Measures tokens per second of the packed step (forward, backward, optimizer; every layer recomputed) by tokens per list
(all lists have the same length) and lists per microbatch. A cell is the median of as many steps as fit in --seconds, at
least 1. A step of the largest cell comes first, so that all memory is already allocated. Attention makes the tokens of
long lists more expensive; a second table therefore shows FLOP/s, as a share of the fastest cell's.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from report import NUM_CORES, print_header, print_machine, print_row, restart_with_one_heap
from steps import Stepper, new_stepper
from workload import RESPONSE_TOKENS, SHAPES, new_lists, new_model

from rankllm_composer.model.flops import training_flops

MAX_STEPS = 5


def measure(step: Stepper, shape: str, num_tokens: int, num_lists: int, seconds: float) -> tuple[float, float]:
    """Return tokens per second and useful FLOPs per second."""
    lengths = [num_tokens] * num_lists
    lists = new_lists(lengths, shape)
    step_seconds: list[float] = []
    while not step_seconds or (sum(step_seconds) < seconds and len(step_seconds) < MAX_STEPS):
        step_seconds.append(step(lists)[0])
    flops = training_flops(step.model.config, lengths, RESPONSE_TOKENS * num_lists)
    return sum(lengths) / statistics.median(step_seconds), flops / statistics.median(step_seconds)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="256,1024,2048,4096")
    parser.add_argument("--lists", default="1,4,16")
    parser.add_argument("--shape", default="mistral-4-layers", choices=SHAPES)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options = parser.parse_args()
    lengths = [int(number) for number in options.tokens.split(",")]
    counts = [int(number) for number in options.lists.split(",")]
    print_machine(options.threads)
    columns = [f"tokens per list ({options.shape})", *(f"{count} lists" if count > 1 else "1 list" for count in counts)]
    torch.set_num_threads(options.threads)
    step = new_stepper("packed", new_model(options.shape), activation_checkpointing=1.0)
    step(new_lists([max(lengths)] * max(counts), options.shape))
    rates = {}
    print_header(columns)
    for length in lengths:
        rates[length] = [measure(step, options.shape, length, count, options.seconds) for count in counts]
        print_row([length, *(f"{tokens:,.0f}" for tokens, _ in rates[length])])
    fastest = max(flops for row in rates.values() for _, flops in row)
    print(f"\nShare of the fastest cell's {fastest / 1e9:.0f} useful GFLOP/s:\n")
    print_header(columns)
    for length in lengths:
        print_row([length, *(f"{flops / fastest:.2f}" for _, flops in rates[length])])


if __name__ == "__main__":
    restart_with_one_heap()
    main()
