"""How much faster and smaller is the packed step than a plain Hugging Face loop?

    python benchmarks/packed_step.py [--cases SHAPE:LISTS:CHECKPOINTING,…] [--repeats 2] [--threads N]

Both steps (`steps.py`) train the same lists (`workload.py`) with the same weights and objective: forward, backward and
optimizer step of one microbatch. The plain loop pads to the longest list and computes logits at every position, as the
published training does; its attention is transformers' default on this machine. CHECKPOINTING is the share of layers
whose activations are recomputed (1 in the published runs); two numbers such as 1/0.5 set the plain loop and the packed
step separately. The column "by FLOPs" is the speedup expected from arithmetic alone: matrix products and the causal
half of attention that each step computes, including recomputed layers. With 30 layers the LM head is a small part of
the cost, with four a large one, so the same saving gives a small speedup in one case and a large one in the other.

Each value is from a separate process that runs the step twice and reports the second: the first uses memory that the
system must clear, which later steps of a training run do not. Plain and packed alternate; values are medians over the
repeats. The benchmark stops if the two losses differ by more than 1 in 10,000. Useful tokens are real ones, whatever
was computed. Peak memory is the peak resident memory of the process (`ru_maxrss`), including libraries, weights,
gradients and Adam's two moments, which are the same for both; column "before" is the peak before the step. So that
resident memory equals memory in use, freed memory is kept for reuse in both (`report.ONE_HEAP`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import NamedTuple

import torch
from report import NUM_CORES, peak_gib, print_header, print_machine, print_row, restart_with_one_heap, run_in_process
from steps import STEPS, new_stepper
from workload import (
    RESPONSE_TOKENS,
    WARM_UP_LENGTHS,
    model_config,
    new_lists,
    new_model,
    recomputed_flops,
    typical_lengths,
    useful_share,
)

from rankllm_composer.model.flops import training_flops

CASES = "smollm2-135m:2:1,smollm2-135m:1:0,mistral-30m:2:1,smollm2-4-layers:2:0"
TOLERANCE = 1e-4


class Measured(NamedTuple):
    """Seconds and loss of the second step, and peak resident GiB before the steps and after them."""

    seconds: float
    loss: float
    before: float
    peak: float


def measure(
    kind: str, shape: str, lengths: list[int], checkpointing: float, threads: int, keeps_attention: bool = False
) -> Measured:
    """Measure a "plain" or "packed" step in this process."""
    torch.set_num_threads(threads)
    step = new_stepper(kind, new_model(shape), activation_checkpointing=checkpointing, keeps_attention=keeps_attention)
    step(new_lists(WARM_UP_LENGTHS, shape))
    before = peak_gib()
    lists = new_lists(lengths, shape)
    step(lists)
    seconds, loss = step(lists)
    return Measured(seconds, loss, before, peak_gib())


def computed_flops(kind: str, shape: str, lengths: list[int], checkpointing: float) -> float:
    """Count the FLOPs of a "plain" or "packed" step, including padding, logits and recomputed layers if it has them."""
    if kind == "plain":
        lengths, num_logits = [max(lengths)] * len(lengths), max(lengths) * len(lengths)
    else:
        num_logits = RESPONSE_TOKENS * len(lengths)
    config = model_config(shape)
    return training_flops(config, lengths, num_logits) + checkpointing * recomputed_flops(config, lengths)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options = parser.parse_args()
    print_machine(options.threads)
    print_header(
        [
            "shape",
            "recomputed layers",
            "lists",
            "useful / padded tokens",
            "plain tokens/s",
            "packed tokens/s",
            "**speed**",
            "by FLOPs",
            "before GiB",
            "plain peak GiB",
            "packed peak GiB",
            "**memory**",
            "loss plain",
            "loss packed",
        ]
    )
    for case in options.cases.split(","):
        shape, num_lists, fractions = case.split(":")
        recomputed = dict(zip(STEPS, map(float, fractions.split("/") * 2)))
        lengths = typical_lengths(int(num_lists))
        flops = {kind: computed_flops(kind, shape, lengths, recomputed[kind]) for kind in STEPS}
        plain, packed = [], []
        for _ in range(options.repeats):
            for kind, results in (("plain", plain), ("packed", packed)):
                arguments = kind, shape, lengths, recomputed[kind], options.threads
                results.append(run_in_process(measure, *arguments, threads=options.threads))
        if any(abs(p.loss / q.loss - 1) > TOLERANCE for p in plain for q in packed):
            sys.exit(f"{case}: the losses differ, plain {plain[0].loss}, packed {packed[0].loss}")
        plain_seconds, packed_seconds = (statistics.median(r.seconds for r in rows) for rows in (plain, packed))
        plain_peak, packed_peak = (statistics.median(r.peak for r in rows) for rows in (plain, packed))
        print_row(
            [
                shape,
                " / ".join(f"{fraction:.0%}" for fraction in dict.fromkeys(recomputed.values())),
                num_lists,
                f"{sum(lengths):,} of {max(lengths) * len(lengths):,} ({useful_share(lengths):.0%})",
                f"{sum(lengths) / plain_seconds:,.0f}",
                f"{sum(lengths) / packed_seconds:,.0f}",
                f"**{plain_seconds / packed_seconds:.2f}×**",
                f"{flops['plain'] / flops['packed']:.2f}×",
                f"{statistics.median(r.before for r in plain + packed):.2f}",
                f"{plain_peak:.2f}",
                f"{packed_peak:.2f}",
                f"**{packed_peak / plain_peak:.2f}×**",
                f"{plain[0].loss:.5f}",
                f"{packed[0].loss:.5f}",
            ]
        )


if __name__ == "__main__":
    restart_with_one_heap()
    main()
