"""`${key}` and `${oc.env:NAME}` in a recipe: their values, and which of them come from the environment."""

from __future__ import annotations

import os
import re
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rankllm_composer.environment import FromEnvironment
from rankllm_composer.errors import Problem, first_line
from rankllm_composer.recipe.validate import dotted, shown

Steps = tuple[str, ...]
_BEGIN, _END = "\ue000", "\ue001"


def _mark(name: str, default: Any = None) -> Any:
    """Stands for `oc.env` where references are to be found: the name of a variable that is set, between marks."""
    return f"{_BEGIN}{name}{_END}" if name in os.environ else default


OmegaConf.register_resolver("rankllm_composer.env", _mark, replace=True)


def resolve(tree: Any, problems: list[Problem]) -> Any:
    """A recipe's tree with `${...}` resolved, without keys that are `???` or cannot be resolved.

    `${NAME}` in capitals is read as `${oc.env:NAME}`. Text with the value of an environment variable in it becomes a
    `FromEnvironment`.
    """
    tree = _replace(tree, r"(?<!\\)\$\{([A-Z_][A-Z0-9_]*)\}", r"${oc.env:\1}")
    values = _resolve(OmegaConf.create(tree), problems)
    marked = _replace(tree, r"\$\{\s*oc\.env\s*:", "${rankllm_composer.env:")
    return values if marked == tree else _keep_references(values, _resolve(OmegaConf.create(marked), []))


def _replace(tree: Any, pattern: str, by: str) -> Any:
    if isinstance(tree, dict):
        return {name: _replace(value, pattern, by) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_replace(value, pattern, by) for value in tree]
    return re.sub(pattern, by, tree) if isinstance(tree, str) else tree


def _keep_references(value: Any, marked: Any) -> Any:
    if isinstance(value, dict) and isinstance(marked, dict):
        return {name: _keep_references(inner, marked.get(name)) for name, inner in value.items()}
    if isinstance(value, list) and isinstance(marked, list) and len(value) == len(marked):
        return [_keep_references(*pair) for pair in zip(value, marked)]
    if isinstance(value, str) and isinstance(marked, str) and _BEGIN in marked:
        return FromEnvironment(value, marked.replace(_BEGIN, "${oc.env:").replace(_END, "}"))
    return value


def _resolve(config: Any, problems: list[Problem], place: Steps = ()) -> Any:
    """`config` as plain values with `${...}` resolved, without keys that are `???` or cannot be resolved."""
    names = range(len(config)) if OmegaConf.is_list(config) else list(config)
    values = {}
    for name in names:
        steps = (*place, str(name))
        try:
            if OmegaConf.is_missing(config, name):
                continue
            value = config[name]
        except (OmegaConfBaseException, RecursionError) as error:
            found = f"{shown(_written(config, name))} ({first_line(error)})"
            expected, remedy = "${key} of another key, or ${oc.env:NAME}", "Correct it, or set the variable."
            problems.append(Problem(dotted(steps), found, expected, remedy))
            continue
        values[str(name)] = _resolve(value, problems, steps) if OmegaConf.is_config(value) else value
    return list(values.values()) if OmegaConf.is_list(config) else values


def _written(config: Any, name: str | int) -> Any:
    plain: Any = OmegaConf.to_container(config)
    return plain[name]
