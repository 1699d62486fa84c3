"""How much faster and smaller is the packed step than a plain Hugging Face loop?

    python benchmarks/packed_step.py [--cases SHAPE:LISTS:CHECKPOINTING,…] [--repeats 2] [--threads N]

Both steps (`steps.py`) train the same lists (`workload.py`) on the same weights with the same objective: forward,
backward and optimizer step of one microbatch. The plain loop pads to the longest list and makes logits at every place,
as the published training does; its attention is transformers' default on this machine. CHECKPOINTING is the share of
layers whose activations are recomputed, 1 in the published runs, for both; two numbers, 1/0.5, are the plain loop's and
the packed step's. Column "by FLOPs" is the speed that the arithmetic alone would give: matrix products and the causal
half of attention of what each computes, recomputed layers too. 30 layers cost much and the LM head little, four layers
the other way round, so the same saving shows in one as a fraction and in the other as a multiple.

Every figure comes from a process of its own that takes the step twice, and the second counts: the first touches memory
that the system has to clear, as no later step of a training does, and the more so the more it takes. Plain and packed
alternate, and figures are medians over the repeats. The losses of both must agree to 1 in 10,000, or the benchmark
stops. Useful tokens are real ones, whatever was computed. Peak memory is the highest resident memory of the process
(`ru_maxrss`) with all that it holds: libraries, weights, gradients and Adam's two moments too, which are the same for
both; column "before" is the peak ahead of the step. For resident memory to be what is in use, freed memory is kept for
what comes next in both (`report.ONE_HEAP`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import NamedTuple

import torch
from report import NUM_CORES, in_own_process, on_one_heap, peak_gib, print_columns, print_head, print_row
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
    """Steps in a process of its own: seconds of the second, loss, GiB resident before them, GiB at the peak."""

    seconds: float
    loss: float
    before: float
    peak: float


def measure(kind: str, shape: str, lengths: list[int], checkpointing: float, threads: int) -> Measured:
    """A step of a kind, "plain" or "packed", in this process."""
    torch.set_num_threads(threads)
    step = new_stepper(kind, new_model(shape), activation_checkpointing=checkpointing)
    step(new_lists(WARM_UP_LENGTHS, shape))
    before = peak_gib()
    lists = new_lists(lengths, shape)
    step(lists)
    seconds, loss = step(lists)
    return Measured(seconds, loss, before, peak_gib())


def computed_flops(kind: str, shape: str, lengths: list[int], checkpointing: float) -> float:
    """Operations of one step of a kind: padding, every logit and recomputed layers where it computes them."""
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
    print_head(options.threads)
    print_columns(
        [
            "shape",
            "recomputed layers",
            "lists",
            "useful of padded tokens",
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
                results.append(in_own_process(measure, *arguments, threads=options.threads))
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
    on_one_heap()
    main()
