"""Remedies that messages name: each key, flag and command exists, and a run that follows them resumes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from support.launching import REPOSITORY

from rankllm_composer.cli import app
from rankllm_composer.errors import RunError
from rankllm_composer.recipe.keys import describe_keys, find_key
from rankllm_composer.recipe.resume import FIXED, FREE, check_same_recipe, recorded_changes

PACKAGE = REPOSITORY / "rankllm_composer"
SECTIONS = "run|model|data|objective|neftune|batch|optimizer|schedule|parallelism|checkpoint|evaluation|logging"
KEY = re.compile(rf"(?<![\w./-])(?:{SECTIONS})\.[a-z_]+(?:\.[a-z_]+)*")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
COMMAND = re.compile(r"rankllm-composer ([a-z]+)(?: ([a-z]+))?")
NOT_KEYS = {"model.safetensors", "model.safetensors.index.json", "model.safetensors.index"}
OF_LAUNCHERS = {"--master"}  # --master_port, of Composer's launcher
MESSAGES = ("Problem", "warn", "report", "say", "refuse")
BEFORE_TRAINING = {"batch.global_lists", "optimizer.name", "parallelism.fsdp", "run.seed"}
"""Fixed keys that messages name only where no batch has been trained, so that any recipe may start there."""


def texts() -> Iterator[tuple[Path, str]]:
    """Every text in an error, a problem or a warning of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            is_call = isinstance(node, ast.Call) and getattr(node.func, "id", "") in MESSAGES
            if isinstance(node, ast.Raise) or is_call:
                for part in ast.walk(node):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield path, part.value


def named(pattern: re.Pattern[str]) -> dict[str, Path]:
    return {found[0]: path for path, text in texts() for found in pattern.finditer(text)}


def commands(command: Any = None) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Words and flags of every command."""
    command = command or typer.main.get_command(app)
    for name, inner in getattr(command, "commands", {}).items():
        yield (name,), {flag for parameter in inner.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        yield from (((name, *words), flags) for words, flags in commands(inner))


KEYS = {key: path for key, path in named(KEY).items() if key not in NOT_KEYS}


def test_the_inventory_is_not_empty() -> None:
    assert len(KEYS) > 30 and len(named(FLAG)) > 10 and len(named(COMMAND)) > 3


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_key_that_a_message_names_exists(key: str) -> None:
    assert find_key(key.split(".")) is not None, KEYS[key]


def test_flags_and_commands_that_messages_name_exist() -> None:
    known = dict(commands())
    flags = {flag for of_command in known.values() for flag in of_command}
    for flag, path in named(FLAG).items():
        assert flag in flags | OF_LAUNCHERS, (flag, path)
    for text, path in named(COMMAND).items():
        words = tuple(text.split()[1:])
        assert words in known or words[:1] in known, (text, path)
        if words[0] in ("shards", "recipes"):
            assert words in known, (text, path)


@pytest.mark.parametrize("key", sorted(set(KEYS) | {row.name for row in describe_keys() if "[]" not in row.name}))
def test_a_key_that_a_message_names_can_be_changed_on_resume(key: str) -> None:
    """A free key at once, any other as the refusal says; those that never change are named before training only."""
    section, *rest = key.split(".")
    before, after = ("".join(f"{step}: {{" for step in (section, *rest)) for _ in range(2))
    closing = "}" * len([section, *rest])
    before, after = f"{before}x: 1{closing}", f"{after}x: 2{closing}"

    def is_within(sections: tuple[str, ...]) -> bool:
        return any(f"{key}.".startswith(f"{other}.") for other in sections)

    if is_within(FREE):
        assert check_same_recipe(before, after, "here") == after
    elif is_within(FIXED):
        assert key not in KEYS or key in BEFORE_TRAINING, KEYS[key]
        with pytest.raises(RunError, match="cannot change within a run"):
            check_same_recipe(before, after, "here")
        assert check_same_recipe(before, after, "here", lambda _: None) == after  # before training
    else:
        with pytest.raises(RunError) as refused:
            check_same_recipe(before, after, "here")
        (accepted,) = re.findall(r"run\.accept_changes=\[(\S+)\]", str(refused.value))
        wanted = f"run: {{accept_changes: [{accepted}]}}\n{after}"
        if section == "run":
            wanted = f"{after[:-1]}, accept_changes: [{accepted}]}}"
        assert recorded_changes(check_same_recipe(before, wanted, "here"))
