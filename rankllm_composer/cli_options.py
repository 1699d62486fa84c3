"""`--options` of a command, generated from the classes of `rankllm_composer.options`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import typer

from rankllm_composer.errors import RankLLMComposerError, RecipeError
from rankllm_composer.recipe.keys import Key, keys_of

Command = TypeVar("Command", bound=Callable[..., Any])


def with_options(**flags: str) -> Callable[[Command], Command]:
    """Replace every parameter of a command that is annotated with a class of options by one parameter per option.

    Typer then makes an `--option` of each, with its meaning, default and bounds, and the command receives the object.

    Args:
        flags: option → name of its `--option`, for those that differ.
    """

    def decorate(command: Command) -> Command:
        hints = typing.get_type_hints(command, include_extras=True)
        classes: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
        parameters = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name in classes:
                kind = classes[parameter.name]
                parameters += [_parameter(key, kind, flags) for key in keys_of(kind).values()]
            else:
                kept = parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
                parameters.append(kept)

        @functools.wraps(command)
        def expanded(**given: Any) -> Any:
            for name, kind in classes.items():
                values = {
                    key.name: _value(key, given.pop(flags.get(key.name, key.name))) for key in keys_of(kind).values()
                }
                given[name] = _create(kind, values, flags)
            return command(**given)

        expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return typing.cast(Command, expanded)

    return decorate


def flag(name: str) -> str:
    """ "lists_per_query" → "--lists-per-query"."""
    return f"--{name.replace('_', '-')}"


def _parameter(key: Key, kind: Any, flags: Mapping[str, str]) -> inspect.Parameter:
    names = keys_of(kind)
    meaning = key.meaning.replace("null = ", "none = " if _accepts_none(key) else "default: ")
    meaning = re.sub(
        r"`(\w+)`", lambda match: flag(flags.get(match[1], match[1])) if match[1] in names else match[0], meaning
    )
    bounds = {
        rule: getattr(part, rule)
        for part in kind.__pydantic_fields__[key.name].metadata
        for rule in ("ge", "le", "lt")
        if hasattr(part, rule)
    }
    is_below = "lt" in bounds and key.annotation is int  # the bound of a fraction is checked by its class
    highest = bounds.get("le", bounds["lt"] - 1 if is_below else None)
    settings = typer.Option(help=meaning, min=bounds.get("ge"), max=highest)
    annotation, default = key.annotation, key.default
    if key.element is not None:
        annotation, default = list[str], list(default)
    elif key.is_optional:
        annotation = annotation | None
    return inspect.Parameter(
        flags.get(key.name, key.name),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, settings],
    )


def _accepts_none(key: Key) -> bool:
    """Whether `none` on the command line stands for null: leaving the option out means its default."""
    return key.is_optional and key.default is not None


def _value(key: Key, given: Any) -> Any:
    if key.element is not None:
        return tuple(given)
    return None if given == "none" and _accepts_none(key) else given


def _create(kind: Any, values: Mapping[str, Any], flags: Mapping[str, str]) -> Any:
    try:
        return kind(**values)
    except RecipeError as error:
        problems = [problem._replace(key=flag(flags.get(problem.key, problem.key))) for problem in error.problems]
        raise RankLLMComposerError("\n".join(map(str, problems))) from None
