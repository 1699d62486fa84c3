"""Synthetic training records in the published layout."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rankllm_composer.prompts.permutations import format_permutation
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn

WORDS = ["keel", "lamp", "moss", "oar", "pear", "quill", "reed", "salt", "tile", "urn", "vine", "wick", "yarn", "zinc"]


def conversation(
    index: int, *, num_candidates: int = 4, style: str = "letters", num_words: int = 5, **changes: Any
) -> dict[str, Any]:
    """Record `q<index>` in the published layout; `changes` replace a turn (`system`, `human`, `gpt`) or a field."""
    rng = random.Random(index)
    passages = [" ".join(rng.choices(WORDS, k=num_words)) for _ in range(num_candidates)]
    order = rng.sample(range(num_candidates), num_candidates)
    turns = {
        "system": SYSTEM_MESSAGE,
        "human": render_user_turn(f"where is {WORDS[index % len(WORDS)]} number {index}", passages, style),
        "gpt": format_permutation(order, style),
    }
    turns.update({name: changes.pop(name) for name in list(changes) if name in turns})
    layout = {"id": f"q{index}", "conversations": [{"from": name, "value": text} for name, text in turns.items()]}
    return layout | changes


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """Write one record per line; text is written unchanged."""
    lines = (record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
