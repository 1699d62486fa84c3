"""What a run with a recipe would refuse on this machine before its first batch, as far as that is known at once.

Each finding is worded by the code with which the run refuses it. No weights, tokenizers or lists are loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rankllm_composer.environment import FromEnvironment
from rankllm_composer.errors import Problem, RankLLMComposerError
from rankllm_composer.model.lora import check_starting_adapter
from rankllm_composer.model.loss_table import RANKING_LOSSES, import_loss
from rankllm_composer.recipe.checks import missing_files, named_splits
from rankllm_composer.recipe.packages import SOURCE_FILES, missing_packages
from rankllm_composer.recipe.sections import Recipe, Split
from rankllm_composer.training.folders import check_folders


def find_refusals(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is missing or of another run: files, packages, a loss, an adapter, shards and folders.

    The parts of a problem that has been worded as a whole are empty, but for `key` and `found`, and what comes from the
    environment is written there as a reference.
    """
    hidden = sorted(_from_environment(dataclasses.asdict(recipe)), key=len, reverse=True)
    for problem in _find_refusals(recipe):
        found = problem.found
        for text in hidden:
            found = found.replace(text, text.reference)
        yield problem._replace(found=found)


def _from_environment(value: Any) -> Iterator[FromEnvironment]:
    """The texts anywhere in a recipe that hold the value of an environment variable."""
    if isinstance(value, FromEnvironment):
        yield from [value] if value else ()  # an empty one is everywhere
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _from_environment(part)


def _find_refusals(recipe: Recipe) -> Iterator[Problem]:
    yield from missing_files(recipe)
    yield from missing_packages(recipe)
    objective, lora = recipe.objective, recipe.model.lora
    if objective.ranking_loss not in RANKING_LOSSES:
        own = (objective.ranking_loss, objective.ranking_loss_options)
        yield from _refused("objective.ranking_loss", import_loss, *own)
    if lora is not None and lora.start_from is not None:
        yield from _refused("model.lora.start_from", check_starting_adapter, lora.start_from, dataclasses.asdict(lora))
    for key, split in named_splits(recipe):
        if key != "data.eval" or recipe.evaluation is not None:
            yield from _refused(f"{key}.source", _check_shards, recipe, key, split)
    yield from _refused("run.folder", check_folders, recipe)


def _refused(key: str, check: Callable[..., object], *arguments: Any) -> Iterator[Problem]:
    try:
        check(*arguments)
    except RankLLMComposerError as error:
        text = str(error)
        named = text.partition(" ")[0].removesuffix(":")  # a message begins with its key
        yield Problem(named if "." in named else key, text, "", "")


def _check_shards(recipe: Recipe, key: str, split: Split) -> None:
    """Raise the difference between shards and source, if both are on this machine."""
    source, place = split.source, split.remote or split.local
    if source is None or place is None or split.rebuild or not Path(place, "index.json").is_file():
        return
    files = [getattr(source, name) for name in SOURCE_FILES if getattr(source, name) is not None]
    if not all(Path(file).exists() for file in files):
        return
    from rankllm_composer.shards.prepared import find_difference

    difference = find_difference(place, source, split.local or place, key, recipe.data.client_version)
    if difference is not None:
        raise difference
