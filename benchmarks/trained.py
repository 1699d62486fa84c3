"""Train a model with several settings and compare the results; used by objectives.py, augmentation.py, ties.py."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from report import NUM_CORES, print_header, print_machine, print_row

from rankllm_composer.demo import Collection, CollectionOptions, build_collection, build_model_folder
from rankllm_composer.recipe.load import load_recipe

TRAIN = Path(__file__).parents[1] / "rankllm_composer" / "train.py"
NUM_TRAIN_QUERIES, NUM_TEST_QUERIES = 20000, 200
LISTS = 16  # per update; fewer than in the demo, for more updates from the same lists


def prepare(folder: Path, num_train: int, with_numbers: bool) -> Collection:
    """Write the demo's collection and its model folder, without weights, into `folder`."""
    sizes = CollectionOptions(num_train_queries=num_train, num_test_queries=NUM_TEST_QUERIES)
    files = build_collection(folder / "collection", sizes)
    build_model_folder(folder / "model", files.words, with_numbers=with_numbers)
    return files


def source_files(split: str, scratch: Path, **files: Path) -> list[str]:
    """Return overrides that set the source files of a split; its shards are built in `scratch`."""
    overrides = [f"data.{split}.source.{name}={path}" for name, path in files.items()]
    return [f"data.{split}.local={scratch / split}", *overrides]


def demo_overrides(folder: Path, files: Collection) -> list[str]:
    """Return overrides of `yamls/demo.yaml` that train on the collection and evaluate its held-out queries."""
    overrides = [f"model.name_or_path={folder / 'model'}"]
    for split, run, queries in (
        ("train", files.train_run, files.train_queries),
        ("eval", files.test_run, files.test_queries),
    ):
        overrides += source_files(split, folder, run=run, queries=queries, judgments=files.judgments, docs=files.docs)
        overrides += [f"data.{split}.source.window=4", f"data.{split}.source.stride=4"]
    return [*overrides, "data.eval.shuffle=false"]


def train_once(name: str, folder: Path, overrides: Sequence[str], threads: int) -> dict[str, float]:
    """Train `yamls/demo.yaml` in a separate process.

    Args:
        name: name of the run; its folder is `folder / name`.
        overrides: `key=value` that override the recipe.
        threads: number of OpenMP threads.
    Returns:
        Metrics of the last evaluation, without the prefix `eval/`.
    Raises:
        CalledProcessError: the run failed; its errors are on stderr.
    """
    run = folder / name
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", "1", str(TRAIN)]
    settings = [f"run.name={name}", f"run.folder={run}", "checkpoint.export=null", "logging.progress=false"]
    settings.append(f"batch.global_lists={LISTS}")
    subprocess.run(
        [*command, "demo", *settings, *overrides],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    metrics: dict[str, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        logged = json.loads(line)
        metrics.update({key.removeprefix("eval/"): value for key, value in logged.items() if key.startswith("eval/")})
    return metrics


def compare(
    description: str | None,
    first_column: str,
    variants: Mapping[str, Sequence[str]],
    metrics: Sequence[str],
    prepare_collection: Callable[[Collection], None] | None = None,
    with_numbers: bool = False,
) -> None:
    """Run the command line of a comparison: train each variant and print its metrics on held-out windows.

    Uses the demo's model and lists. Metrics are means over the seeds. `key=value` arguments override the recipe of
    every variant.

    Args:
        description: help text of the command.
        first_column: heading of the first column.
        variants: name → overrides of the recipe.
        metrics: names of the metrics to print, from the last evaluation.
        prepare_collection: called with the demo's collection before it is used.
        with_numbers: whether the demo's tokenizer has one token for each number that may be an identifier.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1250)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    parser.add_argument("--queries", type=int, default=NUM_TRAIN_QUERIES)
    parser.add_argument("--runs", default=";".join(variants))
    options, extra = parser.parse_known_args()
    print_machine(options.threads, str(load_recipe("demo").parallelism.precision))
    print(f"{options.updates} updates of {LISTS} lists, {options.seeds} seeds, held-out windows of 4 candidates\n")
    columns = ("presented/ndcg@10", *metrics)
    print_header([first_column, *columns])
    for name in options.runs.split(";"):
        values: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            files = prepare(folder, options.queries, with_numbers)
            if prepare_collection is not None:
                prepare_collection(files)
            overrides = [
                *demo_overrides(folder, files),
                f"run.max_duration={options.updates}ba",
                f"schedule.warmup={min(100, options.updates // 2)}ba",
                f"evaluation.interval={options.updates}ba",
                *variants[name],
                *extra,
            ]
            for seed in range(options.seeds):
                measured = train_once(f"seed-{seed}", folder, [*overrides, f"run.seed={seed}"], options.threads)
                for key in columns:
                    if key in measured:
                        values.setdefault(key, []).append(measured[key])
        print_row([name, *(f"{statistics.mean(values[key]):.3f}" if key in values else "–" for key in columns)])
