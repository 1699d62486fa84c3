"""How do the speed and memory of a shard build change with the number of records?

    python benchmarks/shard_build.py [--records 10000,100000,1000000] [--processes 1,2] [--folder DIR]

Builds sets from synthetic records in `.jsonl` (20 passages of 30 to 80 words, about 8 kB per record; ids are unique,
texts repeat after 10,000 records, which is more than a shard contains). Prints per size: records/s and MB/s of source
text from the first record to the published index, records per CPU second (the speed of one core on a shared machine),
and the peak resident memory of the building process before the build (libraries) and after it, and of its largest
worker. Each build runs in a separate process; its start is not counted, the start of its workers is. Needs disk space
of about 1.5 times the source.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from rankllm_composer.prompts.permutations import format_permutation
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn

NUM_PASSAGES = 20
NUM_TEXTS = 10_000


def write_source(path: Path, num_records: int) -> None:
    """Write records with passages cut from one long random text at random positions."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(20_000)]
    words = rng.choices(vocabulary, k=1_000_000)
    bodies = []
    for _ in range(min(num_records, NUM_TEXTS)):
        places = [rng.randrange(len(words) - 80) for _ in range(NUM_PASSAGES)]
        passages = [" ".join(words[place : place + 30 + place % 51]) for place in places]
        order = sorted(range(NUM_PASSAGES), key=places.__getitem__)
        turns = (SYSTEM_MESSAGE, render_user_turn(passages[0][:40], passages), format_permutation(order))
        conversation = [{"from": role, "value": text} for role, text in zip(("system", "human", "gpt"), turns)]
        bodies.append(json.dumps(conversation))
    with path.open("w") as file:
        for i in range(num_records):
            file.write(f'{{"id": "q{i}", "conversations": {bodies[i % len(bodies)]}}}\n')


def measure(source: Path, output: Path, num_processes: int, results: Any) -> None:
    """Build once in this process; report seconds, CPU seconds, peak MiB before, after, and of the largest worker."""
    import streaming  # noqa: F401 - its import takes seconds and must not be measured

    from rankllm_composer.options import BuildOptions, SourceOptions
    from rankllm_composer.shards.build import build_shards

    before, _, cpu_before, _ = peak_and_cpu()
    options = BuildOptions(num_processes=num_processes)
    built = build_shards(output, SourceOptions(input=source), options, report=lambda line: None)
    after, worker, cpu, cpu_workers = peak_and_cpu()
    results.put((built.seconds, cpu - cpu_before + cpu_workers, before, after, worker))


def peak_and_cpu() -> tuple[float, float, float, float]:
    """Peak resident MiB of this process and of its largest finished child; CPU seconds of it and of all children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peaks = [usage.ru_maxrss / 1024 for usage in usages]
    seconds = [usage.ru_utime + usage.ru_stime for usage in usages]
    return peaks[0], peaks[1], seconds[0], seconds[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", default="10000,100000,1000000")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    columns = ["records", "source MB", "processes", "seconds", "CPU s", "records/s", "records/CPU s"]
    columns += ["MB/s", "MiB before", "MiB peak", "MiB worker"]
    print(f"| {' | '.join(columns)} |\n|{'---:|' * len(columns)}")
    for num_records in map(int, options.records.split(",")):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            source = Path(folder) / "train.jsonl"
            write_source(source, num_records)
            num_mb = source.stat().st_size / 1e6
            for num_processes in map(int, options.processes.split(",")):
                results = spawn.Queue()
                build = spawn.Process(
                    target=measure, args=(source, Path(folder) / f"set-{num_processes}", num_processes, results)
                )
                build.start()
                seconds, cpu_seconds, before, after, worker = results.get()
                build.join()
                speed, cpu_speed = num_records / seconds, num_records / cpu_seconds
                row = [f"{num_records:,}", f"{num_mb:,.0f}", f"{num_processes}", f"{seconds:.1f}", f"{cpu_seconds:.1f}"]
                row += [f"{speed:,.0f}", f"{cpu_speed:,.0f}", f"{num_mb / seconds:.0f}", f"{before:,.0f}"]
                row += [f"{after:,.0f}", f"{worker:,.0f}" if num_processes > 1 else "–"]
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"\n{time.monotonic() - started:.0f} s in total")
