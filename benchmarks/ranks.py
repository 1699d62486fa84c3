"""How much does a second rank speed up training, with DDP and with FSDP2?

    python benchmarks/ranks.py [--shape SHAPE] [--lists 4] [--steps 2]

Measures useful tokens per second of the packed step in Composer's Trainer with gloo. The same global batch is split
over one or two ranks, with one list per microbatch and every layer recomputed. A second rank uses the second core, so
the fair comparison is with one rank of two threads. Each row is a separate run under the `composer` launcher. The first
step is not counted; the value is the median of the others, from the end of one step to the end of the next (batch,
forward, backward, collectives, optimizer).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import print_header, print_machine, print_row, restart_with_one_heap
from workload import SHAPES, new_lists, new_model, typical_lengths

# name: number of ranks, threads per rank, whether the model is sharded
RUNS = {
    "1 rank, 1 thread": (1, 1, False),
    "1 rank, 2 threads": (1, 2, False),
    "2 ranks, 1 thread each, DDP": (2, 1, False),
    "2 ranks, 1 thread each, FSDP2": (2, 1, True),
}


def train(shape: str, lengths: list[int], num_steps: int, threads: int, sharded: bool) -> list[float]:
    """Train on this rank; return the seconds of each step except the first. A collective."""
    import torch
    from composer import Callback, DataSpec, Trainer
    from composer.utils import dist
    from composer.utils.parallelism import FSDP2Config
    from torch.utils.data import DataLoader, IterableDataset

    from rankllm_composer.data import packing
    from rankllm_composer.distributed import average_sharded_gradients
    from rankllm_composer.model.objective import Objective
    from rankllm_composer.model.reranker import ListwiseReranker, checkpoint_activations

    class Batches(IterableDataset):
        """This rank's share of every global batch."""

        def __iter__(self):
            rank, world = dist.get_global_rank(), dist.get_world_size()
            for _ in range(len(self)):
                yield {"sequences": new_lists(lengths, shape)[rank::world]}

        def __len__(self) -> int:
            return num_steps + 1

    class Clock(Callback):
        """Records the end time of each step."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def batch_end(self, state: Any, logger: Any) -> None:
            self.ends.append(time.perf_counter())

    torch.set_num_threads(threads)
    dist.initialize_dist("cpu")
    spec = DataSpec(
        DataLoader(Batches(), batch_size=None),
        split_batch=lambda batch, _: packing.split_batch(batch, max_lists=1),
        get_num_samples_in_batch=packing.num_samples_in_batch,
        get_num_tokens_in_batch=packing.num_tokens_in_batch,
    )
    base = new_model(shape)
    checkpoint_activations(base, 1.0)
    model = ListwiseReranker(base, None, Objective("combined"))
    clock = Clock()
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        max_duration=f"{num_steps + 1}ba",
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True),
        callbacks=[clock],
        device="cpu",
        device_train_microbatch_size=1,
        accumulate_train_batch_on_tokens=True,
        parallelism_config={"fsdp": FSDP2Config()} if sharded else None,
        progress_bar=False,
        seed=1,
    )
    average_sharded_gradients(model)
    trainer.fit()
    trainer.close()
    return [end - start for start, end in zip(clock.ends, clock.ends[1:])]


def launch(name: str, shape: str, lengths: list[int], num_steps: int) -> float:
    """Start a run of `RUNS` under the launcher; return the median seconds per step."""
    num_ranks, threads, _ = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds.json"
        arguments = json.dumps([name, shape, lengths, num_steps, str(result)])
        subprocess.run(
            [sys.executable, "-m", "composer.cli.launcher", "-n", str(num_ranks), __file__, arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        return statistics.median(json.loads(result.read_text()))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mistral-30m", choices=SHAPES)
    parser.add_argument("--lists", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    print_machine("1 or 2")
    lengths = typical_lengths(options.lists)
    print(f"{options.shape}, {len(lengths)} lists per global batch, {sum(lengths):,} tokens\n")
    print_header(["run", "seconds per step", "tokens/s", "vs 1 rank, 1 thread", "vs 1 rank, 2 threads"])
    seconds: dict[str, float] = {}
    for name in RUNS:
        seconds[name] = launch(name, options.shape, lengths, options.steps)
        ratios = [
            f"{seconds[base] / seconds[name]:.2f}×" if base in seconds else "–"
            for base in ("1 rank, 1 thread", "1 rank, 2 threads")
        ]
        print_row([name, f"{seconds[name]:.2f}", f"{sum(lengths) / seconds[name]:,.0f}", *ratios])


def worker(arguments: str) -> None:
    """Train on one rank; rank 0 writes the seconds."""
    from composer.utils import dist

    name, shape, lengths, num_steps, result = json.loads(arguments)
    _, threads, sharded = RUNS[name]
    seconds = train(shape, lengths, num_steps, threads, sharded)
    if dist.get_global_rank() == 0:
        Path(result).write_text(json.dumps(seconds))


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("["):
        worker(sys.argv[1])
    else:
        restart_with_one_heap()
        main()
