"""The demo's model trained one way after another: what the comparisons of objectives and of augmentation run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rankllm_composer import train
from rankllm_composer.collection import Collection, build_collection, build_model_folder

ROOT = Path(__file__).parents[1]
NUM_TRAIN_QUERIES, NUM_TEST_QUERIES = 20000, 200
LISTS = 16  # an update; fewer than the demo has, which learns more from as many lists


def prepare(folder: Path, num_train: int = NUM_TRAIN_QUERIES, num_test: int = NUM_TEST_QUERIES) -> Collection:
    """Write the demo's collection, and the folder of its model without weights, into `folder`."""
    files = build_collection(folder / "collection", num_train_queries=num_train, num_test_queries=num_test)
    build_model_folder(folder / "model", files.words)
    return files


def places(folder: Path, files: Collection) -> list[str]:
    """Overrides that lay the collection under `yamls/demo.yaml`, its held-out queries as windows of `data.eval`."""
    found = [f"model.name_or_path={folder / 'model'}"]
    for split, run, queries in (
        ("train", files.train_run, files.train_queries),
        ("eval", files.test_run, files.test_queries),
    ):
        found += [
            f"data.{split}.source.run={run}",
            f"data.{split}.source.queries={queries}",
            f"data.{split}.source.judgments={files.judgments}",
            f"data.{split}.source.docs={files.docs}",
            f"data.{split}.source.window=4",
            f"data.{split}.source.stride=4",
        ]
    return [*found, f"data.eval.local={folder / 'windows'}", "data.eval.shuffle=false"]


def train_once(name: str, folder: Path, overrides: Sequence[str], threads: int) -> dict[str, float]:
    """Train the demo's recipe.

    Args:
        name: of the run; its folder is `folder / name`.
        overrides: `key=value` laid over the recipe.
        threads: of the process.
    Returns:
        Figures of the last evaluation, without their prefix.
    Raises:
        CalledProcessError: the run failed; what it said is on stderr.
    """
    run = folder / name
    command = [sys.executable, str(Path(sys.executable).with_name("composer")), "-n", "1", str(train.__file__)]
    settings = [f"run.name={name}", f"run.folder={run}", "checkpoint.export=null", "logging.progress=false"]
    settings.append(f"batch.global_lists={LISTS}")
    subprocess.run(
        [*command, str(ROOT / "yamls" / "demo.yaml"), *settings, *overrides],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    figures: dict[str, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line)
        figures.update({key.removeprefix("eval/"): value for key, value in found.items() if key.startswith("eval/")})
    return figures
