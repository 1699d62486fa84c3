"""Compare runs killed at random moments with uninterrupted ones.

    python benchmarks/kill_soak.py --kills 24 --seed 1

Each kill sends SIGKILL to one rank, all ranks or the launcher, or SIGTERM to all ranks: after a random batch, while a
checkpoint is being written, or at a random second after the start. Runs use FSDP2, FSDP2 with copies of the checkpoints
in a local object store, or DDP with LoRA and dropout, on two ranks. Every other kill of a run with copies also deletes
its folder. A finished run must equal its reference bit for bit: metrics.jsonl without times (as far as it was not
deleted), weights, optimizer, schedule and random numbers. The exit code is 1 if one differs.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support import real_tokenizers
from support.killing import Run, checkpoint_content, comparable_metrics, differences, kill
from support.s3_server import s3_server
from support.small_run import RECIPE, small_run

from rankllm_composer.checkpoints.folder import complete_checkpoints

LAYOUTS = {
    "FSDP2": [],
    "DDP + LoRA": ["parallelism.fsdp=false", "model.lora={rank: 4, dropout: 0.3, target_modules: [q_proj, v_proj]}"],
}
STORE = "FSDP2, object store"
LAST_BATCH = 12


def wait_for_moment(run: Run, moment: str, rng: random.Random) -> bool:
    """Wait for a random moment of the given kind; return False if the run ended first."""
    batch = min(run.batches() + rng.randint(1, 4), LAST_BATCH - 1)
    deadline = time.monotonic() + rng.uniform(0, 12)
    while run.process.poll() is None:
        if moment == "batch" and run.batches() >= batch:
            return True
        if moment == "checkpoint" and run.is_saving() and run.batches() >= batch - 1:
            return True
        if moment == "second" and time.monotonic() >= deadline:
            return True
        time.sleep(0.002)
    return False


def interrupt(run: Run, victim: str, rng: random.Random) -> None:
    """Send a signal to part of a run, if it is still alive."""
    import psutil

    try:
        ranks = run.ranks()
        if victim == "launcher":
            run.process.kill()
        elif victim == "one rank":
            kill([rng.choice(ranks)] if ranks else [])
        else:
            kill(ranks, signal.SIGTERM if victim == "all ranks (SIGTERM)" else signal.SIGKILL)
    except psutil.NoSuchProcess:
        pass


def differing_parts(folder: Path, reference: Path) -> list[str]:
    """Return what differs between two finished runs."""
    lines, expected = comparable_metrics(folder), comparable_metrics(reference)
    different = [] if lines == expected[len(expected) - len(lines) :] else ["metrics.jsonl"]
    ends = [complete_checkpoints(parent / "run" / "checkpoints")[-1][0] for parent in (folder, reference)]
    return different + differences(*(checkpoint_content(end) for end in ends))


def soak(folder: Path, num_kills: int, seed: int) -> int:
    """Kill and resume runs; return the number of finished runs that differ from their reference."""
    rng = random.Random(seed)
    material = folder / "material"
    material.mkdir()
    overrides = small_run(material, real_tokenizers.tokenizer_folder("mistral_v3", folder))
    references = {}
    for layout, extra in LAYOUTS.items():
        run = Run(RECIPE, [*overrides, *extra], folder / f"reference {layout}")
        assert run.finish() == 0, run.output()
        references[layout] = run.folder
    counts: Counter[str] = Counter()
    finished = num_bad = 0
    while sum(counts.values()) < num_kills:
        layout = rng.choice([*LAYOUTS, STORE])
        run_folder, kills = folder / f"run-{finished}", []
        extra = LAYOUTS.get(layout) or ([f"checkpoint.folder=s3://soak/{run_folder.name}"] if layout == STORE else [])
        while True:
            run = Run(RECIPE, [*overrides, *extra], run_folder)
            victim = rng.choice(["one rank", "all ranks", "launcher", "all ranks (SIGTERM)"])
            moment = rng.choice(["batch", "batch", "checkpoint", "second"])
            if len(kills) < 4 and wait_for_moment(run, moment, rng):
                at = run.batches()
                interrupt(run, victim, rng)
                run.finish()
                kills.append(f"{victim} at {moment} {at}")
                counts[f"{victim}, {moment}"] += 1
                if layout == STORE and rng.random() < 0.5:
                    shutil.rmtree(run_folder / "run", ignore_errors=True)
                    kills[-1] += ", folder deleted"
                continue
            code = run.finish()
            if code != 0:
                print(run.output())
                raise SystemExit(f"an uninterrupted run ended with {code}")
            break
        different = differing_parts(run_folder, references["FSDP2" if layout == STORE else layout])
        finished, num_bad = finished + 1, num_bad + bool(different)
        print(f"{layout}: {'; '.join(kills) or 'not killed'}: {different or 'equal'}", flush=True)
    print(f"{sum(counts.values())} kills in {finished} runs, {num_bad} runs differ: {dict(sorted(counts.items()))}")
    return num_bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, s3_server() as server:
        server.client().create_bucket(Bucket="soak")
        num_bad = soak(Path(folder), arguments.kills, arguments.seed)
    print(f"{time.monotonic() - started:.0f} s, seed {arguments.seed}")
    sys.exit(1 if num_bad else 0)


if __name__ == "__main__":
    main()
