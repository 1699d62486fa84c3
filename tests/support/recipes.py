"""Recipes for tests: those in yamls/, the JSON Schema beside them, and a minimal one in a temporary folder."""

from __future__ import annotations

import json
from pathlib import Path

from rankllm_composer.errors import Problem
from rankllm_composer.recipe.load import merge_recipe

YAMLS = sorted((Path(__file__).parents[2] / "yamls").glob("*.yaml"))
PUBLISHED = [path for path in YAMLS if path.stem in ("first_mistral", "rank_zephyr")]
SCHEMA = json.loads((YAMLS[0].parent / "recipe.schema.json").read_text(encoding="utf-8"))

MINIMAL = """
run: {name: small}
model: {name_or_path: some/model}
data: {train: {local: shards}}
batch: {global_lists: 8, microbatch_lists: 2}
optimizer: {lr: 1e-3}
"""


def write_recipe(folder: Path, text: str = MINIMAL, name: str = "recipe.yaml") -> Path:
    """Write a recipe into a folder and return its path."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> dict[str, Problem]:
    """Return the problems of a recipe with these overrides, by key."""
    return {problem.key: problem for problem in merge_recipe(path, overrides).problems}
