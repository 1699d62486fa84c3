"""Defaults, overridden by a YAML file, overridden by `key=value`: one checked recipe, with the origin of each value."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from rankllm_composer.environment import FromEnvironment
from rankllm_composer.errors import Problem, RecipeError, first_line
from rankllm_composer.recipe.bundled import recipe_names, recipe_path
from rankllm_composer.recipe.checks import contradictions, surprises, without_effect
from rankllm_composer.recipe.interpolation import resolve
from rankllm_composer.recipe.keys import default_tree, find_key, plain_tree, show
from rankllm_composer.recipe.names import nearest
from rankllm_composer.recipe.sections import Recipe
from rankllm_composer.recipe.validate import dotted, validate
from rankllm_composer.screen import warn

Steps = tuple[str, ...]
_FILE = ("data", "prompt_template")  # a key whose value is read from a file that it names


class RecipeWarning(UserWarning):
    """A recipe can be used, but holds a key that has no effect or that causes trouble later."""


class ExplainedKey(NamedTuple):
    """A dotted key of a merged recipe, its plain value, and its origin: "default", "yaml" or "override"."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True)
class MergedRecipe:
    """A recipe, its `keys` as they were given, and what is wrong with it; defaults replace what is wrong."""

    recipe: Recipe
    keys: list[ExplainedKey]
    problems: list[Problem]
    warnings: list[str]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file, or the name of a recipe of the package, such as "rank_zephyr".
        overrides: `key=value` with dotted keys; the value is YAML and replaces the one of the file.
    Raises:
        RecipeError: the recipe cannot be used; the message lists every problem.
        RunError: the package has no recipe of that name.
    Warns:
        RecipeWarning: a key has no effect, or causes trouble later.
    """
    path = recipe_path(path) if isinstance(path, str) else path
    merged = merge_recipe(path, overrides)
    if merged.problems:
        raise RecipeError(str(path), merged.problems)
    for sentence in merged.warnings:
        warn(f"{path}: {sentence}", RecipeWarning, stacklevel=2)
    return merged.recipe


def merge_recipe(path: str | Path, overrides: Sequence[str] = ()) -> MergedRecipe:
    """Merge and check a recipe; raise RecipeError only if the file is not a readable YAML mapping."""
    given = _read_yaml(Path(path))
    tree = _merge(default_tree(), given)
    origins = {steps: "yaml" for steps, _ in _leaves(given)}
    problems: list[Problem] = []
    for text in overrides:
        try:
            steps, value = _parse_override(text)
            tree = _assign(tree, steps, value)
        except ValueError as error:
            problems.append(Problem(text, "not a valid override", "key=value with a dotted key", str(error)))
            continue
        kept = {other: origin for other, origin in origins.items() if not _is_within(other, steps)}
        origins = {other: origin for other, origin in kept.items() if not _is_within(steps, other)}
        origins |= {steps + below: "override" for below, _ in _leaves(value)}
    tree = resolve(tree, problems)
    unresolved = {problem.key for problem in problems}
    recipe, invalid = validate(Recipe, tree)
    problems += [problem for problem in invalid if problem.key not in unresolved]
    suspect = [key for problem in problems for key in (problem.key, *problem.involved)]
    problems += [
        problem
        for problem in contradictions(recipe)
        if not any(_rests_on(key, other) for key in (problem.key, *problem.involved) for other in suspect)
    ]
    keys = list(_explained(recipe, tree, origins, {problem.key for problem in problems}))
    sentences = [] if problems else [*_ignored(keys, without_effect(recipe)), *surprises(recipe)]
    return MergedRecipe(recipe, keys, problems, sentences)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; `load_recipe` reads it back as an equal recipe.

    Keys that the recipe never reads are left out where they hold their default.
    """
    tree = plain_tree(recipe)
    for ignored in without_effect(recipe):
        *sections, name = ignored.split(".")
        parent = tree
        for step in sections:
            parent = parent[step] or {}
        key = find_key(ignored.split("."))
        if key is not None and name in parent and parent[name] == plain_tree(key.default):
            del parent[name]
    return OmegaConf.to_yaml(OmegaConf.create(_escape(tree)))


def _read_yaml(path: Path) -> dict[str, Any]:
    def refuse(found: str, remedy: str) -> RecipeError:
        return RecipeError(str(path), [Problem("recipe", found, "a YAML file with the sections of a recipe", remedy)])

    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        beside = {file.stem: str(file) for ending in ("yaml", "yml") for file in path.parent.glob(f"*.{ending}")}
        known = {name: name for name in recipe_names()} | beside
        otherwise = "`rankllm-composer recipes list` lists those of the package."
        near = nearest(path.stem, known)
        raise refuse("not a file", otherwise if near is None else f"Did you mean {known[near]}?") from None
    except MarkedYAMLError as error:
        place = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise refuse(f"not valid YAML ({error.problem}{place})", "Correct it.") from None
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise refuse(f"not readable ({first_line(error)})", "Correct the file.") from None
    tree = OmegaConf.to_container(config)
    if not isinstance(tree, dict):
        raise refuse(f"a {type(tree).__name__}", "Write sections such as run: and model:.")
    return {str(name): value for name, value in tree.items()}


def _merge(tree: Any, given: Any) -> Any:
    """`tree` overridden by `given`: mappings key by key, everything else completely."""
    if not (isinstance(tree, Mapping) and isinstance(given, Mapping)):
        return copy.deepcopy(given)
    return {**tree, **{name: _merge(tree.get(name), value) for name, value in given.items()}}


def _leaves(value: Any, steps: Steps = ()) -> Iterator[tuple[Steps, Any]]:
    """Every value that is not a section, with the steps to it. A list of scalars is one value."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, (*steps, str(name)))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*steps, str(index)))
    else:
        yield steps, value


def _parse_override(text: str) -> tuple[Steps, Any]:
    key, equals, value = text.partition("=")
    key = re.sub(r"\[(\d+)\]", r".\1", key)
    if not equals:
        raise ValueError("Write = between key and value.")
    if key.startswith(("-", "+")):
        raise ValueError(f"Write {key.lstrip('-+')}={value}, without the leading {key[0]}.")
    steps = tuple(key.split("."))
    if not all(re.fullmatch(r"[^\s.]+", step) for step in steps):
        raise ValueError("Write the key as section.key, without spaces.")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index,call-overload]
    except (YAMLError, OmegaConfBaseException):
        raise ValueError(f"{value} is not a YAML value. Put quotes around text with : {{ [ or #.") from None
    known = find_key(steps)
    if known is not None and known.annotation is str and isinstance(parsed, bool | int | float):
        return steps, value  # a text key such as model.revision=1e5 is not a number
    return steps, parsed


def _assign(tree: Any, steps: Steps, value: Any) -> Any:
    """A copy of `tree` with `value` at `steps`; missing sections are created."""
    if not steps:
        return value
    step, *rest = steps
    if isinstance(tree, list):
        if not (step.isdigit() and int(step) < len(tree)):
            raise ValueError(f"'{step}' is not an index into a list of {len(tree)}. Count from 0, or write the list.")
        return [_assign(old, tuple(rest), value) if str(i) == step else old for i, old in enumerate(tree)]
    sections = dict(tree) if isinstance(tree, Mapping) else {}
    return {**sections, step: _assign(sections.get(step), tuple(rest), value)}


def _is_within(steps: Steps, section: Steps) -> bool:
    return steps[: len(section)] == section


def _rests_on(key: str, other: str) -> bool:
    """Whether one of two dotted keys is, contains, or lies within the other."""
    return key == other or key.startswith((f"{other}.", f"{other}[")) or other.startswith((f"{key}.", f"{key}["))


def _explained(recipe: Recipe, tree: Any, origins: Mapping[Steps, str], wrong: set[str]) -> Iterator[ExplainedKey]:
    written = dict(_leaves(tree))
    for steps, value in _leaves(plain_tree(recipe)):
        within = {
            origin for other, origin in origins.items() if _is_within(other, steps) or other == steps[:2] == _FILE
        }
        origin = next((name for name in ("override", "yaml") if name in within), "default")
        yield ExplainedKey(dotted(steps), written.get(steps, value) if dotted(steps) in wrong else value, origin)


def _ignored(keys: Sequence[ExplainedKey], reasons: Mapping[str, str]) -> Iterator[str]:
    for key, reason in reasons.items():
        within = (row for row in keys if f"{row.key}.".startswith(f"{key}."))
        given = next((row for row in within if row.origin != "default" and row.value not in (None, {}, [])), None)
        if given is not None:
            value = f" = {show(given.value)}" if given.key == key else ""
            yield f"{key}{value} has no effect: {reason}"


def _escape(value: Any) -> Any:
    """Escape `${` in texts, so that it is read back unchanged."""
    if isinstance(value, Mapping):
        return {name: _escape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_escape(inner) for inner in value]
    if isinstance(value, FromEnvironment):
        return value.reference
    if isinstance(value, str):
        return re.sub(r"(?<!\\)(\\*)\$\{", r"\1\1\\${", value)
    return value
