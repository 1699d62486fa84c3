"""How keys of a recipe are declared, looked up and described, and what an error about one looks like."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

REQUIRED = dataclasses.MISSING


_TYPE_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}


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


@functools.cache
def schema(kind: type) -> tuple[SchemaKey, ...]:
    """The keys of a section, in their order."""
    hints, keys = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        annotation, is_optional = hints[field.name], False
        if typing.get_origin(annotation) in (types.UnionType, typing.Union):
            (annotation,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
            is_optional = True
        default = field.default
        if field.default_factory is not REQUIRED:
            default = field.default_factory()
        keys.append(SchemaKey(field.name, annotation, is_optional, default, field.metadata))
    return tuple(keys)


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


def repr_yaml(value: Any) -> str:
    """A value as a message shows it: texts in quotes, the rest as YAML, long ones cut."""
    text = f"'{value}'" if isinstance(value, str) else show(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def keys_as_text(rows: Sequence[KeyDescription], width: int = 100) -> str:
    """The table of keys for a terminal: key, default and unit on one line, type and meaning below it."""
    parts = []
    for row in rows:
        unit = f"  [{row.unit}]" if row.unit else ""
        about = textwrap.fill(
            f"{row.help} Allowed: {row.type}.", width, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
        parts.append(f"  {row.key}={row.default}{unit}\n{about}")
    return "\n".join(parts)


def keys_as_markdown(rows: Sequence[KeyDescription]) -> str:
    """The page of all keys: a table for each section of a recipe."""
    lines = [
        "# Every key of a recipe",
        "",
        "Made by `rankllm-composer recipes keys --markdown` from the dataclasses of"
        " `rankllm_composer/recipe/sections.py`.",
        "`[]` stands for each element of a list; a key whose default is `required` has to be given.",
    ]
    for name, group in itertools.groupby(rows, key=lambda row: row.key.partition(".")[0]):
        lines += ["", f"## {name}", "", "| key | default | unit | what it is | allowed |", "|---|---|---|---|---|"]
        for row in group:
            meaning = row.help.replace("<", "\\<")  # a reader would take it for HTML
            lines.append(f"| `{row.key}` | `{row.default}` | {row.unit} | {meaning} | {row.type} |")
    return "\n".join(lines)
