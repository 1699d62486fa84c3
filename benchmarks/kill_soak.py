"""Compare runs killed at random moments with uninterrupted ones.

    python benchmarks/kill_soak.py --kills 24 --seed 1

Each kill sends SIGKILL to a rank, all ranks, loader workers, the launcher or several of them, or asks the run to stop
with SIGTERM or SIGHUP: after a random batch; while shards are built, a checkpoint or an export is written, or an old
checkpoint is removed; in the first second; or at a random second after the start. The same command is started again
at once, whatever still lives of the killed run, and may be killed again at once. Runs use FSDP2, FSDP2 with copies of
the checkpoints in a local object store, or DDP with LoRA and dropout, on two ranks. Every other kill of a run with
copies also deletes its folder, once all of its processes have ended. A finished run must equal its reference bit for
bit: metrics.jsonl without times, weights, optimizer, schedule, random numbers and exports, as far as they were not
deleted. It must leave no process, lock, shared memory or temporary file. The exit code is 1 if one differs.
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
from collections.abc import Callable
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
MOST_KILLS = 4
STOP_SIGNALS = {"all ranks (SIGTERM)": signal.SIGTERM, "everything (SIGHUP)": signal.SIGHUP}
VICTIMS = (
    "one rank",
    "all ranks",
    "launcher",
    "launcher and one rank",
    "one worker",
    "all workers",
    "everything",
    *STOP_SIGNALS,
)
MOMENTS: dict[str, Callable[[Run], bool]] = {
    "building": Run.is_building,
    "checkpoint": Run.is_saving,
    "export": Run.is_exporting,
    "pruning": Run.is_pruning,
}
"""Moments that can be seen in the folder of a run."""


def wait_for_moment(run: Run, moment: str, rng: random.Random) -> bool:
    """Wait for a random moment of the given kind; return False if the run ended first."""
    batch = min(run.batches() + rng.randint(1, 4), LAST_BATCH - 1)
    deadline = time.monotonic() + rng.uniform(0, 1 if moment == "first second" else 30)
    while run.process.poll() is None:
        if moment == "batch" and run.batches() >= batch:
            return True
        if moment in ("first second", "second") and time.monotonic() >= deadline:
            return True
        if moment in MOMENTS and MOMENTS[moment](run):
            return True
        time.sleep(0.002)
    return False


def interrupt(run: Run, victim: str, rng: random.Random) -> bool:
    """Send a signal to part of a run; return whether one of its processes was still alive."""
    ranks, workers, launcher = run.ranks(), run.workers(), run.living_launcher()
    one_rank = [rng.choice(ranks)] if ranks else []
    victims = {
        "one rank": one_rank,
        "launcher": launcher,
        "launcher and one rank": launcher + one_rank,
        "one worker": [rng.choice(workers)] if workers else [],
        "all workers": workers,
        "everything": launcher + ranks + workers,
        "everything (SIGHUP)": launcher + ranks + workers,
    }
    return kill(victims.get(victim, ranks), STOP_SIGNALS.get(victim, signal.SIGKILL))


def differing_parts(folder: Path, reference: Path, was_deleted: bool) -> list[str]:
    """Return what differs between two finished runs; exports before a deletion of the folder need not exist."""
    lines, expected = comparable_metrics(folder), comparable_metrics(reference)
    different = [] if lines == expected[len(expected) - len(lines) :] else ["metrics.jsonl"]
    ends = [complete_checkpoints(parent / "run" / "checkpoints")[-1][0] for parent in (folder, reference)]
    different += differences(*(checkpoint_content(end) for end in ends))
    for weights in sorted((reference / "run" / "hf").glob("epoch_*/*.safetensors")):
        name = weights.relative_to(reference)
        copy = folder / name
        if copy.read_bytes() != weights.read_bytes() if copy.exists() else not was_deleted:
            different.append(str(name))
    return different


def soak(folder: Path, num_kills: int, seed: int) -> int:
    """Kill and resume runs; return the number of finished runs that differ from their reference."""
    rng = random.Random(seed)
    material = folder / "material"
    material.mkdir()
    overrides = [
        *small_run(material, real_tokenizers.tokenizer_folder("mistral_v3", folder)),
        "data.train.local=shards",  # each run builds its own
        f"data.train.source={{input: {material / 'records.json'}}}",
        "checkpoint.keep=2",
        "checkpoint.export={interval: 1ep}",
    ]
    references = {}
    for layout, extra in LAYOUTS.items():
        run = Run(RECIPE, [*overrides, *extra], folder / f"reference {layout}", is_warm=False)
        assert run.finish() == 0, run.output()
        references[layout] = run.folder
    counts: Counter[str] = Counter()
    finished = num_bad = 0
    while sum(counts.values()) < num_kills:
        layout = rng.choice([*LAYOUTS, STORE])
        run_folder, kills = folder / f"run-{finished}", []
        extra = LAYOUTS.get(layout) or ([f"checkpoint.folder=s3://soak/{run_folder.name}"] if layout == STORE else [])
        killed: list[Run] = []
        while True:
            run = Run(RECIPE, [*overrides, *extra], run_folder, is_patient=True, is_warm=False)
            victim = rng.choice(VICTIMS)
            moment = rng.choice(["batch", "first second", "second", *(MOMENTS if kills else ["building"])])
            if len(kills) < MOST_KILLS and wait_for_moment(run, moment, rng):
                at = run.batches()
                if not interrupt(run, victim, rng):
                    moment, victim = "first second", "launcher"  # there are no such processes yet
                    interrupt(run, victim, rng)
                killed.append(run)
                kills.append(f"{victim} at {moment} {at}")
                counts[f"{victim}, {moment}"] += 1
                if layout == STORE and rng.random() < 0.5:
                    for earlier in killed:
                        earlier.finish()
                    shutil.rmtree(run_folder / "run", ignore_errors=True)
                    kills[-1] += ", folder deleted"
                continue
            code = run.finish()
            if code != 0:
                print(f"{layout}: {'; '.join(kills)}\n{run.output()}")
                raise SystemExit(f"an uninterrupted run ended with {code}")
            break
        for earlier in killed:
            earlier.finish()
        was_deleted = any(kill.endswith("deleted") for kill in kills)
        different = differing_parts(run_folder, references["FSDP2" if layout == STORE else layout], was_deleted)
        different += [f"left behind: {path.name}" for path in run.leftovers()]
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
