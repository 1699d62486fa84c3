"""How keys of a recipe are declared, described, and filled from plain values; all that is wrong is reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

REQUIRED = dataclasses.MISSING

_TYPE_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_STAND_INS = {bool: False, int: 1, float: 1.0, str: ""}


class Problem(NamedTuple):
    """One thing wrong with a recipe.

    Args:
        key: dotted key.
        found: what the recipe says there.
        allowed: what it may say.
        remedy: what to do.
        involved: further dotted keys that the finding rests on.
    """

    key: str
    found: str
    allowed: str
    remedy: str
    involved: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.key}: found {self.found}; allowed: {self.allowed}; {self.remedy}"


class RecipeError(ValueError):
    """A recipe cannot be used. `problems` holds everything that is wrong with it, not only the first."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{source}: {count}", *map(str, problems)]))


class RecipeWarning(UserWarning):
    """A recipe can be used, but says something that has no effect or that will surprise later."""


def key(meaning: str, default: Any = REQUIRED, *, unit: str = "", **rules: Any) -> Any:
    """A key of a recipe.

    Args:
        meaning: one sentence for `--help`.
        default: the value where a recipe says nothing; a key without one has to be given.
        unit: of the number, or what the text names.
        rules: `above`, `at_least`, `at_most`, `below` bound a number, or each number of a list; `time_units` makes a
            text a Composer time string in these units, `nonzero` one above zero; `names` are the keys a mapping may
            have; `pattern` is a regular expression for a text, `example` a text that fits it.
    """
    metadata = {"help": meaning, "unit": unit, **rules}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(meaning: str, kind: type | None = None) -> Any:
    """A section of a recipe. One without `kind` holds keys that have to be given."""
    metadata = {"help": meaning, "unit": ""}
    if kind is None:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default_factory=kind, metadata=metadata)


class SchemaKey(NamedTuple):
    """One key of a section, as its dataclass declares it.

    Args:
        name: key within the section.
        annotation: its type without `| None`.
        is_optional: whether null is allowed.
        default: the default value, or REQUIRED.
        rules: the metadata given to `key`.
    """

    name: str
    annotation: Any
    is_optional: bool
    default: Any
    rules: Mapping[str, Any]

    @property
    def element(self) -> Any:
        """Type of the elements of a list; None for anything else."""
        return typing.get_args(self.annotation)[0] if typing.get_origin(self.annotation) is tuple else None


def schema(kind: type) -> Iterator[SchemaKey]:
    """The keys of a section, in their order."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        annotation, is_optional = hints[field.name], False
        if typing.get_origin(annotation) in (types.UnionType, typing.Union):
            (annotation,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
            is_optional = True
        default = field.default
        if field.default_factory is not REQUIRED:
            default = field.default_factory()
        yield SchemaKey(field.name, annotation, is_optional, default, field.metadata)


def find_key(kind: Any, steps: Sequence[str]) -> SchemaKey | None:
    """The key that `steps` lead to from a section, places in lists included; None if there is none."""
    item = next((item for item in schema(kind) if item.name == steps[0]), None)
    if item is None or len(steps) == 1:
        return item
    inner, rest = item.annotation, steps[1:]
    if item.element is not None:
        inner, rest = item.element, rest[1:]
    return find_key(inner, rest) if dataclasses.is_dataclass(inner) and rest else None


def default_tree(kind: Any) -> dict[str, Any]:
    """The defaults of a section as plain mappings and lists, without the keys that have to be given."""
    tree: dict[str, Any] = {}
    for item in schema(kind):
        if dataclasses.is_dataclass(item.annotation) and (item.default is not None or not item.is_optional):
            tree[item.name] = default_tree(item.annotation)
        elif item.default is not REQUIRED:
            tree[item.name] = list(item.default) if isinstance(item.default, tuple) else item.default
    return tree


def plain_tree(value: Any) -> Any:
    """A section, or any value of one, as plain mappings, lists and scalars."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain_tree(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [plain_tree(inner) for inner in value]
    return value


def describe_type(annotation: Any) -> str:
    """A type in a reader's words, such as "whole number" or "one of letters, numbers"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
        return f"list{count}, each {describe_type(arguments[0])}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else "mapping of mappings"
    return _TYPE_WORDS.get(annotation, "section")


def describe_allowed(item: SchemaKey) -> str:
    """What a key may hold, in a reader's words, such as "number above 0, or null"."""
    bounds = [
        f"{words} {item.rules[rule]:g}"
        for rule, words in (("above", "above"), ("at_least", "at least"), ("at_most", "at most"), ("below", "below"))
        if rule in item.rules
    ]
    text = " ".join([describe_type(item.annotation), " and ".join(bounds)]).strip()
    if "time_units" in item.rules:
        text = f"a number with its unit, one of {', '.join(item.rules['time_units'])}, such as 3ep or 50ba"
    if "pattern" in item.rules:
        text += f" such as {item.rules['example']}"
    if "names" in item.rules:
        text += f" under {', '.join(item.rules['names'])}"
    return f"{text}, or null" if item.is_optional else text


class KeyDescription(NamedTuple):
    """A row of the table of keys.

    Args:
        key: dotted key; `[]` stands for each element of a list.
        type: what it may hold.
        default: as it would be written in YAML, or "required".
        unit: of the number, or what the text names; may be empty.
        help: one sentence.
    """

    key: str
    type: str
    default: str
    unit: str
    help: str


def describe_section(kind: type, prefix: str = "") -> list[KeyDescription]:
    """Every key of a section and of the sections inside it."""
    rows = []
    for item in schema(kind):
        name = f"{prefix}{item.name}"
        inner = next((t for t in (item.annotation, item.element) if dataclasses.is_dataclass(t)), None)
        if inner is None or item.is_optional or item.element:
            default = "required" if item.default is REQUIRED else show(item.default)
            rows.append(KeyDescription(name, describe_allowed(item), default, item.rules["unit"], item.rules["help"]))
        if inner is not None:
            rows += describe_section(typing.cast(type, inner), f"{name}[]." if item.element else f"{name}.")
    return rows


def show(value: Any) -> str:
    """A value as it would be written in YAML on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {show(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    return str(value)


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
                values[name] = item.default
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
            return item.default
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
        self.problems.append(Problem(dotted, "an unknown key", ", ".join(siblings), remedy))


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


def repr_yaml(value: Any) -> str:
    """A value as a message shows it: texts in quotes, the rest as YAML, long ones cut."""
    text = f"'{value}'" if isinstance(value, str) else show(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
