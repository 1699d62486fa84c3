"""The keys of a recipe, read from its pydantic classes: looked up, described, as a table and as a JSON Schema."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import TypeAdapter
from pydantic_core import PydanticUndefined as REQUIRED

from rankllm_composer.environment import as_written
from rankllm_composer.prompts.prompt_template import PromptTemplate
from rankllm_composer.recipe.sections import Recipe

_TYPE_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_TYPE_WORDS[PromptTemplate] = "a YAML file or its keys"
_BOUND_WORDS = {"gt": "above", "ge": "of at least", "le": "at most", "lt": "below"}
_JSON_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "le": "maximum", "lt": "exclusiveMaximum"}


class Key(NamedTuple):
    """One key of a class of options.

    Its `annotation` is without `| None` and bounds, `default` may be REQUIRED, and `expected` says in words what it may
    hold, such as "a number above 0, or null".
    """

    name: str
    annotation: Any
    is_optional: bool
    default: Any
    meaning: str
    unit: str
    expected: str

    @property
    def element(self) -> Any:
        """Type of the elements of a list; None for anything else."""
        return typing.get_args(self.annotation)[0] if typing.get_origin(self.annotation) is tuple else None

    @property
    def shown_default(self) -> str:
        """The default as YAML, or "required"."""
        return "required" if self.default is REQUIRED else show(self.default)


@functools.cache
def keys_of(kind: Any) -> dict[str, Key]:
    """The keys of a class of options by name, in order."""
    return {name: _key(name, info) for name, info in kind.__pydantic_fields__.items()}


def _key(name: str, info: Any) -> Key:
    annotation, is_optional = info.annotation, False
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
        is_optional = True
    expected = _describe(annotation, info.metadata)
    if info.examples:
        *first, last = info.examples
        expected += f" such as {', '.join(first)} or {last}" if first else f" such as {last}"
    expected = f"{expected}, or null" if is_optional else expected
    default, extra = info.get_default(call_default_factory=True), info.json_schema_extra or {}
    bare = typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
    return Key(name, bare, is_optional, default, info.description or "", extra.get("unit", ""), expected)


def _describe(annotation: Any, rules: Iterable[Any] = ()) -> str:
    """A type in words, such as "a whole number of at least 1" or "one of letters, numbers"."""
    if typing.get_origin(annotation) is Annotated:
        annotation, *inner = typing.get_args(annotation)
        return _describe(annotation, [*inner, *rules])
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
        return f"a list{count}, each {_describe(arguments[0])}"
    if origin is dict:
        names = typing.get_args(arguments[0])
        return f"a mapping of {', '.join(names)} to arguments" if names else "a mapping"
    bounds = [
        f"{words} {getattr(rule, name)}"
        for name, words in _BOUND_WORDS.items()
        for rule in rules
        if hasattr(rule, name)
    ]
    return " ".join([_TYPE_WORDS.get(annotation, "a section"), " and ".join(bounds)]).strip()


def find_key(steps: Sequence[str | int], kind: Any = Recipe) -> Key | None:
    """The key at the end of `steps` from a section, indices into lists included; None if there is none."""
    key = keys_of(kind).get(str(steps[0]))
    if key is None or len(steps) == 1:
        return key
    inner, rest = (key.element, steps[2:]) if key.element is not None else (key.annotation, steps[1:])
    return find_key(rest, inner) if dataclasses.is_dataclass(inner) and rest else None


def default_tree(kind: Any = Recipe) -> dict[str, Any]:
    """The defaults of a section as plain mappings and lists, without the required keys."""
    tree: dict[str, Any] = {}
    for name, key in keys_of(kind).items():
        if dataclasses.is_dataclass(key.annotation) and (key.default is not None or not key.is_optional):
            tree[name] = default_tree(key.annotation)
        elif key.default is not REQUIRED:
            tree[name] = plain_tree(key.default)
    return tree


def plain_tree(value: Any) -> Any:
    """A section, or any value of one, as plain mappings, lists and scalars."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain_tree(inner) for name, inner in value.items()}
    return [plain_tree(inner) for inner in value] if isinstance(value, tuple | list) else value


def show(value: Any) -> str:
    """A value as YAML on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {show(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    text = str(as_written(value))
    return json.dumps(text, ensure_ascii=False) if text == "" or "\n" in text else text


def describe_keys(kind: Any = Recipe, prefix: str = "") -> list[Key]:
    """Every key of a recipe, in order, with its dotted name; `[]` stands for each element of a list."""
    rows = []
    for key in keys_of(kind).values():
        name = f"{prefix}{key.name}"
        inner = next((part for part in (key.annotation, key.element) if dataclasses.is_dataclass(part)), None)
        if inner is None or key.is_optional or key.element:
            rows.append(key._replace(name=name))
        if inner is not None:
            rows += describe_keys(inner, f"{name}[]." if key.element else f"{name}.")
    return rows


def keys_as_text(width: int = 100) -> str:
    """The table of keys for a terminal: key, default and unit on one line, meaning and type below it."""
    parts, indent = [], " " * 6
    for row in describe_keys():
        unit = f"  [{row.unit}]" if row.unit else ""
        about = f"{row.meaning} Expected: {row.expected}."
        about = textwrap.fill(about, width, initial_indent=indent, subsequent_indent=indent)
        parts.append(f"  {row.name}={row.shown_default}{unit}\n{about}")
    return "\n".join(parts)


def keys_as_markdown() -> str:
    """The page of all keys: one table per section of a recipe."""
    lines = [
        "# Every key of a recipe",
        "",
        "Generated by `rankllm-composer recipes keys --markdown` from `rankllm_composer/recipe/sections.py` and",
        "`rankllm_composer/options.py`. `[]` stands for each element of a list; `required` keys have no default.",
    ]
    for name, group in itertools.groupby(describe_keys(), key=lambda row: row.name.partition(".")[0]):
        lines += ["", f"## {name}", "", "| key | default | unit | meaning | expected |", "|---|---|---|---|---|"]
        for row in group:
            meaning = row.meaning.replace("<", "\\<")  # Markdown reads a bare < as HTML
            lines.append(f"| `{row.name}` | `{row.shown_default}` | {row.unit} | {meaning} | {row.expected} |")
    return "\n".join(lines)


def recipe_schema() -> str:
    """The JSON Schema of a recipe file, for editors."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **TypeAdapter(Recipe).json_schema(),
        "title": "rankllm-composer recipe",
    }

    def standard(node: Any) -> Any:
        if isinstance(node, list):
            return [standard(inner) for inner in node]
        if not isinstance(node, dict):
            return node
        return {_JSON_BOUNDS.get(name, name): standard(inner) for name, inner in node.items()}  # pydantic leaves a "ge"

    return json.dumps(standard(schema), indent=2)
