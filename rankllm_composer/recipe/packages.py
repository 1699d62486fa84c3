"""The optional packages that a recipe needs, found before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

from rankllm_composer.errors import Problem, RecipeError
from rankllm_composer.options import IRDS
from rankllm_composer.recipe.sections import Recipe

SOURCE_FILES = ("input", "run", "judgments", "teacher_run", "queries", "docs")
"""Keys of a source that name a file, a folder or a data set."""


class _Need(NamedTuple):
    key: str
    value: str
    module: str
    install: str
    instead: str


def missing_packages(recipe: Recipe) -> Iterator[Problem]:
    """Yield the keys whose package is not installed, with how to install it and what to use instead."""
    for need in _needs(recipe):
        if importlib.util.find_spec(need.module) is None:
            found = f"{need.value}, which needs the package {need.module}"
            yield Problem(need.key, found, "it to be installed", f"{need.install}, or {need.instead}.")


def check_packages(recipe: Recipe, *keys: str) -> None:
    """Raise RecipeError if a package that a recipe needs is not installed; with keys, only what these need."""
    missing = [problem for problem in missing_packages(recipe) if not keys or problem.key in keys]
    if missing:
        raise RecipeError(f"recipe {recipe.run.name}", missing)


def _needs(recipe: Recipe) -> Iterator[_Need]:
    for logger in recipe.logging.loggers:
        key = f"logging.loggers.{logger}"
        yield _Need(key, "set", logger, "Install the `loggers` extra", f"remove {key}")
    if recipe.optimizer.name == "adamw_8bit":
        yield _Need("optimizer.name", "adamw_8bit", "bitsandbytes", "Install the `bitsandbytes` extra", "use adamw")
    if recipe.model.lora is not None:
        yield _Need("model.lora", "a section", "peft", "Install the `lora` extra", "set model.lora: null")
    if recipe.model.attention == "flash_attention_2" and recipe.batch.packing:
        instead = "use auto, which needs no package"
        yield _Need("model.attention", "flash_attention_2", "flash_attn", "Install flash-attn", instead)
    for name, split in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        source = None if split is None else split.source
        for part in SOURCE_FILES if source is not None else ():
            value = getattr(source, part)
            if isinstance(value, str) and value.startswith(IRDS):
                key = f"data.{name}.source.{part}"
                yield _Need(key, f"'{value}'", "ir_datasets", "Install the `irds` extra", "give files")
