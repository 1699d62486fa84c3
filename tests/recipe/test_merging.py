"""Defaults, YAML file and key=value overrides merge into one recipe, which can be written out and read back."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recipes import MINIMAL, write_recipe

from rankllm_composer.recipe.load import load_recipe, merge_recipe, recipe_to_yaml


def test_defaults_come_from_the_dataclasses(minimal_recipe: Path) -> None:
    recipe = load_recipe(minimal_recipe)
    assert recipe.run.seed == 42
    assert recipe.optimizer.betas == (0.9, 0.999)
    assert recipe.neftune is None
    assert recipe.run_folder == "runs/small"
    assert recipe.checkpoint_folder == "runs/small/checkpoints"
    assert recipe.export_folder == "runs/small/hf"
    assert recipe.tokenizer == "some/model"


def test_folders_in_a_recipe_replace_the_default_folders(minimal_recipe: Path) -> None:
    given_folders = ["run.folder=here", "checkpoint.folder=s3://bucket/run", "checkpoint.export.folder=there"]
    recipe = load_recipe(minimal_recipe, [*given_folders, "model.tokenizer=some/tokenizer"])
    assert recipe.run_folder == "here"
    assert recipe.checkpoint_folder == "s3://bucket/run"
    assert recipe.export_folder == "there"
    assert recipe.tokenizer == "some/tokenizer"
    assert load_recipe(minimal_recipe, ["run.folder=here"]).checkpoint_folder == "here/checkpoints"
    assert load_recipe(minimal_recipe, ["checkpoint.export=null"]).export_folder is None


def test_yaml_beats_default_and_override_beats_yaml(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, MINIMAL + "schedule: {warmup: 7ba}\n")
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
def test_overrides(minimal_recipe: Path, override: str, read: Any, expected: Any) -> None:
    value = read(load_recipe(minimal_recipe, [override]))
    assert value == expected
    assert type(value) is type(expected)


def test_an_override_replaces_a_mapping_entirely(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, MINIMAL + "objective: {ranking_loss_options: {weighted: true}}\n")
    recipe = load_recipe(path, ["objective.ranking_loss=listnet", "objective.ranking_loss_options={}"])
    assert recipe.objective.ranking_loss_options == {}


def test_streams_can_be_overridden_one_by_one(tmp_path: Path) -> None:
    text = MINIMAL.replace("local: shards", "streams: [{local: a}, {local: b, remote: 's3://x/b'}]")
    recipe = load_recipe(write_recipe(tmp_path, text), ["data.train.streams.1.local=c"])
    assert [(stream.remote, stream.local) for stream in recipe.data.train.streams] == [(None, "a"), ("s3://x/b", "c")]


def test_references_to_other_keys_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS", "/somewhere")
    text = MINIMAL.replace("local: shards", 'local: "${oc.env:SHARDS}/train"').replace(
        "{name: small}", '{name: small, seed: "${data.num_workers}"}'
    )
    recipe = load_recipe(write_recipe(tmp_path, text))
    assert recipe.data.train.local == "/somewhere/train"
    assert recipe.run.seed == 2


def test_explain_names_the_origin_of_every_key(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, MINIMAL + "neftune: null\n")
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


def test_explain_after_a_section_is_replaced(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, MINIMAL + "neftune: {alpha: 3}\nschedule: {name: linear, warmup: 5ba}\n")
    merged = merge_recipe(path, ["schedule={name: cosine}", "neftune=null"])
    rows = {row.key: (row.value, row.origin) for row in merged.keys}
    assert rows["schedule.name"] == ("cosine", "override")
    assert rows["schedule.warmup"] == ("50ba", "default")
    assert rows["neftune"] == (None, "override")


def test_explain_shows_wrong_values_as_they_were_given(minimal_recipe: Path) -> None:
    rows = {row.key: row.value for row in merge_recipe(minimal_recipe, ["run.seed=soon"]).keys}
    assert rows["run.seed"] == "soon"


FREE_FORM_VALUES = st.recursive(
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
@given(options=st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), FREE_FORM_VALUES, max_size=4))
def test_free_mappings_survive_writing_and_reading(
    options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("recipe")
    recipe = load_recipe(write_recipe(folder))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, config_overrides=options))
    assert load_recipe(write_recipe(folder, recipe_to_yaml(recipe), "resolved.yaml")) == recipe


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
def test_resolved_recipe_is_equal_and_causes_no_warning(minimal_recipe: Path, overrides: list[str]) -> None:
    recipe = load_recipe(minimal_recipe, overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_recipe(write_recipe(minimal_recipe.parent, recipe_to_yaml(recipe), "resolved.yaml")) == recipe


def test_recipes_do_not_share_mappings(minimal_recipe: Path) -> None:
    first, second = load_recipe(minimal_recipe), load_recipe(minimal_recipe)
    first.model.config_overrides["a"] = 1
    assert second.model.config_overrides == {} == load_recipe(minimal_recipe).model.config_overrides
