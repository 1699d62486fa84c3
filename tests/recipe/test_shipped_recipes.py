"""The recipes in yamls/: complete, explained, free of warnings, and true to the published settings."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest
from omegaconf import OmegaConf
from support.recipes import PUBLISHED, SCHEMA, YAMLS, write_recipe

from rankllm_composer.options import FOR_PASSAGES
from rankllm_composer.recipe.checks import check_world, without_effect
from rankllm_composer.recipe.load import load_recipe, merge_recipe, recipe_to_yaml


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_recipe_loads_without_problems_or_warnings(path: Path) -> None:
    merged = merge_recipe(path)
    assert merged.problems == []
    assert merged.warnings == []
    assert merged.recipe.run.name == path.stem


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_recipe_sets_every_key_it_uses(path: Path) -> None:
    unset = {row.key for row in merge_recipe(path).keys if row.origin == "default"}
    recipe = load_recipe(path)
    unset -= set(without_effect(recipe))
    for section, split in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        if split is not None and split.source is not None:
            other_kind = ("input",) if split.source.run else ("run", "judgments", "teacher_run", "queries", "docs")
            unset -= {f"{section}.source.{name}" for name in other_kind}
            if split.source.input:  # for queries with graded passages only; these are conversations
                unset -= {f"{section}.source.{name}" for name in FOR_PASSAGES}
    assert unset == set()


def test_keys_without_effect() -> None:
    """Keys that the published recipes do not need to set."""
    from_run = {"stride", "lists_per_query", "depth", "require_relevant", "duplicates"}
    from_run = {f"data.train.source.{name}" for name in from_run}
    names = ("ranking_weight", "ranking_loss", "ranking_loss_options", "unjudged")
    ranking = {f"objective.{name}" for name in names}
    first, zephyr = (load_recipe(path) for path in PUBLISHED)
    assert set(without_effect(first)) == {"data.eval", "checkpoint.export.merge_lora", *from_run}
    assert set(without_effect(zephyr)) == {*without_effect(first), *ranking}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_recipe_has_a_header_and_a_comment_per_key(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header = text[: text.index("\nrun:")]
    for word in ("Launch", "Hardware", "Numbers", "Tested"):
        assert f"# {word}" in header, word
    for line in text[len(header) :].splitlines():
        is_section = line.rstrip().endswith(":")
        assert not line.strip() or is_section or re.search(r"\S\s+# \S", line), f"no comment: {line}"
        assert len(line) <= 120


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_resolved_recipe_reads_back_unchanged(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    again = write_recipe(tmp_path, recipe_to_yaml(recipe))
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
    assert recipe.objective.ranking_factor == 10.0
    assert recipe.objective.ranking_loss_options == ({"weighted": True} if objective == "combined" else {})
    check_world(recipe, 8)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_recipe_conforms_to_the_schema_in_its_first_line(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    jsonschema.validate(OmegaConf.to_container(OmegaConf.load(path)), SCHEMA)
