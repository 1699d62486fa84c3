"""Twelve lists of two words and a tiny model: a run on them takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

from rankllm_composer.demo import build_model_folder
from rankllm_composer.prompts.user_turn import render_user_turn

WORDS = ("apple", "cherry", "mango", "plum")


def fruit_run(folder: Path) -> list[str]:
    """Overrides of yamls/demo.yaml that train on lists whose passages are words; the query is the relevant one."""
    build_model_folder(folder / "model", WORDS)
    records = []
    for query in WORDS:
        for other in (word for word in WORDS if word != query):
            turns = {"system": "", "human": render_user_turn(query, [other, query]), "gpt": "[B] > [A]"}
            conversation = [{"from": role, "value": text} for role, text in turns.items()]
            records.append({"id": f"{query} {other}", "conversations": conversation, "grades": [0, 1]})
    (folder / "records.json").write_text(json.dumps(records))
    return [
        f"run.folder={folder / 'run'}",
        "run.max_duration=1ep",
        "schedule.warmup=0ba",
        f"model.name_or_path={folder / 'model'}",
        f"data.train.local={folder / 'shards'}",
        f"data.train.source={{input: {folder / 'records.json'}}}",
        "batch.global_lists=4",
    ]
