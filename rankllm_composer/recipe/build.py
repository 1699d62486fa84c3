"""Plain values → the dataclasses of a recipe, with everything that is wrong reported at once."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping
from typing import Any

from rankllm_composer.errors import Problem
from rankllm_composer.recipe.schema import (
    REQUIRED,
    SchemaKey,
    describe_allowed,
    describe_section,
    repr_yaml,
    schema,
)

_STAND_INS = {bool: False, int: 1, float: 1.0, str: ""}


def build(kind: type, tree: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """Fill a dataclass from plain values.

    Args:
        kind: the dataclass of the outermost section.
        tree: nested mappings as they came from YAML.
    Returns:
        The instance, in which a default or a stand-in takes the place of whatever is wrong, and all problems: unknown
        keys, missing keys, wrong types, values out of bounds.
    """
    reader = _Reader(kind)
    instance = reader.read_section(kind, tree, "")
    return instance, reader.problems


class _Reader:
    """Turns plain values into dataclasses and collects what is wrong on the way."""

    def __init__(self, kind: type) -> None:
        self.problems: list[Problem] = []
        self.known = [row.key for row in describe_section(kind)]

    def read_section(self, kind: type, tree: Mapping[str, Any], prefix: str) -> Any:
        items = {item.name: item for item in schema(kind)}
        for name in tree:
            if name not in items:
                self._unknown(f"{prefix}{name}", str(name), list(items), prefix)
        values = {}
        for name, item in items.items():
            if name in tree:
                values[name] = self.read_value(item, tree[name], f"{prefix}{name}")
            elif item.default is not REQUIRED:
                values[name] = copy.copy(item.default)
            elif dataclasses.is_dataclass(item.annotation):
                values[name] = self.read_section(typing.cast(type, item.annotation), {}, f"{prefix}{name}.")
            else:
                self._problem(item, f"{prefix}{name}", "nothing", remedy="give it, there is no default")
                values[name] = self._stand_in(item)
        return kind(**values)

    def read_value(self, item: SchemaKey, value: Any, dotted: str) -> Any:
        if value is None and item.is_optional:
            return None
        if dataclasses.is_dataclass(item.annotation):
            if isinstance(value, Mapping):
                return self.read_section(typing.cast(type, item.annotation), value, f"{dotted}.")
            self._problem(item, dotted, repr_yaml(value), remedy=f"write its keys below {dotted}")
            return self._stand_in(item)
        if item.element is not None:
            return self._read_list(item, value, dotted)
        if typing.get_origin(item.annotation) is dict:
            return self._read_mapping(item, value, dotted)
        if self._fits(item, item.annotation, value, dotted):
            return float(value) if item.annotation is float else int(value) if item.annotation is int else value
        return self._stand_in(item)

    def _read_list(self, item: SchemaKey, value: Any, dotted: str) -> Any:
        arguments = typing.get_args(item.annotation)
        has_length = arguments[-1] is not Ellipsis
        if not isinstance(value, list) or (has_length and len(value) != len(arguments)):
            self._problem(item, dotted, repr_yaml(value), remedy="write a list in [ ]")
            return self._stand_in(item)
        if dataclasses.is_dataclass(item.element):
            element = SchemaKey("", item.element, False, REQUIRED, item.rules)
            return tuple(self.read_value(element, inner, f"{dotted}[{index}]") for index, inner in enumerate(value))
        fits = [self._fits(item, item.element, inner, dotted) for inner in value]
        if all(fits):
            return tuple(float(inner) if item.element is float else inner for inner in value)
        return self._stand_in(item)

    def _read_mapping(self, item: SchemaKey, value: Any, dotted: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            self._problem(item, dotted, repr_yaml(value), remedy="write a mapping in { }, or its keys below it")
            return {}
        names = item.rules.get("names")
        if names is None:
            return {str(name): inner for name, inner in value.items()}
        result: dict[str, Any] = {}
        for name, inner in value.items():
            if name not in names:
                self._unknown(f"{dotted}.{name}", str(name), list(names), f"{dotted}.")
            elif inner is not None and not isinstance(inner, Mapping):
                self._problem(item, f"{dotted}.{name}", repr_yaml(inner), remedy="write its arguments in { }")
            else:
                result[name] = dict(inner or {})
        return result

    def _fits(self, item: SchemaKey, annotation: Any, value: Any, dotted: str) -> bool:
        remedy = f"change it; it is: {item.rules['help'][0].lower()}{item.rules['help'][1:]}"
        if typing.get_origin(annotation) is typing.Literal:
            options = typing.get_args(annotation)
            fits = value in options
            near = difflib.get_close_matches(str(value).lower(), [option.lower() for option in options], 1)
            if near:
                remedy = f"did you mean {next(option for option in options if option.lower() == near[0])}?"
        elif annotation is str:
            fits = isinstance(value, str) and _text_fits(item, value)
            if isinstance(value, bool | int | float) and "time_units" not in item.rules:
                remedy = "put it in quotes"
        elif annotation is bool:
            fits = isinstance(value, bool)
        else:
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            fits = is_number and (annotation is float or value == int(value)) and _is_in_bounds(item, value)
        if not fits:
            self._problem(item, dotted, repr_yaml(value), remedy=remedy)
        return fits

    def _stand_in(self, item: SchemaKey) -> Any:
        """What takes the place of a wrong value, so that the rest of the recipe can still be checked."""
        if item.default is not REQUIRED:
            return copy.copy(item.default)
        if dataclasses.is_dataclass(item.annotation):
            return _Reader(typing.cast(type, item.annotation)).read_section(typing.cast(type, item.annotation), {}, "")
        return _STAND_INS[item.annotation]

    def _problem(self, item: SchemaKey, dotted: str, found: str, *, remedy: str) -> None:
        self.problems.append(Problem(dotted, found, describe_allowed(item), remedy.rstrip(".")))

    def _unknown(self, dotted: str, name: str, siblings: list[str], prefix: str) -> None:
        near = [f"{prefix}{match}" for match in difflib.get_close_matches(name, siblings, 1)]
        near = near or [known for known in self.known if known.rpartition(".")[2] == name]
        near = near or difflib.get_close_matches(dotted, self.known, 1, cutoff=0.75)
        remedy = f"did you mean {near[0]}?" if near else "remove it"
        self.problems.append(Problem(dotted, "an unknown key", ", ".join(siblings), remedy, tuple(near)))


def _text_fits(item: SchemaKey, text: str) -> bool:
    if "time_units" in item.rules:
        time = parse_time(text)
        if time is None or time[1] not in item.rules["time_units"]:
            return False
        return time[0] > 0 or not item.rules.get("nonzero", False)
    return text != "" and re.fullmatch(item.rules.get("pattern", ".*"), text, re.DOTALL | re.IGNORECASE) is not None


def _is_in_bounds(item: SchemaKey, number: float) -> bool:
    rules = item.rules
    lowest, highest = rules.get("at_least", -math.inf), rules.get("at_most", math.inf)
    return bool(lowest <= number <= highest and rules.get("above", -math.inf) < number < rules.get("below", math.inf))


def parse_time(text: str) -> tuple[float, str] | None:
    """A Composer time string, "50ba", as (50.0, "ba"); None if it is none. Only `dur` takes fractions, of the run.

    Source:
        composer.core.time.Time, whose words these are.
    """
    match = re.fullmatch(r"(\d+)(ep|ba|sp|tok)|(0?\.\d+|[01](?:\.0*)?)(dur)", text)
    if match is None:
        return None
    number, unit = (part for part in match.groups() if part is not None)
    return float(number), unit
