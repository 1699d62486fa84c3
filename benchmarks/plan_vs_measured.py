"""How close is the planned memory of a rank to the measured memory?

    python benchmarks/plan_vs_measured.py

Compares the plan of each case with a real run on CPU ranks: Composer's Trainer, FSDP2 or DDP, gloo.

Measured memory is the shards of the weights before `fit`, plus the peak of the allocations of PyTorch's CPU allocator
during it (torch.profiler, profile_memory; see `peak_in_use`); the maximum over the ranks. Prints a table; exits with
code 1 if a plan is off by more than 10 %.
"""

from __future__ import annotations

import bisect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType

TOLERANCE = 0.1
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "combined": {},
    "combined, all layers recomputed": {"activation_checkpointing": 1.0},
    "combined, half of the layers recomputed": {"activation_checkpointing": 0.5},
    "ranking": {"objective": "ranking"},
    "generation, one microbatch per update": {"objective": "generation", "accumulates": False},
    "weights kept between forward and backward": {"reshard_after_forward": False, "activation_checkpointing": 1.0},
    "short lists, where weights dominate": {"length": 48},
    "replicated weights (DDP)": {"fsdp": False, "activation_checkpointing": 1.0},
    "LoRA on one rank": {"lora": True, "num_ranks": 1, "fsdp": False, "activation_checkpointing": 1.0},
}


def workload(case: dict[str, Any]) -> Any:
    """Return the workload of a case."""
    from peft import LoraConfig
    from transformers import MistralConfig

    from rankllm_composer.model.objective import Objective
    from rankllm_composer.preflight.memory import Workload

    options = {key: value for key, value in case.items() if key not in ("objective", "length", "lora")}
    adapters = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    defaults = {"num_ranks": 2, "precision": "fp32", "attention": "packed_sdpa"}
    return Workload(
        config=MistralConfig(**SIZES, sliding_window=None),
        objective=Objective(case.get("objective", "combined")),
        lengths=(case.get("length", 512),) * 4,
        num_targets=40,
        num_candidates=10,
        peft_config=adapters if case.get("lora") else None,
        **{**defaults, **options},
    )


def measure(case: dict[str, Any]) -> int:
    """Run two updates; return the peak bytes of the rank that uses the most memory. A collective."""
    from composer import DataSpec, Trainer
    from composer.utils import dist
    from composer.utils.parallelism import FSDP2Config
    from torch.distributed.tensor import DTensor
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    from rankllm_composer.data import packing
    from rankllm_composer.distributed import average_sharded_gradients
    from rankllm_composer.model.reranker import ListwiseReranker, checkpoint_activations
    from rankllm_composer.preflight.memory import placeholder_lists

    work = workload(case)
    lists_per_microbatch = len(work.lengths)
    rows = placeholder_lists(work) * (2 if work.accumulates else 1)
    base = AutoModelForCausalLM.from_config(work.config).float().train()
    checkpoint_activations(base, work.activation_checkpointing)
    model = ListwiseReranker(base, None, work.objective, peft_config=work.peft_config)
    sampler = dist.get_sampler(rows * (2 * work.num_ranks), shuffle=False)
    loader = DataLoader(
        rows * (2 * work.num_ranks), len(rows), sampler=sampler, collate_fn=lambda part: {"sequences": part}
    )
    spec = DataSpec(
        loader,
        split_batch=lambda batch, _: packing.split_batch(batch, max_lists=lists_per_microbatch),
        get_num_samples_in_batch=packing.num_samples_in_batch,
        get_num_tokens_in_batch=packing.num_tokens_in_batch,
    )
    sharding = FSDP2Config(reshard_after_forward=work.reshard_after_forward)
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        max_duration="2ba",
        optimizers=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True),
        device="cpu",
        device_train_microbatch_size=lists_per_microbatch,
        accumulate_train_batch_on_tokens=True,
        parallelism_config={"fsdp": sharding} if work.fsdp else None,
        progress_bar=False,
        seed=1,
    )
    average_sharded_gradients(model)
    kept = [p.to_local() if isinstance(p, DTensor) else p for p in (*model.parameters(), *model.buffers())]
    # DDP's initial buckets are left out: it replaces them in the first steps, and the profiler does not see them freed.
    in_use = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.fit()
    trainer.close()
    largest = torch.tensor(in_use + peak_in_use(allocations(profile)))
    dist.all_reduce(largest, reduce_operation="MAX")
    return int(largest)


def allocations(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """Return the events of PyTorch's CPU allocator in order: (address, bytes), with negative bytes if freed."""
    events: list[tuple[int, int, int]] = []
    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(events, key=lambda row: row[0])]


def peak_in_use(events: Iterable[tuple[int, int]]) -> int:
    """Return the peak of the bytes in use over the events of `allocations`, starting at 0.

    The profiler misses memory that other threads free, such as those of a collective. So an allocation first frees any
    block that it overlaps. Freeing a block without a recorded allocation lowers the sum.
    """
    in_use = peak = 0
    sizes: dict[int, int] = {}
    starts: list[int] = []  # of `sizes`, ascending
    for address, size in events:
        if size <= 0:
            in_use += size
            if sizes.pop(address, None) is not None:
                starts.remove(address)
            continue
        first = bisect.bisect_left(starts, address)
        if first and starts[first - 1] + sizes[starts[first - 1]] > address:
            first -= 1
        while first < len(starts) and starts[first] < address + size:
            in_use -= sizes.pop(starts.pop(first))
        starts.insert(first, address)
        sizes[address] = size
        in_use += size
        peak = max(peak, in_use)
    return peak


def run(name: str) -> int:
    """Run `measure` for a case in separate processes."""
    num_ranks = workload(CASES[name]).num_ranks
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "bytes.json")
        subprocess.run(
            [sys.executable, "-m", "composer.cli.launcher", "-n", str(num_ranks), __file__, name, result],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return int(json.loads(result.read_text()))


def main() -> int:
    from rankllm_composer.preflight.memory import plan_memory

    worst = 0.0
    print(f"{'case':<44} {'planned MB':>10} {'measured MB':>11} {'error':>7}")
    for name, case in CASES.items():
        planned, measured = plan_memory(workload(case)).peak, run(name)
        error = planned / measured - 1
        worst = max(worst, abs(error))
        print(f"{name:<44} {planned / 1e6:>10.1f} {measured / 1e6:>11.1f} {error:>+7.1%}", flush=True)
    print(f"the largest error is {worst:.1%}; the limit is {TOLERANCE:.0%}")
    return int(worst > TOLERANCE)


def worker(name: str, result: str) -> None:
    from composer.utils import dist

    torch.set_num_threads(1)
    dist.initialize_dist("cpu")
    peak = measure(CASES[name])
    if dist.get_global_rank() == 0:
        Path(result).write_text(json.dumps(peak))


if __name__ == "__main__":
    sys.exit(main() if len(sys.argv) == 1 else worker(*sys.argv[1:]))
