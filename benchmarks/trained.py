"""Train a model in several ways and compare: shared by the benchmarks of objectives and augmentation."""

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
LISTS = 16  # per update, fewer than in the demo: more updates from the same lists


def recipe_path(name: str) -> Path:
    """A recipe of `yamls/`."""
    return Path(__file__).parents[1] / "yamls" / f"{name}.yaml"


def prepare(folder: Path, num_train: int, with_numbers: bool) -> Collection:
    """Write the demo's collection and its model folder, without weights, into `folder`."""
    sizes = CollectionOptions(num_train_queries=num_train, num_test_queries=NUM_TEST_QUERIES)
    files = build_collection(folder / "collection", sizes)
    build_model_folder(folder / "model", files.words, with_numbers=with_numbers)
    return files


def source_files(split: str, scratch: Path, **files: Path) -> list[str]:
    """Overrides that name the files a split's shards are built from; the shards go to `scratch`."""
    given = [f"data.{split}.source.{name}={path}" for name, path in files.items()]
    return [f"data.{split}.local={scratch / split}", *given]


def places(folder: Path, files: Collection) -> list[str]:
    """Overrides of `yamls/demo.yaml` that train on the collection and evaluate its held-out queries."""
    found = [f"model.name_or_path={folder / 'model'}"]
    for split, run, queries in (
        ("train", files.train_run, files.train_queries),
        ("eval", files.test_run, files.test_queries),
    ):
        found += source_files(split, folder, run=run, queries=queries, judgments=files.judgments, docs=files.docs)
        found += [f"data.{split}.source.window=4", f"data.{split}.source.stride=4"]
    return [*found, "data.eval.shuffle=false"]


def places_of_smollm2(folder: Path, scratch: Path) -> list[str]:
    """Overrides for `yamls/smollm2_cpu.yaml`: what `smollm2.py` wrote into `folder`; shards go to `scratch`."""
    found = [
        f"model.name_or_path={folder.resolve() / 'start'}",
        "checkpoint.interval=1ep",
        "evaluation.decodings=[first_token, generation]",
    ]
    for split, name in (("train", "train"), ("eval", "heldout")):
        start = folder.resolve() / "collection" / name
        found += source_files(
            split,
            scratch,
            run=Path(f"{start}_run.trec"),
            queries=Path(f"{start}_queries.jsonl"),
            judgments=Path(f"{start}_qrels.trec"),
            docs=Path(f"{start}_docs.jsonl"),
        )
    return found


def train_once(name: str, folder: Path, overrides: Sequence[str], threads: int, recipe: str) -> dict[str, float]:
    """Train a recipe.

    Args:
        name: of the run; its folder is `folder / name`.
        overrides: `key=value` that override the recipe.
        threads: of the process.
        recipe: its name, as in `yamls/`.
    Returns:
        Figures of the last evaluation, without their prefix.
    Raises:
        CalledProcessError: the run failed; its errors are on stderr.
    """
    run = folder / name
    command = [sys.executable, str(Path(sys.executable).with_name("composer")), "-n", "1", str(TRAIN)]
    settings = [f"run.name={name}", f"run.folder={run}", "checkpoint.export=null", "logging.progress=false"]
    settings.append(f"batch.global_lists={LISTS}")
    subprocess.run(
        [*command, str(recipe_path(recipe)), *settings, *overrides],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    figures: dict[str, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line)
        figures.update({key.removeprefix("eval/"): value for key, value in found.items() if key.startswith("eval/")})
    return figures


def compare(
    text: str | None,
    what: str,
    ways: Mapping[str, Sequence[str]],
    figures: Sequence[str],
    change: Callable[[Collection], None] | None = None,
    with_numbers: bool = False,
) -> None:
    """Command of a comparison: train each way, print a row of figures of held-out windows, means over the seeds.

    The demo's model and lists, or those that `smollm2.py` wrote. Further `key=value` override the recipe last.

    Args:
        text: what the command does.
        what: names the first column.
        ways: name → overrides of the recipe.
        figures: of the last evaluation.
        change: called with each of the demo's collections before it is used.
        with_numbers: the demo's model has a token for each number that may be an identifier.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1250)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    parser.add_argument("--queries", type=int, default=NUM_TRAIN_QUERIES)
    parser.add_argument("--runs", default=";".join(ways))
    parser.add_argument("--smollm2", type=Path, help="folder that smollm2.py wrote: its model and lists instead")
    options, further = parser.parse_known_args()
    recipe = "demo" if options.smollm2 is None else "smollm2_cpu"
    print_machine(options.threads, str(load_recipe(recipe_path(recipe)).parallelism.precision))
    print(f"{options.updates} updates of {LISTS} lists, {options.seeds} seeds, held-out windows of 4 candidates\n")
    columns = ("presented/ndcg@10", *figures)
    print_header([what, *columns])
    for name in options.runs.split(";"):
        found: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if options.smollm2 is None:
                files = prepare(folder, options.queries, with_numbers)
                if change is not None:
                    change(files)
                given = places(folder, files)
            else:
                given = places_of_smollm2(options.smollm2, folder)
            given += [
                f"run.max_duration={options.updates}ba",
                f"schedule.warmup={min(100, options.updates // 2)}ba",
                f"evaluation.interval={options.updates}ba",
                *ways[name],
                *further,
            ]
            for seed in range(options.seeds):
                measured = train_once(f"seed-{seed}", folder, [*given, f"run.seed={seed}"], options.threads, recipe)
                for key in columns:
                    if key in measured:
                        found.setdefault(key, []).append(measured[key])
        print_row([name, *(f"{statistics.mean(found[key]):.3f}" if key in found else "–" for key in columns)])
