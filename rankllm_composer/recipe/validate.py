"""Plain values → options, by pydantic; every error as a `Problem` with its dotted key and what to do."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rankllm_composer.environment import as_written
from rankllm_composer.errors import Problem, RecipeError
from rankllm_composer.recipe.keys import REQUIRED, Key, describe_keys, find_key, keys_of, show
from rankllm_composer.recipe.names import key_of_others, nearest, synonyms

_STAND_INS = {bool: False, int: 1, float: 1.0, str: "unknown"}


def validate(kind: type, tree: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """Options from plain values, with a default or a stand-in for whatever is wrong, and all problems."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        return adapter.validate_python(tree), []
    except ValidationError as error:
        repaired = copy.deepcopy(dict(tree))
        for wrong in error.errors():
            _repair(kind, repaired, wrong["loc"])
        return adapter.validate_python(repaired), list(problems_in(error, kind))


def problems_in(error: ValidationError, kind: type) -> Iterator[Problem]:
    """The errors that pydantic found in values for `kind`, in words."""
    for wrong in error.errors():
        steps, given = wrong["loc"], wrong["input"]
        is_name = steps[-1] == "[key]"  # of a mapping with fixed names
        if is_name or wrong["type"] == "unexpected_keyword_argument":
            yield from _unknown(kind, steps[:-1] if is_name else steps, None if is_name else given)
            continue
        length = next(length for length in range(len(steps), 0, -1) if find_key(steps[:length], kind))
        key = typing.cast(Key, find_key(steps[:length], kind))
        names = [step for step in steps[length:] if isinstance(step, str)]
        place = dotted([*steps[:length], *names])
        cause = wrong.get("ctx", {}).get("error")
        if isinstance(cause, RecipeError):  # a file that the key names
            yield from (problem._replace(key=f"{place} ({problem.key})") for problem in cause.problems)
            continue
        if dataclasses.is_dataclass(key.element) and length < len(steps):
            remedy = f"Write the keys of a section in {place}[{steps[-1]}]."
            yield Problem(dotted(steps), shown(given), "a section", remedy)
        elif wrong["type"] == "missing" and length == len(steps):
            yield Problem(place, "missing", key.expected, "Set it: there is no default.")
        elif names:
            yield Problem(place, shown(given), "a mapping, or null", "Write its arguments in { }.")
        else:
            yield Problem(place, shown(given), key.expected, _remedy(key, wrong["type"], given))


def _remedy(key: Key, error_type: str, given: Any) -> str:
    if error_type == "dataclass_type":
        return "Write the keys of the section below it."
    if error_type in ("tuple_type", "missing", "too_long"):
        return "Write a list in [ ]."
    if error_type == "dict_type":
        return "Write a mapping in { }, or its keys below it."
    if error_type == "literal_error":
        options = typing.get_args(_scalar(key))
        near = nearest(str(given), options)
        if near is not None:
            return f"Did you mean {near}?"
    if error_type == "string_type" and isinstance(given, int | float) and key.unit != "Composer time":
        return "Put it in quotes."
    return f"Correct it (meaning: {key.meaning.rstrip('.')})."


def _scalar(key: Key) -> Any:
    return key.element if key.element is not None else key.annotation


def _unknown(kind: type, steps: Sequence[str | int], given: Any) -> Iterator[Problem]:
    """The problem of an unknown key; of an unknown section, one for each of its keys that another section has."""
    *above, name = steps
    prefix = f"{dotted(above)}." if above else ""
    key = find_key(above, kind) if above and not isinstance(above[-1], int) else None
    section = _scalar(typing.cast(Key, key or find_key(above[:-1], kind))) if above else kind
    names = list(keys_of(section)) if dataclasses.is_dataclass(section) else []
    names = names or list(typing.get_args(typing.get_args(section)[0]))  # those that a mapping may have
    within = [f"{prefix}{match}" for match in difflib.get_close_matches(str(name), names, 1)]
    if isinstance(given, Mapping) and not within:
        found = {inner: _named_elsewhere(kind, [*steps, inner], value) for inner, value in given.items()}
        if any(found.values()):
            for inner, near in found.items():
                yield _unknown_key([*steps, inner], names, near)
            return
    near = [f"{prefix}{other}" for named, other in synonyms(names).items() if named == name]
    near = near or (within if isinstance(given, Mapping) else _named_elsewhere(kind, steps, given)) or within
    near = near or _named_elsewhere(kind, steps, given, cutoff=0.85)
    known = [row.name for row in describe_keys(kind)]
    yield _unknown_key(steps, names, near or difflib.get_close_matches(dotted(steps), known, 1, cutoff=0.75))


def _unknown_key(steps: Sequence[str | int], names: Sequence[str], near: Sequence[str]) -> Problem:
    either = " or ".join(filter(None, [", ".join(near[:-1]), *near[-1:]]))
    remedy = f"Did you mean {either}?" if near else "Remove it."
    meant = tuple(key.partition("=")[0] for key in near)
    return Problem(dotted(steps), "an unknown key", f"one of {', '.join(names)}", remedy, meant)


def _named_elsewhere(kind: type, steps: Sequence[str | int], given: Any, cutoff: float = 1.0) -> list[str]:
    """Keys of any section that have the name, or that stand for what another trainer calls so."""
    name = str(steps[-1])
    near = [row.name for row in describe_keys(kind) if row.name.rpartition(".")[2] == name][:3]
    meant = None if near else key_of_others(name, given, cutoff)
    if meant is not None and dotted(steps).startswith("data.eval."):
        meant = meant.replace("data.train.", "data.eval.")
    return [meant] if meant is not None and find_key(meant.partition("=")[0].split("."), kind) else near


def _repair(kind: type, tree: Any, steps: Sequence[str | int]) -> None:
    """Replace what is wrong at `steps` by its default or a stand-in; an unknown key is removed."""
    name, *rest = steps
    key = keys_of(kind).get(str(name))
    if key is not None and rest and dataclasses.is_dataclass(key.annotation):
        if isinstance(tree.get(name), dict):
            _repair(typing.cast(type, key.annotation), tree[name], rest)
        return
    tree.pop(name, None)
    if key is not None and key.default is REQUIRED:
        tree[str(name)] = _stand_in(key.annotation)


def _stand_in(annotation: Any) -> Any:
    if dataclasses.is_dataclass(annotation):
        keys = keys_of(typing.cast(type, annotation)).values()
        return {key.name: _stand_in(key.annotation) for key in keys if key.default is REQUIRED}
    return _STAND_INS[annotation]


def dotted(steps: Sequence[str | int]) -> str:
    """("streams", "1", "local") → "streams[1].local"."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(map(str, steps)))


def shown(value: Any) -> str:
    """A value as a message shows it: text in quotes, anything else as YAML, cut to 80 characters."""
    text = f"'{as_written(value)}'" if isinstance(value, str) else show(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
