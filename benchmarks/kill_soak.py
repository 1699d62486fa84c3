"""Does a run that is killed at random moments end as one that never died?

    python benchmarks/kill_soak.py --kills 24 --seed 1

Each kill takes one rank, all ranks or the launcher with SIGKILL, or asks all ranks to stop with SIGTERM; after a random
batch, while a checkpoint is being written, or at a random second of the start. Runs are sharded (FSDP2), sharded with
copies of their checkpoints in an object store on loopback, or copied (DDP, with LoRA and its dropout), on two ranks.
Every other time a run with copies dies its disk is lost as well. A finished run has to equal its reference bit by bit:
metrics.jsonl without the clock (as far as it was not lost), weights, optimizer, schedule and random numbers. Exits 1
where one does not.
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
    "DDP + LoRA": [
        "parallelism.fsdp=false",
        "model.lora={rank: 4, dropout: 0.3, target_modules: [q_proj, v_proj]}",
    ],
}
STORE = "FSDP2, object store"
LAST_BATCH = 12


def wait_for_moment(run: Run, moment: str, chance: random.Random) -> bool:
    """Until a random moment of that kind; False where the run was done before."""
    batch = min(run.batches() + chance.randint(1, 4), LAST_BATCH - 1)
    deadline = time.monotonic() + chance.uniform(0, 12)
    while run.process.poll() is None:
        if moment == "batch" and run.batches() >= batch:
            return True
        if moment == "checkpoint" and run.is_saving() and run.batches() >= batch - 1:
            return True
        if moment == "second" and time.monotonic() >= deadline:
            return True
        time.sleep(0.002)
    return False


def strike(run: Run, victim: str, chance: random.Random) -> None:
    """Kill part of a run; what has ended already is left alone."""
    import psutil

    try:
        ranks = run.ranks()
        if victim == "launcher":
            run.process.kill()
        elif victim == "one rank":
            kill([chance.choice(ranks)] if ranks else [])
        else:
            kill(ranks, signal.SIGTERM if victim == "asked" else signal.SIGKILL)
    except psutil.NoSuchProcess:
        pass


def equals(folder: Path, reference: Path) -> list[str]:
    """What differs between two finished runs."""
    ours, theirs = comparable_metrics(folder), comparable_metrics(reference)
    found = [] if ours == theirs[len(theirs) - len(ours) :] else ["metrics.jsonl"]
    ends = [complete_checkpoints(place / "run" / "checkpoints")[-1][0] for place in (folder, reference)]
    return found + differences(*(checkpoint_content(end) for end in ends))


def soak(folder: Path, num_kills: int, seed: int) -> int:
    """Returns how many finished runs differ from their reference."""
    chance = random.Random(seed)
    material = folder / "material"
    material.mkdir()
    overlay = small_run(material, real_tokenizers.tokenizer_folder("mistral_v3", folder))
    references = {}
    for layout, more in LAYOUTS.items():
        run = Run(RECIPE, [*overlay, *more], folder / f"reference {layout}")
        assert run.finish() == 0, run.output()
        references[layout] = run.folder
    struck: Counter[str] = Counter()
    finished = num_bad = 0
    while sum(struck.values()) < num_kills:
        layout = chance.choice([*LAYOUTS, STORE])
        place, deaths = folder / f"run-{finished}", []
        more = LAYOUTS.get(layout) or ([f"checkpoint.folder=s3://soak/{place.name}"] if layout == STORE else [])
        while True:
            run = Run(RECIPE, [*overlay, *more], place)
            victim = chance.choice(["one rank", "all ranks", "launcher", "asked"])
            moment = chance.choice(["batch", "batch", "checkpoint", "second"])
            if len(deaths) < 4 and wait_for_moment(run, moment, chance):
                at = run.batches()
                strike(run, victim, chance)
                run.finish()
                deaths.append(f"{victim} at {moment} {at}")
                struck[f"{victim}, {moment}"] += 1
                if layout == STORE and chance.random() < 0.5:
                    shutil.rmtree(place / "run", ignore_errors=True)
                    deaths[-1] += ", its disk lost"
                continue
            code = run.finish()
            if code != 0:
                print(run.output())
                raise SystemExit(f"a run that nothing happened to ended with {code}")
            break
        different = equals(place, references["FSDP2" if layout == STORE else layout])
        finished, num_bad = finished + 1, num_bad + bool(different)
        print(f"{layout}: {'; '.join(deaths) or 'not struck'}: {different or 'the same'}", flush=True)
    print(f"{sum(struck.values())} kills in {finished} runs, {num_bad} runs differ: {dict(sorted(struck.items()))}")
    return num_bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, s3_server() as server:
        server.client().create_bucket(Bucket="soak")
        num_bad = soak(Path(folder), arguments.kills, arguments.seed)
    print(f"{time.monotonic() - started:.0f} s, seed {arguments.seed}")
    sys.exit(1 if num_bad else 0)


if __name__ == "__main__":
    main()
