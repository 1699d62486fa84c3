"""What does a token cost as lists grow longer and microbatches fuller?

    python benchmarks/scaling.py [--tokens 256,1024,2048,4096] [--lists 1,4,16] [--shape SHAPE] [--threads N]

Tokens a second of the packed step, by tokens a list (all lists alike) and lists a microbatch: forward, backward and
optimizer step, every layer recomputed. A cell is the median of as many steps as take --seconds together, 1 at least,
after a step of the largest cell, which touches all memory there will be. Below it, in a table of its own, the same as a
share of the GFLOP/s of the fastest cell: attention makes a long list's token dearer, and FLOPs take that out.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from report import NUM_CORES, on_one_heap, print_columns, print_head, print_row
from steps import Stepper, new_stepper
from workload import RESPONSE_TOKENS, SHAPES, new_lists, new_model

from rankllm_composer.model.flops import training_flops

MAX_STEPS = 5


def measure(step: Stepper, shape: str, num_tokens: int, num_lists: int, seconds: float) -> tuple[float, float]:
    """Tokens and useful FLOPs a second."""
    lengths = [num_tokens] * num_lists
    lists = new_lists(lengths, shape)
    taken: list[float] = []
    while not taken or (sum(taken) < seconds and len(taken) < MAX_STEPS):
        taken.append(step(lists)[0])
    flops = training_flops(step.model.config, lengths, RESPONSE_TOKENS * num_lists)
    return sum(lengths) / statistics.median(taken), flops / statistics.median(taken)


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
    print_head(options.threads)
    columns = [f"tokens a list ({options.shape})", *(f"{count} lists" if count > 1 else "1 list" for count in counts)]
    torch.set_num_threads(options.threads)
    step = new_stepper("packed", new_model(options.shape), activation_checkpointing=1.0)
    step(new_lists([max(lengths)] * max(counts), options.shape))
    rates = {}
    print_columns(columns)
    for length in lengths:
        rates[length] = [measure(step, options.shape, length, count, options.seconds) for count in counts]
        print_row([length, *(f"{tokens:,.0f}" for tokens, _ in rates[length])])
    fastest = max(flops for row in rates.values() for _, flops in row)
    print(f"\nShare of the fastest cell's {fastest / 1e9:.0f} useful GFLOP/s:\n")
    print_columns(columns)
    for length in lengths:
        print_row([length, *(f"{flops / fastest:.2f}" for _, flops in rates[length])])


if __name__ == "__main__":
    on_one_heap()
    main()
