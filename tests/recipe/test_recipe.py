"""Recipes: their keys, how they merge, and the messages about wrong ones."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import typing
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rankllm_composer.errors import Problem, RecipeError
from rankllm_composer.model.loss_table import RANKING_LOSSES
from rankllm_composer.options import OBJECTIVES
from rankllm_composer.recipe.checks import check_world, missing_files, parse_time, without_effect
from rankllm_composer.recipe.keys import describe_keys, keys_as_markdown, keys_as_text, keys_of
from rankllm_composer.recipe.load import RecipeWarning, load_recipe, merge_recipe, recipe_to_yaml
from rankllm_composer.recipe.sections import CallbackName, LoggerName, Recipe

YAMLS = sorted((Path(__file__).parents[2] / "yamls").glob("*.yaml"))
PUBLISHED = [path for path in YAMLS if path.stem in ("first_mistral", "rank_zephyr")]

SMALLEST = """
run: {name: small}
model: {name_or_path: some/model}
data: {train: {local: shards}}
batch: {global_lists: 8, microbatch_lists: 2}
optimizer: {lr: 1e-3}
"""


def write(folder: Path, text: str = SMALLEST, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    return write(tmp_path)


def problems(path: Path, *overrides: str) -> dict[str, Problem]:
    return {problem.key: problem for problem in merge_recipe(path, overrides).problems}


def sections(kind: type = Recipe) -> list[type]:
    """Every class of options in a recipe."""
    found = [kind]
    for key in keys_of(kind).values():
        for inner in (key.annotation, key.element):
            if dataclasses.is_dataclass(inner):
                found += sections(typing.cast(type, inner))
    return list(dict.fromkeys(found))


# The schema


@pytest.mark.parametrize("kind", sections(), ids=lambda kind: kind.__name__)
def test_every_key_is_documented_and_frozen(kind: type) -> None:
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    for key in keys_of(kind).values():
        assert key.meaning.endswith("."), key.name


def test_numbers_with_a_unit_name_it_in_their_key() -> None:
    units = {"tokens": "_tokens", "seconds": "_seconds", "lists": "lists"}
    for row in describe_keys():
        if "whole number" in row.expected and row.unit in units:
            assert units[row.unit] in row.name, row


def test_key_table() -> None:
    rows = {row.name: row for row in describe_keys()}
    assert len(rows) == len(describe_keys())
    rate = rows["optimizer.lr"]
    assert (rate.expected, rate.shown_default, rate.unit) == ("number above 0", "required", "")
    assert rate.meaning == "Highest learning rate."
    assert rows["optimizer.betas"].shown_default == "[0.9, 0.999]"
    assert rows["optimizer.betas"].expected == "list of 2, each number at least 0 and below 1"
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


def test_names_of_losses_and_objectives_are_listed():
    types = {row.name: row.expected for row in describe_keys()}
    assert types["objective.ranking_loss"] == f"one of {', '.join(RANKING_LOSSES)}"
    assert types["objective.name"] == f"one of {', '.join(OBJECTIVES)}"


def test_names_of_loggers_and_callbacks_are_those_of_composer() -> None:
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
def test_other_text_is_not_a_time(text: str) -> None:
    assert parse_time(text) is None


def test_reading_recipes_loads_no_heavy_library() -> None:
    code = (
        "import sys, rankllm_composer.recipe.load\n"
        "heavy = {'torch', 'transformers', 'composer', 'streaming', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The recipes of yamls/


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_recipe_is_usable_without_a_warning(path: Path) -> None:
    merged = merge_recipe(path)
    assert merged.problems == []
    assert merged.warnings == []
    assert merged.recipe.run.name == path.stem


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_recipe_sets_every_key_it_uses(path: Path) -> None:
    unstated = {row.key for row in merge_recipe(path).keys if row.origin == "default"}
    recipe = load_recipe(path)
    unstated -= set(without_effect(recipe))
    for section, split in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        if split is not None and split.source is not None:
            other_kind = ("input",) if split.source.run else ("run", "judgments", "teacher_run", "queries", "docs")
            unstated -= {f"{section}.source.{name}" for name in other_kind}
    assert unstated == set()


def test_keys_without_effect() -> None:
    """The keys that the published recipes need not set."""
    from_run = {"window", "stride", "lists_per_query", "depth", "max_passage_words", "identifiers", "seed"}
    from_run = {f"data.train.source.{name}" for name in (*from_run, "require_relevant")}
    ranking = {"objective.ranking_weight", "objective.ranking_loss", "objective.ranking_loss_options"}
    first, zephyr = (load_recipe(path) for path in PUBLISHED)
    assert set(without_effect(first)) == {"data.eval", "checkpoint.export.merge_lora", *from_run}
    assert set(without_effect(zephyr)) == {*without_effect(first), *ranking}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_recipe_explains_itself(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header = text[: text.index("\nrun:")]
    for word in ("Launch", "Hardware", "Numbers", "Tested"):
        assert f"# {word}" in header, word
    for line in text[len(header) :].splitlines():
        is_section = line.rstrip().endswith(":")
        assert not line.strip() or is_section or re.search(r"\S\s+# \S", line), f"no comment: {line}"
        assert len(line) <= 120


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_resolved_recipe_reads_back_as_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    again = write(tmp_path, recipe_to_yaml(recipe))
    assert load_recipe(again) == recipe
    assert recipe_to_yaml(load_recipe(again)) == recipe_to_yaml(recipe)


@pytest.mark.parametrize(
    "name, model, objective, lists",
    [
        ("first_mistral", "mistralai/Mistral-7B-Instruct-v0.3", "combined", 8 * 4 * 4),
        ("rank_zephyr", "HuggingFaceH4/zephyr-7b-beta", "generation", 4 * 16 * 4),
    ],
)
def test_published_settings(name: str, model: str, objective: str, lists: int) -> None:
    recipe = load_recipe(next(path for path in PUBLISHED if path.stem == name))
    assert recipe.model.name_or_path == model
    assert recipe.model.activation_checkpointing == 1.0
    assert recipe.data.train.source is not None
    assert recipe.data.train.source.input == "rryisthebest/rank_zephyr_training_data_alpha"
    assert recipe.objective.name == objective
    assert recipe.batch.global_lists == lists
    assert (recipe.optimizer.lr, recipe.optimizer.betas, recipe.optimizer.weight_decay) == (5e-6, (0.9, 0.999), 0.0)
    assert recipe.optimizer.gradient_clip_norm == 1.0
    assert (recipe.schedule.name, recipe.schedule.warmup, recipe.schedule.final_lr_fraction) == ("cosine", "50ba", 0.0)
    assert (recipe.run.seed, recipe.run.max_duration) == (42, "3ep")
    assert recipe.neftune is not None and recipe.neftune.alpha == 5.0
    assert recipe.parallelism.fsdp and recipe.parallelism.precision == "amp_bf16"
    assert recipe.checkpoint.export is not None and recipe.checkpoint.export.interval == "1ep"
    assert recipe.objective.ranking_weight == 10.0
    assert recipe.objective.ranking_loss_options == ({"weighted": True} if objective == "combined" else {})
    check_world(recipe, 8)


# The JSON Schema


SCHEMA = json.loads((YAMLS[0].parent / "recipe.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_recipe_fits_the_schema_that_it_names(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    jsonschema.validate(OmegaConf.to_container(OmegaConf.load(path)), SCHEMA)


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
def test_schema_refuses_what_a_recipe_refuses(override: str) -> None:
    key, _, value = override.partition("=")
    config = OmegaConf.load(PUBLISHED[0])
    OmegaConf.update(config, key, OmegaConf.create(f"value: {value}").value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(OmegaConf.to_container(config), SCHEMA)


def test_schema_has_the_meaning_of_every_key() -> None:
    assert SCHEMA["additionalProperties"] is False and SCHEMA["title"] and SCHEMA["description"]
    for definition in SCHEMA["$defs"].values():
        assert definition["additionalProperties"] is False
        assert all(key["description"] for key in definition["properties"].values())


# Merging


def test_defaults_come_from_the_dataclasses(smallest: Path) -> None:
    recipe = load_recipe(smallest)
    assert recipe.run.seed == 42
    assert recipe.optimizer.betas == (0.9, 0.999)
    assert recipe.neftune is None
    assert recipe.run_folder == "runs/small"
    assert recipe.checkpoint_folder == "runs/small/checkpoints"
    assert recipe.export_folder == "runs/small/hf"
    assert recipe.tokenizer == "some/model"


def test_folders_that_are_set_replace_the_defaults(smallest: Path) -> None:
    given_folders = ["run.folder=here", "checkpoint.folder=s3://bucket/run", "checkpoint.export.folder=there"]
    recipe = load_recipe(smallest, [*given_folders, "model.tokenizer=some/tokenizer"])
    assert recipe.run_folder == "here"
    assert recipe.checkpoint_folder == "s3://bucket/run"
    assert recipe.export_folder == "there"
    assert recipe.tokenizer == "some/tokenizer"
    assert load_recipe(smallest, ["run.folder=here"]).checkpoint_folder == "here/checkpoints"
    assert load_recipe(smallest, ["checkpoint.export=null"]).export_folder is None


def test_yaml_beats_default_and_override_beats_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "schedule: {warmup: 7ba}\n")
    assert load_recipe(path).schedule.warmup == "7ba"
    assert load_recipe(path, ["schedule.warmup=9ba"]).schedule.warmup == "9ba"
    assert load_recipe(path, ["schedule.warmup=9ba", "schedule.warmup=8ba"]).schedule.warmup == "8ba"


@pytest.mark.parametrize(
    "override, read, expected",
    [
        ("optimizer.lr=5e-6", lambda r: r.optimizer.lr, 5e-6),
        ("optimizer.lr=1", lambda r: r.optimizer.lr, 1.0),
        ("batch.global_lists=1e1", lambda r: r.batch.global_lists, 10),
        ("optimizer.betas=[0.8, 0.95]", lambda r: r.optimizer.betas, (0.8, 0.95)),
        ("optimizer.betas.1=0.95", lambda r: r.optimizer.betas, (0.9, 0.95)),
        ("optimizer.betas[1]=0.95", lambda r: r.optimizer.betas, (0.9, 0.95)),
        ("optimizer.gradient_clip_norm=null", lambda r: r.optimizer.gradient_clip_norm, None),
        ("neftune={}", lambda r: r.neftune.alpha, 5.0),
        ("neftune.alpha=3", lambda r: r.neftune.alpha, 3.0),
        ("model.lora.rank=4", lambda r: (r.model.lora.rank, r.model.lora.alpha), (4, 32.0)),
        ("model.revision=1e5", lambda r: r.model.revision, "1e5"),
        ("model.revision=0123", lambda r: r.model.revision, "0123"),
        ("model.revision=null", lambda r: r.model.revision, None),
        ("run.name=2024", lambda r: r.run.name, "2024"),
        ("model.config_overrides.rope_theta=1e6", lambda r: r.model.config_overrides, {"rope_theta": 1e6}),
        ("model.config_overrides={a: {b: [1]}}", lambda r: r.model.config_overrides, {"a": {"b": [1]}}),
        ("logging.loggers.tensorboard=null", lambda r: r.logging.loggers, {"tensorboard": {}}),
        (
            "logging.callbacks.speed_monitor.window_size=3",
            lambda r: r.logging.callbacks["speed_monitor"],
            {"window_size": 3},
        ),
        ("run.folder=a=b", lambda r: r.run.folder, "a=b"),
        ("run.folder=runs/${run.name}/x", lambda r: r.run.folder, "runs/small/x"),
    ],
)
def test_overrides(smallest: Path, override: str, read: Any, expected: Any) -> None:
    value = read(load_recipe(smallest, [override]))
    assert value == expected
    assert type(value) is type(expected)


def test_an_override_replaces_the_complete_value(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "objective: {ranking_loss_options: {weighted: true}}\n")
    recipe = load_recipe(path, ["objective.ranking_loss=listnet", "objective.ranking_loss_options={}"])
    assert recipe.objective.ranking_loss_options == {}


def test_streams_can_be_overridden_one_by_one(tmp_path: Path) -> None:
    text = SMALLEST.replace("local: shards", "streams: [{local: a}, {local: b, remote: 's3://x/b'}]")
    recipe = load_recipe(write(tmp_path, text), ["data.train.streams.1.local=c"])
    assert [(stream.remote, stream.local) for stream in recipe.data.train.streams] == [(None, "a"), ("s3://x/b", "c")]


def test_references_to_other_keys_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS", "/somewhere")
    text = SMALLEST.replace("local: shards", 'local: "${oc.env:SHARDS}/train"').replace(
        "{name: small}", '{name: small, seed: "${data.num_workers}"}'
    )
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.data.train.local == "/somewhere/train"
    assert recipe.run.seed == 2


def test_explain_names_the_origin_of_every_key(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "neftune: null\n")
    overrides = ["optimizer.lr=2e-3", "model.config_overrides.num_hidden_layers=2", "optimizer.betas.0=0.8"]
    rows = {row.key: (row.value, row.origin) for row in merge_recipe(path, overrides).keys}
    assert rows["run.name"] == ("small", "yaml")
    assert rows["run.seed"] == (42, "default")
    assert rows["neftune"] == (None, "yaml")
    assert rows["optimizer.lr"] == (2e-3, "override")
    assert rows["optimizer.betas"] == ([0.8, 0.999], "override")
    assert rows["model.config_overrides.num_hidden_layers"] == (2, "override")
    assert rows["model.lora"] == (None, "default")
    assert "neftune.alpha" not in rows


def test_explain_of_a_replaced_section(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "neftune: {alpha: 3}\nschedule: {name: linear, warmup: 5ba}\n")
    merged = merge_recipe(path, ["schedule={name: cosine}", "neftune=null"])
    rows = {row.key: (row.value, row.origin) for row in merged.keys}
    assert rows["schedule.name"] == ("cosine", "override")
    assert rows["schedule.warmup"] == ("50ba", "default")
    assert rows["neftune"] == (None, "override")


def test_explain_shows_wrong_values_as_they_were_given(smallest: Path) -> None:
    rows = {row.key: row.value for row in merge_recipe(smallest, ["run.seed=soon"]).keys}
    assert rows["run.seed"] == "soon"


FREE_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)
    | st.sampled_from(["1e5", "null", "${run.name}", "\\${x}", "a\\\\${b", "yes", "2024-01-01", "[B] > [A]", "0x1"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=50)
@given(options=st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), FREE_VALUES, max_size=4))
def test_any_free_mapping_survives_the_resolved_recipe(
    options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("recipe")
    recipe = load_recipe(write(folder))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, config_overrides=options))
    assert load_recipe(write(folder, recipe_to_yaml(recipe), "resolved.yaml")) == recipe


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.name=generation"],
        ["objective.name=ranking"],
        ["parallelism.fsdp=false"],
        ["schedule.name=constant"],
        ["model.lora={}", "neftune={}", "checkpoint.export=null"],
        ["data.train.source.input=a.jsonl"],
        ["data.train={streams: [{local: a, proportion: 0.25}, {local: b, proportion: 0.75}]}"],
        ["data.eval={local: x}", "evaluation={}"],
        ["logging.loggers={wandb: {project: p}}", "logging.callbacks={lr_monitor: null}"],
    ],
)
def test_resolved_recipe_is_equal_and_quiet(smallest: Path, overrides: list[str]) -> None:
    recipe = load_recipe(smallest, overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_recipe(write(smallest.parent, recipe_to_yaml(recipe), "resolved.yaml")) == recipe


# What is wrong


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        run: {nam: x, max_duration: 3}
        model: {name_or_path: 7}
        dta: {}
        batch: {microbatch_lists: 2, microbatch_tokens: 4096}
        optimizer: {lr: fast, betas: [0.9, 1.5]}
        """,
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["objective.ranking_loss=ranknett", "neftune.alpha=0"])
    keys = [problem.key for problem in caught.value.problems]
    assert sorted(keys) == sorted(
        [
            "run.nam",
            "run.name",
            "run.max_duration",
            "model.name_or_path",
            "dta",
            "batch.microbatch_lists",
            "optimizer.lr",
            "optimizer.betas",
            "objective.ranking_loss",
            "neftune.alpha",
        ]
    )
    message = str(caught.value)
    assert message.splitlines()[0] == f"{path}: 10 problems"
    assert "run.nam is an unknown key; expected one of name," in message and "Did you mean run.name?" in message
    assert "optimizer.lr is 'fast'; expected number above 0." in message
    assert "objective.ranking_loss is 'ranknett';" in message and "Did you mean ranknet?" in message


@pytest.mark.parametrize(
    "override, meant",
    [
        ("objetive.name=ranking", "objective"),
        ("objective.nmae=ranking", "objective.name"),
        ("data.train.shufle=false", "data.train.shuffle"),
        ("data.train.source.inptu=x.json", "data.train.source.input"),
        ("model.lora.rnk=4", "model.lora.rank"),
        ("lora.rank=4", "model.lora"),
        ("lr=4", "optimizer.lr"),
        ("global_lists=4", "batch.global_lists"),
        ("logging.loggers.tensorbord={}", "logging.loggers.tensorboard"),
        ("checkpoint.export.intervall=2ep", "checkpoint.export.interval"),
    ],
)
def test_did_you_mean(smallest: Path, override: str, meant: str) -> None:
    (problem,) = merge_recipe(smallest, [override]).problems
    assert problem.remedy == f"Did you mean {meant}?"


def test_unknown_key_in_a_stream(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST.replace("local: shards", "streams: [{local: a}, {lokal: b}]"))
    found = problems(path)
    assert found["data.train.streams[1].lokal"].remedy == "Did you mean data.train.streams[1].local?"
    assert found["data.train.streams[1].local"].found == "missing"


@pytest.mark.parametrize(
    "override, key, found, expected",
    [
        ("run.seed=-1", "run.seed", "-1", "whole number at least 0"),
        ("run.seed=1.5", "run.seed", "1.5", "whole number at least 0"),
        ("run.seed=true", "run.seed", "true", "whole number at least 0"),
        ("run.seed=null", "run.seed", "null", "whole number at least 0"),
        ("optimizer.lr=.inf", "optimizer.lr", "inf", "number above 0"),
        ("optimizer.lr=.nan", "optimizer.lr", "nan", "number above 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas", "[0.9]", "list of 2, each number at least 0 and below 1"),
        ("optimizer.betas=0.9", "optimizer.betas", "0.9", "list of 2, each number at least 0 and below 1"),
        ("model.compile=1", "model.compile", "1", "true or false"),
        ("model.compile=perhaps", "model.compile", "'perhaps'", "true or false"),
        ("model.config_overrides=3", "model.config_overrides", "3", "mapping"),
        (
            "model.activation_checkpointing=1.1",
            "model.activation_checkpointing",
            "1.1",
            "number at least 0 and at most 1",
        ),
        ("run=3", "run", "3", "section"),
        ("model.lora=true", "model.lora", "true", "section, or null"),
        ("data.train.streams=x", "data.train.streams", "'x'", "list, each section"),
        ("data.train.streams=[x]", "data.train.streams[0]", "'x'", "section"),
        ("data.train.cache_limit=lots", "data.train.cache_limit", "'lots'", "text such as 100gb, or null"),
        ("run.max_duration=0ep", "run.max_duration", "'0ep'", "text such as 3ep, 50ba or 4000sp"),
        ("schedule.warmup=50", "schedule.warmup", "'50'", "text such as 3ep, 50ba, 4000sp or 0.1dur"),
        ("schedule.name=cosin", "schedule.name", "'cosin'", "one of cosine, linear, constant"),
        ("parallelism.mixed_precision=pure", "parallelism.mixed_precision", "'pure'", "one of DEFAULT, PURE, FULL"),
        (
            "evaluation.decodings=[greedy]",
            "evaluation.decodings",
            "'greedy'",
            "list, each one of first_token, generation",
        ),
        ("run.name=a b", "run.name", "'a b'", "text such as first_mistral"),
        ("run.name=", "run.name", "null", "text such as first_mistral"),
        ("logging.loggers.wandb=3", "logging.loggers.wandb", "3", "mapping, or null"),
        ("logging.loggers=3", "logging.loggers", "3", "mapping of tensorboard, wandb, mlflow to arguments"),
        (
            "data.train.source.depth=2000000",
            "data.train.source.depth",
            "2000000",
            "whole number at least 2 and at most 1000000",
        ),
    ],
)
def test_wrong_values(smallest: Path, override: str, key: str, found: str, expected: str) -> None:
    problem = problems(smallest, override)[key]
    assert (problem.found, problem.expected) == (found, expected)
    assert problem.remedy


@pytest.mark.parametrize("row", [row for row in describe_keys() if "[]" not in row.name], ids=lambda row: row.name)
def test_every_key_refuses_values_of_another_type(row: Any, smallest: Path) -> None:
    """A mapping fits no number, text or list; a text fits no section, mapping or number."""
    takes_mapping = "mapping" in row.expected or row.expected.startswith("section")
    override = f"{row.name}=x" if takes_mapping else f"{row.name}={{x: 1}}"
    assert row.name in problems(smallest, override)


def test_yaml_numbers_for_texts_ask_for_quotes(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST.replace("{name_or_path: some/model}", "{name_or_path: m, revision: 1e5}"))
    assert problems(path)["model.revision"].remedy == "Put it in quotes."


@pytest.mark.parametrize(
    "override, remedy",
    [
        ("run.seed", "Write = between key and value."),
        ("--run.seed=3", "Write run.seed=3, without the leading -."),
        ("+run.seed=3", "Write run.seed=3, without the leading +."),
        ("run seed=3", "Write the key as section.key, without spaces."),
        ("run..seed=3", "Write the key as section.key, without spaces."),
        ("run.seed=[1", "[1 is not a YAML value. Put quotes around text with : { [ or #."),
        ("optimizer.betas.2=1", "'2' is not an index into a list of 2. Count from 0, or write the list."),
    ],
)
def test_unreadable_overrides(smallest: Path, override: str, remedy: str) -> None:
    assert problems(smallest, override)[override].remedy == remedy


@pytest.mark.parametrize(
    "text, found",
    [
        ("run: [1", "did not find expected"),
        ("run: {name: a}\nrun: {name: b}", "found duplicate key run"),
        ("- run", "a list"),
        ("run: !!python/object/apply:os.system ['touch made']", "could not determine a constructor"),
        ("run: !!python/name:os.system ''", "could not determine a constructor"),
    ],
)
def test_files_that_are_not_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert found in caught.value.problems[0].found
    assert not Path("made").exists()


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="recipe is not a file"):
        load_recipe(tmp_path / "absent.yaml")
    assert {"run.name", "model.name_or_path", "optimizer.lr"} <= set(problems(write(tmp_path, "")))


@pytest.mark.parametrize(
    "override", ["run.folder=${run.nothing}", "run.folder=${run.folder}", "run.folder=${oc.env:NOT_SET_ANYWHERE}"]
)
def test_references_that_cannot_be_resolved(smallest: Path, override: str) -> None:
    (problem,) = merge_recipe(smallest, [override]).problems
    assert problem.key == "run.folder"
    assert problem.found.startswith("'${")


def test_secrets_are_not_repeated(smallest: Path) -> None:
    overrides = ["data.train.remote='s3://key:hushhush@host/set'", "logging.loggers={wandb: {api_key: hushhush}}"]
    with pytest.raises(RecipeError) as raised:
        load_recipe(smallest, overrides)
    assert str(raised.value).count("give it where its client looks for it") == 2
    assert "hushhush" not in str(raised.value)


def test_a_secret_of_the_environment_is_refused(smallest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    (problem,) = merge_recipe(smallest, ["run.name=${oc.env:WANDB_API_KEY}"]).problems
    assert (problem.key, problem.found) == ("run.name", "a value that looks like a secret")


SMALLEST_LINES = st.lists(
    st.sampled_from(
        [
            "run:",
            "  name: x",
            "model:",
            "  name_or_path: m",
            "data:",
            "  train:",
            "    local: x",
            "    streams: [{local: a}, 3, null]",
            "batch: {global_lists: 8}",
            "objective: [combined]",
            "schedule: {warmup: 3parsecs}",
            "logging: {loggers: {wandb: 3}}",
            "- a",
            "  ? [b]",
            "x: &y [*y]",
            "${run.name}: ${run.nome}",
            "run: !!python/object/apply:os.getcwd []",
            "\t",
            "optimizer: {lr: .inf, betas: [1, 2, 3]}",
        ]
    )
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30),
    max_size=12,
)


@settings(deadline=None, max_examples=150)
@given(lines=SMALLEST_LINES, overrides=st.lists(st.text(max_size=20), max_size=2))
def test_any_file_gives_a_recipe_or_a_recipe_error(
    lines: list[str], overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("any"), "\n".join(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecipeWarning)
        try:
            assert load_recipe(path, overrides).run.name
        except RecipeError as error:
            assert str(path) in str(error)


def test_a_key_marked_as_missing_is_missing(smallest: Path) -> None:
    assert problems(smallest, "run.name=???")["run.name"].found == "missing"


TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz0123"
TREC = "data.train.source={run: r.trec, queries: q.jsonl, docs: d.jsonl, judgments: q.qrels"
CPU = "parallelism.device=cpu"


@pytest.mark.parametrize(
    "overrides, key, part",
    [
        (["batch.microbatch_lists=null"], "batch.microbatch_lists", "null, as is batch.microbatch_tokens"),
        (["batch.microbatch_tokens=4096"], "batch.microbatch_lists", "set, and so is batch.microbatch_tokens"),
        (["batch.microbatch_lists=null", "batch.microbatch_tokens=4095"], "batch.microbatch_tokens", "4095"),
        (["batch.microbatch_lists=3"], "batch.microbatch_lists", "3"),
        (["batch.microbatch_lists=16"], "batch.microbatch_lists", "16"),
        (["objective.ranking_weight=0"], "objective.ranking_weight", "0 with objective.name: combined"),
        (["objective.name=ranking", "objective.ranking_weight=0"], "objective.ranking_weight", "0 with"),
        (["objective.language_modelling_weight=0"], "objective.language_modelling_weight", "0 with"),
        (
            ["objective.ranking_loss_options.wieghted=true"],
            "objective.ranking_loss_options.wieghted",
            "not an option of ranknet",
        ),
        (
            ["objective.ranking_loss_options.target=ranks"],
            "objective.ranking_loss_options.target",
            "not an option of ranknet",
        ),
        (["objective.ranking_loss_options.weighted=3"], "objective.ranking_loss_options.weighted", "3"),
        (
            ["objective.ranking_loss=listnet", "objective.ranking_loss_options.target=self"],
            "objective.ranking_loss_options.target",
            "'self'",
        ),
        (
            ["objective.ranking_loss=listmle", "objective.ranking_loss_options.x=1"],
            "objective.ranking_loss_options.x",
            "not an option of listmle",
        ),
        (
            ["objective.ranking_loss=listnet", "objective.ranking_loss_options.detach_target=true"],
            "objective.ranking_loss_options.detach_target",
            "without target: self_sorted",
        ),
        (["schedule.warmup=1000tok"], "schedule.warmup", "'1000tok'"),
        (["run.max_duration=1000tok"], "run.max_duration", "'1000tok'"),
        (["run.max_duration=50ba"], "schedule.warmup", "'50ba'"),
        (["schedule.warmup=1dur"], "schedule.warmup", "'1dur'"),
        ([CPU, "model.attention=flash_attention_2"], "model.attention", "with parallelism.device: cpu"),
        ([CPU, "optimizer.name=adamw_8bit"], "optimizer.name", "adamw_8bit with parallelism.device: cpu"),
        (["model.attention=flash_attention_2", "parallelism.precision=fp32"], "model.attention", "precision: fp32"),
        (["data.train.local=null"], "data.train.local", "null, and data.train.streams is empty"),
        (["data.train.streams=[{local: x}]"], "data.train.local", "set, and so is data.train.streams"),
        (
            ["data.train={streams: [{local: x}], remote: 's3://x'}"],
            "data.train.remote",
            "set, and so is data.train.streams",
        ),
        (
            ["data.train={streams: [{local: x}], source: {input: a.json}}"],
            "data.train.source",
            "set, and so is data.train.streams",
        ),
        (["data.train={streams: [{local: x, proportion: 0.5}, {local: y}]}"], "data.train.streams", "[0.5, null]"),
        (
            ["data.train={streams: [{local: x, proportion: 0.5}, {local: y, proportion: 0.4}]}"],
            "data.train.streams",
            "[0.5, 0.4]",
        ),
        (["data.train.cache_limit=1gb"], "data.train.cache_limit", "without a remote"),
        (["data.train.source={}"], "data.train.source.input", "null, as is run"),
        (["data.train.source={input: a.json, run: b}"], "data.train.source.input", "set, and so is run"),
        (["data.train.source={input: a.json, docs: d}"], "data.train.source.docs", "set"),
        (["data.train.source={run: b, queries: q, judgments: j}"], "data.train.source.docs", "null"),
        (["data.train.source={run: b, docs: q, judgments: j}"], "data.train.source.queries", "null"),
        (["data.train.source={run: b, docs: q, queries: j}"], "data.train.source.judgments", "null, as is teacher_run"),
        ([TREC + ", window: 27}"], "data.train.source.window", "27 with identifiers: letters"),
        ([TREC + ", window: 100, identifiers: numbers}"], "data.train.source.window", "100 with identifiers: numbers"),
        (
            ["data.train.source={run: r, docs: d, queries: q, teacher_run: t, require_relevant: true}"],
            "data.train.source.require_relevant",
            "true without",
        ),
        ([TREC + ", window: 10, stride: 11}"], "data.train.source.stride", "11"),
        (["evaluation={}"], "evaluation", "data.eval is null"),
        (["evaluation={decodings: []}", "data.eval={local: x}"], "evaluation.decodings", "[]"),
        (
            ["data.train.remote=s3://x", "data.eval={local: ./shards, remote: 's3://y'}", "evaluation={}"],
            "data.eval",
            "'shards'",
        ),
        (["checkpoint.keep=0"], "checkpoint.keep", "0"),
        (["model.lora.target_modules=[]"], "model.lora.target_modules", "[]"),
        (["model.lora.frozen_precision=bf16"], "model.lora.frozen_precision", "bf16 with parallelism.fsdp: true"),
        (
            ["model.lora.frozen_precision=bf16", "parallelism={fsdp: false, precision: fp32}"],
            "model.lora.frozen_precision",
            "bf16 with parallelism.precision: fp32",
        ),
        (["data.train.remote='s3://key:word@host/set'"], "data.train.remote", "a URL with credentials"),
        (["checkpoint.folder='https://host/set?sig=abc'"], "checkpoint.folder", "a URL with credentials"),
        (
            ["data.train={streams: [{local: x, remote: 'sftp://me:word@host/a'}]}"],
            "data.train.streams.0.remote",
            "a URL with credentials",
        ),
        (["logging.loggers={wandb: {api_key: word}}"], "logging.loggers.wandb.api_key", "looks like a secret"),
        (["logging.loggers={mlflow: {x: {Token: word}}}"], "logging.loggers.mlflow.x.Token", "looks like a secret"),
        ([f"logging.loggers={{wandb: {{notes: {TOKEN}}}}}"], "logging.loggers.wandb.notes", "looks like a secret"),
        ([f"checkpoint.folder=https://{TOKEN}@host/a"], "checkpoint.folder", "looks like a secret"),
    ],
)
def test_contradictions(smallest: Path, overrides: list[str], key: str, part: str) -> None:
    found = problems(smallest, *overrides)
    assert key in found, list(found)
    assert part in found[key].found
    assert re.fullmatch(r"\S+ is .+; expected .+\. [A-Z].+[.?]", str(found[key]))
    assert len([problem for problem in found if problem.startswith(key)]) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        [CPU, "parallelism.precision=fp32"],
        ["run.max_duration=100ba", "schedule.warmup=99ba"],
        ["run.max_duration=1000sp", "schedule.warmup=5ba"],
        ["run.max_duration=3ep", "schedule.warmup=1ep"],
        ["schedule.warmup=0ba"],
        [TREC + ", window: 99, identifiers: numbers}"],
        [TREC + ", window: 26, stride: 26, lists_per_query: 0}"],
        ["data.train.remote=s3://x", "data.train.cache_limit=100GB"],
        [
            "objective.ranking_loss=lambdarank",
            "objective.ranking_loss_options={target: self_sorted, detach_target: true}",
        ],
        ["batch.microbatch_lists=null", "batch.microbatch_tokens=4096"],
        ["checkpoint.keep=-1"],
        ["data.train.remote='sftp://me@host/a'", "model.config_overrides={pad_token_id: 3, token: null}"],
    ],
)
def test_no_contradiction(smallest: Path, overrides: list[str]) -> None:
    assert problems(smallest, *overrides) == {}


def test_a_wrong_value_is_not_reported_twice(smallest: Path) -> None:
    assert list(problems(smallest, "batch.microbatch_lists=many")) == ["batch.microbatch_lists"]
    assert list(problems(smallest, "data=3")) == ["data"]


# What surprises


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["objective.name=generation", "objective.ranking_weight=10"], "objective.ranking_weight = 10.0 has no effect"),
        (
            ["objective.name=generation", "objective.ranking_loss=listnet"],
            "objective.ranking_loss = listnet has no effect",
        ),
        (
            ["objective.name=generation", "objective.ranking_loss_options.weighted=true"],
            "objective.ranking_loss_options has no effect",
        ),
        (
            ["objective.name=ranking", "objective.language_modelling_weight=2"],
            "objective.language_modelling_weight = 2.0 has no effect",
        ),
        (
            ["schedule.name=constant", "schedule.final_lr_fraction=0.1"],
            "schedule.final_lr_fraction = 0.1 has no effect",
        ),
        (
            ["parallelism.fsdp=false", "parallelism.mixed_precision=PURE"],
            "parallelism.mixed_precision = PURE has no effect",
        ),
        (["data.eval={local: x}"], "data.eval has no effect: evaluation is null"),
        (["data.train.source={input: a.json, window: 10}"], "data.train.source.window = 10 has no effect"),
        (
            ["run.name=my_gpt_killer"],
            "checkpoint.export.folder: runs/my_gpt_killer/hf contains 'gpt', so rank_llm takes",
        ),
        (["checkpoint.export.folder=out/monot5"], "out/monot5 contains 'monot5'"),
        (["data.train.identifiers=numbers"], "numbers can be served by generation alone"),
    ],
)
def test_warnings(smallest: Path, overrides: list[str], sentence: str) -> None:
    with pytest.warns(RecipeWarning) as caught:
        load_recipe(smallest, overrides)
    (warning,) = caught
    assert sentence in str(warning.message)
    assert warning.filename == __file__


def test_defaults_cause_no_warning(smallest: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_recipe(smallest, ["objective.name=generation", "data.eval=null", "data.train.identifiers=numbers"])


# Ranks and files


@pytest.mark.parametrize(
    "lists, microbatch, ranks, sizes",
    [
        (128, None, 8, None),
        (128, None, 6, "126 or 132"),
        (128, 16, 8, None),
        (128, 32, 8, "256"),
        (256, 32, 3, "192 or 288"),
        (4, None, 8, "8"),
    ],
)
def test_check_world(smallest: Path, lists: int, microbatch: int | None, ranks: int, sizes: str | None) -> None:
    overrides = [f"batch.global_lists={lists}", f"batch.microbatch_lists={microbatch or 'null'}"]
    recipe = load_recipe(smallest, overrides + ([] if microbatch else ["batch.microbatch_tokens=4096"]))
    if sizes is None:
        check_world(recipe, ranks)
    else:
        with pytest.raises(RecipeError, match=f"Set batch.global_lists={sizes}, or change the number of ranks"):
            check_world(recipe, ranks)


def test_missing_files(smallest: Path, tmp_path: Path) -> None:
    def missing(*overrides: str) -> list[str]:
        return [problem.key for problem in missing_files(load_recipe(smallest, overrides))]

    shards = tmp_path / "shards"
    assert missing(f"data.train.local={shards}") == ["data.train.local"]
    shards.mkdir()
    (shards / "index.json").write_text("{}")
    assert missing(f"data.train.local={shards}") == []
    assert missing("data.train.remote=s3://bucket/shards") == []
    assert missing("data.train.source.input=owner/name") == []
    assert missing("data.train.source.input=absent.jsonl") == ["data.train.source.input"]
    assert missing(TREC + "}") == [f"data.train.source.{name}" for name in ("run", "judgments", "queries", "docs")]
    assert missing(f"data.train.local={shards}", "model.name_or_path=./absent") == ["model.name_or_path"]
    assert missing(f"data.train={{streams: [{{local: {shards}}}, {{local: {tmp_path}}}]}}") == ["data.train.local"]


def test_recipes_share_no_mapping(smallest: Path) -> None:
    first, second = load_recipe(smallest), load_recipe(smallest)
    first.model.config_overrides["a"] = 1
    assert second.model.config_overrides == {} == load_recipe(smallest).model.config_overrides
