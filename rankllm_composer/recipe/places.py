"""Rules for the folders, URLs, loggers, callbacks and prompt of a recipe: what a run could not open, call or write."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rankllm_composer.environment import as_written
from rankllm_composer.errors import Problem
from rankllm_composer.recipe.keys import describe_keys, plain_tree
from rankllm_composer.recipe.names import did_you_mean
from rankllm_composer.recipe.sections import Recipe
from rankllm_composer.recipe.validate import dotted, shown

READ_SCHEMES = ("s3", "gs", "oci", "azure", "azure-dl", "dbfs", "dbfs-uc", "hf", "sftp", "alipan")
"""Object stores that shards are read from."""

LISTED_SCHEMES = ("s3", "gs", "oci")
"""Object stores that list files, as copies of checkpoints need."""

ARGUMENTS: dict[str, dict[str, dict[str, type]]] = {
    "loggers": {
        "tensorboard": {"log_dir": str, "flush_interval": int, "rank_zero_only": bool},
        "wandb": {
            "project": str,
            "group": str,
            "name": str,
            "entity": str,
            "tags": list,
            "log_artifacts": bool,
            "rank_zero_only": bool,
            "init_kwargs": dict,
        },
        "mlflow": {
            "experiment_name": str,
            "run_name": str,
            "tags": dict,
            "tracking_uri": str,
            "rank_zero_only": bool,
            "flush_interval": int,
            "model_registry_prefix": str,
            "model_registry_uri": str,
            "synchronous": bool,
            "log_system_metrics": bool,
            "rename_metrics": dict,
            "ignore_metrics": list,
            "ignore_hyperparameters": list,
            "run_group": str,
            "resume": bool,
            "logging_buffer_seconds": int,
            "log_duplicated_metric_every_n_steps": int,
        },
    },
    "callbacks": {
        "speed_monitor": {"window_size": int, "gpu_flops_available": float, "time_unit": str},
        "memory_monitor": {"memory_keys": dict, "dist_aggregate_batch_interval": int},
        "lr_monitor": {},
        "optimizer_monitor": {"log_optimizer_metrics": bool, "batch_log_interval": int},
        "nan_monitor": {},
    },
}
"""Arguments of Composer's loggers and callbacks; whole numbers are at least 1."""

TIME_UNITS = ("seconds", "minutes", "hours", "days")
"""Values of `time_unit` of the speed monitor."""

_WORDS = {str: "text", int: "a whole number of at least 1", bool: "true or false", list: "a list", dict: "a mapping"}
_WORDS[float] = "a number"
_REMEDIES = {
    "run.folder": "Use a local folder, and checkpoint.folder for copies of the checkpoints.",
    "local": "Name the URL in remote, and the folder of its cache in local.",
    "URL": "Use one of these stores, or a local folder.",
    "path or URL": "Use one of these stores, or a local folder.",
}


def place_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what no run could open: unset variables, URLs where a folder has to be, stores of another kind."""
    tree = plain_tree(recipe)
    for row in describe_keys():
        if "path" not in row.unit and row.unit != "URL":
            continue
        for key, value in _values(tree, row.name.replace("[]", ".*").split(".")):
            found = _problem(key, value, row.unit)
            if found is not None:
                yield found


def argument_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield arguments that a logger or callback does not have, or whose values it cannot use."""
    for section, kinds in ARGUMENTS.items():
        for name, given in getattr(recipe.logging, section).items():
            known = kinds[name]
            for argument, value in given.items():
                key = f"logging.{section}.{name}.{argument}"
                if argument not in known:
                    expected = f"one of {', '.join(known)}" if known else f"no arguments, as {name} has none"
                    yield Problem(key, "an unknown argument", expected, did_you_mean(argument, known, "Remove it."))
                elif not _is_of(value, known[argument]):
                    yield Problem(key, shown(value), _WORDS[known[argument]], "Correct or remove it.")
                elif argument == "time_unit" and value not in TIME_UNITS:
                    yield Problem(key, shown(value), f"one of {', '.join(TIME_UNITS)}", "Choose one.")


def template_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong with a prompt template whose keys the recipe holds; one in a file is checked when read."""
    key, template = "data.prompt_template", recipe.data.prompt_template
    if template is None:
        return
    found = [*template.problems()]
    yield from (problem._replace(key=f"{key}.{problem.key}", involved=(key,)) for problem in found)
    for name, split in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        source = None if split is None else split.source
        made = source.identifiers if source is not None and source.run is not None else None
        style = None if split is None else split.identifiers or made
        if style is None or found or template.unread(2, style) is None:
            continue
        keys = (f"data.{name}.identifiers", f"data.{name}.source.identifiers")
        other = "letters" if style == "numbers" else "numbers"
        remedy = f"Set {keys[0]}={other}, or use a template for {style}."
        yield Problem(key, f"for {other}", f"one for {style}, as are the lists of data.{name}", remedy, keys)


def _is_of(value: Any, kind: type) -> bool:
    if value is None or kind is bool or isinstance(value, bool):
        return value is None or (kind is bool and isinstance(value, bool))
    if kind is int:
        return isinstance(value, int) and value >= 1
    return isinstance(value, (int, float) if kind is float else kind)


def _values(tree: Any, steps: list[str], place: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of a key; `*` stands for each element of a list."""
    if not steps:
        if isinstance(tree, str):
            yield dotted(place), tree
    elif steps[0] == "*" and isinstance(tree, list):
        for index, inner in enumerate(tree):
            yield from _values(inner, steps[1:], (*place, str(index)))
    elif isinstance(tree, Mapping) and tree.get(steps[0]) is not None:
        yield from _values(tree[steps[0]], steps[1:], (*place, steps[0]))


def _problem(key: str, value: str, unit: str) -> Problem | None:
    text = as_written(value)
    unset = re.search(r"\$\{?(\w+)", value)
    if unset is not None:
        return Problem(key, f"'{text}'", f"a path; {unset[1]} is not set", f"Set {unset[1]}, or correct the path.")
    if value.startswith("~"):
        return Problem(key, f"'{text}'", "a path; there is no such home folder", "Correct it.")
    scheme = value.partition("://")[0] if "://" in value else None
    if unit in ("path", "id or path"):
        remedy = _REMEDIES.get(key) or _REMEDIES.get(key.rpartition(".")[2]) or "Download it into a local folder."
        if key.endswith("export.folder"):
            remedy = "Use a local folder, and upload it when the run has ended."
        return Problem(key, f"'{text}', a URL", "a local path", remedy) if scheme else None
    schemes = {"URL": READ_SCHEMES, "path or URL": LISTED_SCHEMES}.get(unit)
    if scheme and schemes and scheme not in schemes:
        return Problem(key, f"'{text}'", f"a URL of {', '.join(schemes)}", _REMEDIES[unit])
    return None
