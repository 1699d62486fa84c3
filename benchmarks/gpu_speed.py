"""Cases of `gpu.py` on the cost of a step: limits of the machine, speed and memory against a plain loop, the plan."""

from __future__ import annotations

import functools
import importlib.metadata
import multiprocessing
import os
import platform
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import Any

import steps
import torch
from gpu_cases import Case, Setting, free_memory, one_rank, seconds_per_call
from gpu_steps import attentions
from plan_vs_measured import allocations, peak_in_use
from steps import RANKING_WEIGHT, Stepper, new_stepper
from workload import (
    MAX_LIST_TOKENS,
    NUM_PASSAGES,
    RESPONSE_TOKENS,
    WARM_UP_LENGTHS,
    model_config,
    new_lists,
    new_model,
    typical_lengths,
    useful_share,
)

from rankllm_composer.model.attention import choose_attention
from rankllm_composer.model.flops import training_flops
from rankllm_composer.model.objective import Objective
from rankllm_composer.preflight.memory import Workload, plan_memory
from rankllm_composer.preflight.plan import GPUS

GIB = 2**30
SEVEN_B = "mistral-7b-6-layers"
MIXED, LONG = "mixed", "4k"
TIMED_SECONDS = 3.0

# Words of the name that CUDA reports → the key of the card's peak in the package's table; the first that matches.
CARDS = {
    r"H100 (80GB HBM3|SXM.*)": "h100-80gb",
    r"H100 PCIe": "h100-pcie-80gb",
    r"H200": "h200-141gb",
    r"A100.80GB.*|A100.SXM4.80GB": "a100-80gb",
    r"A100.*": "a100-40gb",
    r"L40S": "l40s-48gb",
    r"A10": "a10-24gb",
    r"L4": "l4-24gb",
    r"RTX 3090": "rtx3090-24gb",
    r"RTX 4090": "rtx4090-24gb",
    r"B200": "b200-180gb",
    r"RTX 5090": "rtx5090-32gb",
}


def card_flops(name: str) -> float | None:
    """Return the data sheet's peak of a card in dense bfloat16 operations per second; None if it is not known."""
    words = name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    key = next((key for pattern, key in CARDS.items() if re.fullmatch(pattern, words)), None)
    return None if key is None else GPUS[key].bf16_flops


def peak_flops(device: str) -> float | None:
    """Return the peak of this machine's card; None on a CPU, or if it is not known."""
    return card_flops(torch.cuda.get_device_name()) if device == "cuda" else None


# --- the machine ---


def machine_cases(setting: Setting) -> Iterator[Case]:
    """The card, the versions, and the fastest matrix product and copy."""
    yield Case("this machine", functools.partial(describe_machine, setting), 15)


def describe_machine(setting: Setting) -> dict[str, Any]:
    """Return the card, the versions, and the limits that are measured here."""
    found: dict[str, Any] = {"card": "CPU", "cores": len(os.sched_getaffinity(0)), "Python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "mosaicml"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    size, num_bytes = (256, 2**20) if setting.reduced else (8192, 2**31)
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "memory GiB": properties.total_memory / GIB, "CUDA": torch.version.cuda}
        found["peak TFLOP/s, data sheet"] = (peak_flops("cuda") or 0) / 1e12 or "unknown"
    left, right = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(num_bytes, device=setting.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    found[f"bf16 product of {size}, TFLOP/s"] = (
        2 * size**3 / seconds_per_call(setting.device, lambda: left @ right, 10) / 1e12
    )
    found["copy, TB/s"] = 2 * num_bytes / seconds_per_call(setting.device, lambda: target.copy_(source), 10) / 1e12
    found["attentions"] = ", ".join(attentions(setting.device))
    return found


# --- steps ---


def speed_cases(setting: Setting) -> Iterator[Case]:
    """The packed step against a plain padded loop: tokens per second, MFU, peak memory and its plan.

    Mixed lists have typical lengths; the number of lists is such that the plain loop fits in 80 GB. "sharded" is FSDP2
    on one rank, as recipes with `parallelism.fsdp: true`; the others run under autocast. Other processes compute the
    plans meanwhile.
    """
    pool = None if setting.reduced else ProcessPoolExecutor(4, multiprocessing.get_context("spawn"))
    if setting.reduced:
        rows = [("toy", MIXED, [440, 220, 330], 0.5)]
    else:
        rows = [
            (SEVEN_B, LONG, [MAX_LIST_TOKENS] * 4, 0.0),
            (SEVEN_B, MIXED, typical_lengths(24), 1.0),
            ("llama-1b", MIXED, typical_lengths(4), 1.0),
            ("smollm2-135m", MIXED, typical_lengths(8), 0.0),
        ]
    for shape, kind, lengths, checkpointing in rows:
        chosen = choose_attention("auto", steps.recipe_device(setting.device))
        kinds = [("plain", "sdpa"), ("packed", chosen), ("packed, sharded", chosen)]
        if kind == LONG:
            kinds += [("packed", name) for name in attentions(setting.device) if name != chosen]
        for step, attention in kinds:
            row = {"shape": shape, "lists": kind, "step": step, "attention": attention}
            planned: Callable[[], int] | None = None
            if step != "plain":
                arguments = shape, lengths, checkpointing, attention, "sharded" in step
                planned = pool.submit(plan, *arguments).result if pool else functools.partial(plan, *arguments)
            run = functools.partial(measure_step, setting, row, lengths, checkpointing, planned)
            yield Case(f"{shape}, {kind} lists, {step}, {attention}", run, 25)


def measure_step(
    setting: Setting, row: dict[str, Any], lengths: list[int], checkpointing: float, planned: Callable[[], int] | None
) -> dict[str, Any]:
    """Measure one kind of step.

    Args:
        row: names of the shape, lists, step and attention; returned with the figures.
        planned: returns the planned peak of a packed step, in bytes.
    """
    device, shape = setting.device, row["shape"]
    is_packed, sharded = row["step"] != "plain", "sharded" in row["step"]
    found: dict[str, Any] = {**row, "useful / padded": 1.0 if is_packed else useful_share(lengths)}
    found["recomputed"] = f"{checkpointing:.0%}"
    planned_bytes = planned() if planned else None
    with one_rank(device) if sharded else nullcontext():
        options = {"attention": row["attention"]} if is_packed else {}
        stepper = new_stepper(
            "packed" if is_packed else "short plain",
            new_model(shape, device),
            activation_checkpointing=checkpointing,
            bf16=True,
            sharded=sharded,
            **options,
        )
        stepper(new_lists(WARM_UP_LENGTHS, shape))
        free_memory(device)
        lists = new_lists(lengths, shape)
        try:
            peak, loss = peak_bytes(stepper, lists, device)
            first, _ = stepper(lists)
            calls = min(8, max(2, round(TIMED_SECONDS / first)))
            seconds = seconds_per_call(device, lambda: stepper.run(lists), calls, warm_up=0)
        except torch.OutOfMemoryError:
            if is_packed:
                raise
            return {**found, "peak GiB": "out of memory"}
        finally:
            stepper.model, stepper.optimizer = None, None  # type: ignore[assignment]
    found |= {"loss": loss, "ms": seconds * 1e3, "tokens/s": sum(lengths) / seconds}
    flops = training_flops(model_config(shape), lengths, RESPONSE_TOKENS * len(lengths))
    found["TFLOP/s"] = flops / seconds / 1e12
    if (limit := peak_flops(device)) is not None:
        found["MFU"] = flops / seconds / limit
    found["peak GiB"] = peak / GIB
    if planned_bytes is not None:
        found |= {"planned GiB": planned_bytes / GIB, "plan / measured": planned_bytes / peak}
    return found


def peak_bytes(stepper: Stepper, lists: list[Any], device: str) -> tuple[int, float]:
    """Run a step; return the largest number of bytes in use at once, and its loss.

    On a CPU: the bytes of weights and optimizer states, plus the peak of the allocations of the step.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        loss = float(stepper.run(lists))
        return torch.cuda.max_memory_allocated(), loss
    kept = [*stepper.model.parameters(), *stepper.model.buffers()]
    kept += [value for state in stepper.optimizer.state.values() for value in state.values()]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in kept]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = float(stepper.run(lists))
    return sum(tensor.untyped_storage().nbytes() for tensor in local) + peak_in_use(allocations(profile)), loss


def plan(shape: str, lengths: list[int], checkpointing: float, attention: str, sharded: bool) -> int:
    """Return the planned peak of a packed step, in bytes."""
    work = Workload(
        config=model_config(shape),
        objective=Objective("combined", ranking_weight=RANKING_WEIGHT),
        lengths=tuple(lengths),
        num_targets=RESPONSE_TOKENS,
        num_candidates=NUM_PASSAGES,
        accumulates=False,
        fsdp=sharded,
        activation_checkpointing=checkpointing,
        attention=attention,
    )
    return plan_memory(work).peak
