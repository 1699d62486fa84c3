"""How close does the packed step come to what the cores can multiply?

    python benchmarks/machine_limit.py [--cases SHAPE:LISTS:CHECKPOINTING,…] [--repeats 3] [--threads N]

The limit is the fastest of a square product of 2,048 and of the model's own matrix products on the same cores: every
(tokens × in) · (in × out) of a layer and of the LM head, forward and both of its gradients, into memory already there,
each the best of several runs. It is taken anew before each step, and a share is that step's FLOPs / seconds / the GEMM
rate just measured; medians over the repeats.

Useful FLOPs are those of `rankllm_composer.model.flops`: matrix products of real tokens, forward and twice that
backward, and the causal half of attention. Recomputed activations are not useful work; the last column adds
them, for the cases that recompute. Everything else a step does (norms, rotary embedding, softmax, optimizer) takes time
and counts nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from report import NUM_CORES, on_one_heap, print_columns, print_head, print_row
from steps import new_stepper
from workload import RESPONSE_TOKENS, SHAPES, WARM_UP_LENGTHS, new_lists, new_model, recomputed_flops, typical_lengths

from rankllm_composer.model.flops import training_flops

CASES = "smollm2-135m:1:0,smollm2-135m:1:1,mistral-30m:2:0"
GEMM_RUNS = 4
SQUARE = 2048


def products(shape: str, num_tokens: int, num_logits: int) -> dict[str, tuple[int, int, int]]:
    """(m, k, n) of a square product and of a shape's: forward, gradient of the input, gradient of the weight."""
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
    found = {"square": (SQUARE, SQUARE, SQUARE)}
    for name, (m, k, n) in linear.items():
        found[name] = (m, k, n)
        found[f"{name}, input's gradient"] = (m, n, k)
        found[f"{name}, weight's gradient"] = (n, m, k)
    return found


def gemm_rate(shape: str, num_tokens: int, num_logits: int) -> tuple[float, str]:
    """FLOPs a second of the fastest product, and which it is."""
    best = (0.0, "")
    for name, (m, k, n) in products(shape, num_tokens, num_logits).items():
        left, right, result = torch.rand(m, k), torch.rand(k, n), torch.empty(m, n)
        for _ in range(GEMM_RUNS):
            started = time.perf_counter()
            torch.mm(left, right, out=result)
            best = max(best, (2 * m * k * n / (time.perf_counter() - started), name))
    return best


def measure(shape: str, lengths: list[int], checkpointing: float, repeats: int) -> dict[str, Any]:
    """GEMM rate and step by turns: medians."""
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
        taken, _ = step(lists)
        seconds.append(taken)
        peaks.append(peak)
        shares.append(useful / taken / peak)
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
    print_head(options.threads)
    print_columns(
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
        found = measure(shape, lengths, float(checkpointing), options.repeats)
        print_row(
            [
                shape,
                found["fastest"],
                f"{float(checkpointing):.0%}",
                num_lists,
                f"{sum(lengths):,}",
                f"{found['tera']:.2f}",
                f"{found['seconds']:.1f}",
                f"{found['peak'] / 1e9:.0f}",
                f"{found['tera'] / found['seconds'] * 1e3:.0f}",
                f"**{found['share']:.2f}**",
                f"{found['with_recomputed']:.2f}",
            ]
        )


if __name__ == "__main__":
    on_one_heap()
    main()
