"""A recipe made so small that a run of it takes seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rankllm_composer.options import SourceOptions
from rankllm_composer.prompts.permutations import identifier_style, parse_permutation
from rankllm_composer.shards.build import build_shards
from support.launching import ON_CPU, REPOSITORY

RECIPE = REPOSITORY / "yamls" / "first_mistral.yaml"
GOLDEN = Path(__file__).parents[1] / "golden"
BATCHES_PER_EPOCH = 6


def small_run(folder: Path, tokenizer_folder: Path, *, tied: bool = False) -> list[str]:
    """Return overrides for 24 lists, two epochs of 6 batches, a checkpoint every 2 batches and no export.

    Args:
        folder: receives the shards and the initial model.
        tokenizer_folder: HF folder of the recipe's tokenizer.
        tied: whether the lists are ordered by grades, of which only the first candidate has a higher one.
    """
    shutil.copytree(tokenizer_folder, folder / "base")
    for path in (GOLDEN / "tiny_mistral").iterdir():
        shutil.copy(path, folder / "base")
    records = json.loads((GOLDEN / "records.json").read_text())
    copies = [dict(record, id=f"{record['id']}-{copy}") for copy in range(4) for record in records]
    if tied:
        copies = [record | graded(record) for record in copies]
    (folder / "records.json").write_text(json.dumps(copies))
    build_shards(folder / "shards", SourceOptions(input=folder / "records.json"))
    return [
        *ON_CPU,
        f"model.name_or_path={folder / 'base'}",
        "model.activation_checkpointing=0",
        f"data.train.local={folder / 'shards'}",
        "data.train.source=null",
        "data.max_length_tokens=2048",
        "batch.global_lists=4",
        "batch.microbatch_tokens=2048",
        "optimizer.lr=1e-3",
        "schedule.warmup=2ba",
        "run.max_duration=2ep",
        "checkpoint.interval=2ba",
        "checkpoint.keep=-1",
        "checkpoint.export=null",
    ]


def graded(record: dict[str, Any]) -> dict[str, Any]:
    """Keys of a record that make all candidates but the first of its answer tied."""
    answer = record["conversations"][-1]["value"]
    first = parse_permutation(answer, answer.count("["), identifier_style(answer))[0]
    grades = [int(number == first) for number in range(answer.count("["))]
    return {"grades": grades, "ordered_by": "grades"}


def mark_trained(run: Path) -> None:
    """Leave an export in a run's folder, as a run that has trained does."""
    (run / "hf" / "epoch_0").mkdir(parents=True, exist_ok=True)
    (run / "hf" / "epoch_0" / "reranker.json").write_text("{}")
