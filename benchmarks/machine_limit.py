"""How close does the packed step come to the matrix-multiplication speed of the cores?

    python benchmarks/machine_limit.py [--cases SHAPE:LISTS:CHECKPOINTING,…] [--repeats 3] [--threads N]

The limit is the speed of the fastest matrix product on the same cores: a square one of size 2,048, or one of the
model's own, (tokens × in) · (in × out) of each linear layer and of the LM head, forward and both gradients. Outputs are
preallocated; each product takes the best of several runs. The limit is measured again before each step. A step's share
is FLOPs / seconds / that limit; values are medians over the repeats.

Useful FLOPs are those of `rankllm_composer.model.flops`: matrix products of real tokens (forward, and twice that for
the backward pass) and the causal half of attention. Recomputed activations are not useful work; the last column adds
them, for the cases that recompute. Everything else in a step (norms, rotary embedding, softmax, optimizer) takes time
but counts as zero FLOPs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from report import NUM_CORES, print_header, print_machine, print_row, restart_with_one_heap
from steps import new_stepper
from workload import RESPONSE_TOKENS, SHAPES, WARM_UP_LENGTHS, new_lists, new_model, recomputed_flops, typical_lengths

from rankllm_composer.model.flops import training_flops

CASES = "smollm2-135m:1:0,smollm2-135m:1:1,mistral-30m:2:0"
GEMM_RUNS = 4
SQUARE = 2048


def products(shape: str, num_tokens: int, num_logits: int) -> dict[str, tuple[int, int, int]]:
    """Return (m, k, n) of a square product, and of each linear layer: forward, input gradient, weight gradient."""
    sizes = SHAPES[shape][1]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    head_dim = hidden // sizes["num_attention_heads"]
    linear = {
        "query, output": (num_tokens, hidden, hidden),
        "key, value": (num_tokens, hidden, sizes["num_key_value_heads"] * head_dim),
        "gate, up": (num_tokens, hidden, inner),
        "down": (num_tokens, inner, hidden),
        "LM head": (num_logits, hidden, sizes["vocab_size"]),
    }
    sizes_by_name = {"square": (SQUARE, SQUARE, SQUARE)}
    for name, (m, k, n) in linear.items():
        sizes_by_name[name] = (m, k, n)
        sizes_by_name[f"{name}, input gradient"] = (m, n, k)
        sizes_by_name[f"{name}, weight gradient"] = (n, m, k)
    return sizes_by_name


def gemm_rate(shape: str, num_tokens: int, num_logits: int) -> tuple[float, str]:
    """Return the FLOP/s of the fastest product, and its name."""
    best = (0.0, "")
    for name, (m, k, n) in products(shape, num_tokens, num_logits).items():
        left, right, result = torch.rand(m, k), torch.rand(k, n), torch.empty(m, n)
        for _ in range(GEMM_RUNS):
            started = time.perf_counter()
            torch.mm(left, right, out=result)
            best = max(best, (2 * m * k * n / (time.perf_counter() - started), name))
    return best


def measure(shape: str, lengths: list[int], checkpointing: float, repeats: int) -> dict[str, Any]:
    """Measure the GEMM rate and the step alternately; return medians."""
    model = new_model(shape)
    config, num_logits = model.config, RESPONSE_TOKENS * len(lengths)
    step = new_stepper("packed", model, activation_checkpointing=checkpointing)
    step(new_lists(WARM_UP_LENGTHS, shape))
    useful = training_flops(config, lengths, num_logits)
    recomputed = checkpointing * recomputed_flops(config, lengths)
    lists = new_lists(lengths, shape)
    seconds, peaks, shares = [], [], []
    fastest = ""
    for _ in range(repeats):
        peak, fastest = gemm_rate(shape, sum(lengths), num_logits)
        step_seconds, _ = step(lists)
        seconds.append(step_seconds)
        peaks.append(peak)
        shares.append(useful / step_seconds / peak)
    share = statistics.median(shares)
    return {
        "seconds": statistics.median(seconds),
        "tera": useful / 1e12,
        "peak": statistics.median(peaks),
        "fastest": fastest,
        "share": share,
        "with_recomputed": share * (useful + recomputed) / useful,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_machine(options.threads)
    print_header(
        [
            "shape",
            "fastest product",
            "recomputed layers",
            "lists",
            "tokens",
            "useful TFLOP",
            "seconds",
            "GEMM GFLOP/s",
            "useful GFLOP/s",
            "**share of GEMM**",
            "with recomputed",
        ],
        num_text=2,
    )
    for case in options.cases.split(","):
        shape, num_lists, checkpointing = case.split(":")
        lengths = typical_lengths(int(num_lists))
        result = measure(shape, lengths, float(checkpointing), options.repeats)
        print_row(
            [
                shape,
                result["fastest"],
                f"{float(checkpointing):.0%}",
                num_lists,
                f"{sum(lengths):,}",
                f"{result['tera']:.2f}",
                f"{result['seconds']:.1f}",
                f"{result['peak'] / 1e9:.0f}",
                f"{result['tera'] / result['seconds'] * 1e3:.0f}",
                f"**{result['share']:.2f}**",
                f"{result['with_recomputed']:.2f}",
            ]
        )


if __name__ == "__main__":
    restart_with_one_heap()
    main()
