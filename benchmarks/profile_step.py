"""Which operations take the time of a step, in a plain Hugging Face loop and in the packed step?

    python benchmarks/profile_step.py [--shape SHAPE] [--lists 1] [--checkpointing 1] [--top 8] [--threads N]

Profiles one step of each with torch.profiler, after one without it (the first uses memory that the system must clear).
An operator is attributed to the part of the model that called it; in the backward pass, to the part whose forward pass
created it. Self CPU time excludes the operators that an operator calls; it includes the time it waits for threads. The
profiler itself takes time; for speeds see `packed_step.py`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from report import NUM_CORES, print_header, print_machine, print_row, restart_with_one_heap
from steps import STEPS, new_stepper
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AttentionInterface, PreTrainedModel
from workload import SHAPES, new_lists, new_model, typical_lengths, useful_share

from rankllm_composer.model.reranker import decoder_layers

LINEAR, ATTENTION, HEAD = "linear layers", "attention", "LM head and losses"
NORMS, ACTIVATION = "norms, rotary embedding", "activation of the MLP"
OPTIMIZER, REST = "optimizer", "rest (embedding, residuals)"
PARTS = (LINEAR, ATTENTION, HEAD, NORMS, ACTIVATION, OPTIMIZER, REST)
NODE = "autograd::engine::evaluate_function: "  # prefix of the names of backward nodes


def named(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its operators are recorded under a part's name."""

    def recorded(*arguments: Any, **options: Any) -> Any:
        with record_function(part):
            return function(*arguments, **options)

    return recorded


@contextmanager
def named_parts(model: PreTrainedModel) -> Iterator[None]:
    """Record a model's operators under the innermost part that contains them."""
    parts: dict[torch.nn.Module, str] = {model: HEAD, model.model: REST, **dict.fromkeys(decoder_layers(model), REST)}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, torch.nn.Linear):
            parts[module] = HEAD if name == "lm_head" else LINEAR
        elif kind.endswith(("Norm", "RotaryEmbedding", "Attention")):  # Attention applies the rotary embedding
            parts[module] = NORMS
        elif kind.endswith("MLP"):
            parts[module] = ACTIVATION
    for module, part in parts.items():
        module.forward = named(part, module.forward)  # type: ignore[method-assign]
    name = model.config._attn_implementation
    attention = AttentionInterface()[name]
    AttentionInterface.register(name, named(ATTENTION, attention))
    try:
        yield
    finally:
        AttentionInterface.register(name, attention)
        for module in parts:
            del module.forward


def enclosing_part(event: Any) -> str | None:
    """Return the innermost part that contains an operator."""
    while event is not None and event.name not in PARTS:
        event = event.cpu_parent
    return event and event.name


def by_operator(events: list[Any]) -> Counter[tuple[str, str]]:
    """Sum the self CPU seconds of operators by (part, operator)."""
    # A backward node has the sequence number of its forward operator: the last one that starts with that number.
    forward_parts = {event.sequence_nr: part for event in events if (part := enclosing_part(event))}
    seconds: Counter[tuple[str, str]] = Counter()
    for event in events:
        part, node = enclosing_part(event), event
        while part is None and node is not None:
            if node.name.startswith(NODE):
                part = forward_parts.get(node.sequence_nr)
            node = node.cpu_parent
        operator = "(between operators)" if event.name in PARTS else event.name.removeprefix(NODE)
        seconds[part or REST, operator] += event.self_cpu_time_total / 1e6
    return seconds


def measure(kind: str, shape: str, lengths: list[int], checkpointing: float) -> Counter[tuple[str, str]]:
    """Profile one "plain" or "packed" step; return self CPU seconds by (part, operator)."""
    model = new_model(shape)
    step = new_stepper(kind, model, activation_checkpointing=checkpointing)
    lists = new_lists(lengths, shape)
    step(lists)
    step.loss = named(HEAD, step.loss)
    step.optimizer.step = named(OPTIMIZER, step.optimizer.step)  # type: ignore[method-assign]
    step.optimizer.zero_grad = named(OPTIMIZER, step.optimizer.zero_grad)  # type: ignore[method-assign]
    with named_parts(model), profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(lists)
    return by_operator(profiler.events())


def main() -> None:
    """Print the seconds by part, then the slowest operators."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--lists", type=int, default=1)
    parser.add_argument("--checkpointing", type=float, default=1.0)
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_machine(options.threads)
    lengths = typical_lengths(options.lists)
    print(
        f"{options.shape}, {len(lengths)} lists, {sum(lengths):,} tokens ({useful_share(lengths):.0%} of padded), "
        f"{options.checkpointing:.0%} of the layers recomputed\n"
    )
    found = {kind: measure(kind, options.shape, lengths, options.checkpointing) for kind in STEPS}
    totals = {kind: sum(found[kind].values()) for kind in STEPS}

    def cells(kind: str, seconds: float) -> list[str]:
        return [f"{seconds:.2f}", f"{seconds / totals[kind]:.0%}"]

    print_header(["part, self CPU seconds", *(name for kind in STEPS for name in (kind, "share"))])
    for part in PARTS:
        seconds = {kind: sum(s for (p, _), s in found[kind].items() if p == part) for kind in STEPS}
        print_row([part, *(cell for kind in STEPS for cell in cells(kind, seconds[kind]))])
    print_row(["total", *(cell for kind in STEPS for cell in cells(kind, totals[kind]))])
    for kind in STEPS:
        print(f"\nOperators of the {kind} step:\n")
        print_header(["operator", "part", "self CPU seconds", "share"], num_text=2)
        for (part, operator), seconds in found[kind].most_common(options.top):
            print_row([f"`{operator}`", part, *cells(kind, seconds)])


if __name__ == "__main__":
    restart_with_one_heap()
    main()
