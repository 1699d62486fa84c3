"""The keys of a recipe: their types, defaults and descriptions, and the JSON Schema generated from them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing

import jsonschema
import pytest
from omegaconf import OmegaConf
from support.recipes import PUBLISHED, SCHEMA

from rankllm_composer.model.loss_table import RANKING_LOSSES
from rankllm_composer.options import OBJECTIVES
from rankllm_composer.recipe.keys import describe_keys, keys_as_markdown, keys_as_text, keys_of
from rankllm_composer.recipe.sections import CallbackName, LoggerName, Recipe
from rankllm_composer.recipe.times import parse_time


def sections(kind: type = Recipe) -> list[type]:
    """Every class of options in a recipe."""
    found = [kind]
    for key in keys_of(kind).values():
        for inner in (key.annotation, key.element):
            if dataclasses.is_dataclass(inner):
                found += sections(typing.cast(type, inner))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("kind", sections(), ids=lambda kind: kind.__name__)
def test_every_key_is_documented_and_frozen(kind: type) -> None:
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    for key in keys_of(kind).values():
        assert key.meaning.endswith("."), key.name


def test_keys_of_numbers_name_their_unit() -> None:
    units = {"tokens": "_tokens", "seconds": "_seconds", "lists": "lists"}
    for row in describe_keys():
        if "whole number" in row.expected and row.unit in units:
            assert units[row.unit] in row.name, row


def test_key_table() -> None:
    rows = {row.name: row for row in describe_keys()}
    assert len(rows) == len(describe_keys())
    rate = rows["optimizer.lr"]
    assert (rate.expected, rate.shown_default, rate.unit) == ("a number above 0", "required", "")
    assert rate.meaning == "Highest learning rate."
    assert rows["optimizer.betas"].shown_default == "[0.9, 0.999]"
    assert rows["optimizer.betas"].expected == "a list of 2, each a number of at least 0 and below 1"
    assert rows["neftune"].shown_default == "null"
    assert rows["neftune.alpha"].shown_default == "5.0"
    assert rows["data.train.streams[].local"].shown_default == "required"
    assert rows["data.train.identifiers"].expected == "one of letters, numbers, or null"
    assert rows["run.max_duration"].expected == "text such as 3ep, 50ba or 4000sp"


def test_key_table_as_text_and_page() -> None:
    text, page = keys_as_text(), keys_as_markdown()
    for row in describe_keys():
        assert f"  {row.name}={row.shown_default}" in text
        meaning = row.meaning.replace("<", "\\<")
        assert f"| `{row.name}` | `{row.shown_default}` | {row.unit} | {meaning} | {row.expected} |" in page
    assert max(map(len, text.splitlines())) <= 120


def test_names_of_losses_and_objectives_are_listed() -> None:
    types = {row.name: row.expected for row in describe_keys()}
    assert types["objective.ranking_loss"] == f"one of {', '.join(RANKING_LOSSES)}"
    assert types["objective.name"] == f"one of {', '.join(OBJECTIVES)}"


def test_logger_and_callback_names_exist_in_composer() -> None:
    from composer import callbacks, loggers

    theirs = {name.lower() for name in dir(callbacks)} | {name.lower() for name in dir(loggers)}
    for name in (*typing.get_args(LoggerName), *typing.get_args(CallbackName)):
        assert name.replace("_", "") in theirs or f"{name}logger" in theirs


@pytest.mark.parametrize(
    "text, expected",
    [
        ("3ep", (3, "ep")),
        ("50ba", (50, "ba")),
        ("0ba", (0, "ba")),
        ("1000sp", (1000, "sp")),
        ("7tok", (7, "tok")),
        ("0.25dur", (0.25, "dur")),
        ("1dur", (1, "dur")),
    ],
)
def test_times_are_parsed_as_composer_parses_them(text: str, expected: tuple[float, str]) -> None:
    from composer.core import Time

    theirs = Time.from_timestring(text)
    assert parse_time(text) == expected == (theirs.value, theirs.unit.value)


@pytest.mark.parametrize("text", ["3", "ep", "3 ep", "-1ep", "1.5ep", "3epochs", "1.5dur", "", "3EP"])
def test_other_text_is_rejected_as_a_time(text: str) -> None:
    assert parse_time(text) is None


def test_reading_recipes_loads_no_heavy_library() -> None:
    code = (
        "import sys, rankllm_composer.recipe.load\n"
        "heavy = {'torch', 'transformers', 'composer', 'streaming', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "override",
    [
        "run.nam=x",
        "run.max_duration=3",
        "run.max_duration=0ep",
        "optimizer.betas=[0.9]",
        "optimizer.lr=0",
        "batch.microbatch_tokens=0",
        "schedule.name=cosin",
        "logging.loggers={wandbb: {}}",
        "data.train.streams=[{lokal: x}]",
    ],
)
def test_schema_rejects_what_load_recipe_rejects(override: str) -> None:
    key, _, value = override.partition("=")
    config = OmegaConf.load(PUBLISHED[0])
    OmegaConf.update(config, key, OmegaConf.create(f"value: {value}").value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(OmegaConf.to_container(config), SCHEMA)


def test_schema_describes_every_key() -> None:
    assert SCHEMA["additionalProperties"] is False and SCHEMA["title"] and SCHEMA["description"]
    for definition in SCHEMA["$defs"].values():
        assert definition["additionalProperties"] is False
        assert all(key["description"] for key in definition["properties"].values())
