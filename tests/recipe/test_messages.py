"""Error messages about unreadable recipes, unknown keys and wrong values."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recipes import MINIMAL, problems, write_recipe

from rankllm_composer.errors import RecipeError
from rankllm_composer.recipe import names
from rankllm_composer.recipe.keys import describe_keys, find_key
from rankllm_composer.recipe.load import RecipeWarning, load_recipe, merge_recipe


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    path = write_recipe(
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
    assert "optimizer.lr is 'fast'; expected a number above 0." in message
    assert "objective.ranking_loss is 'ranknett';" in message and "Did you mean ranknet?" in message


@pytest.mark.parametrize(
    "override, meant",
    [
        ("objetive.name=ranking", "objective"),
        ("objective.nmae=ranking", "objective.name"),
        ("data.train.shufle=false", "data.train.shuffle"),
        ("data.train.source.inptu=x.json", "data.train.source.input"),
        ("model.lora.rnk=4", "model.lora.rank"),
        ("lora={rank: 4}", "model.lora.rank"),
        ("optim.lr=3", "optimizer"),
        ("lr=4", "optimizer.lr"),
        ("global_lists=4", "batch.global_lists"),
        ("logging.loggers.tensorbord={}", "logging.loggers.tensorboard"),
        ("checkpoint.export.intervall=2ep", "checkpoint.export.interval"),
        ("interval=2ep", "checkpoint.interval, checkpoint.export.interval or evaluation.interval"),
        ("data.train.source.qrels=a", "data.train.source.judgments"),
        ("learning_rate=1e-5", "optimizer.lr"),
        ("optimizer.learning_rate=1e-5", "optimizer.lr"),
        ("trainer.learningRate=1e-5", "optimizer.lr"),
        ("lerning_rate=1e-5", "optimizer.lr"),
        ("batch_size=64", "batch.global_lists"),
        ("per-device-train-batch-size=2", "batch.microbatch_lists"),
        ("epochs=3", "run.max_duration=3ep"),
        ("epochs=many", "run.max_duration"),
        ("warmup_ratio=0.1", "schedule.warmup=0.1dur"),
        ("fp16=true", "parallelism.precision=amp_bf16"),
        ("model.lora_r=8", "model.lora.rank"),
        ("global_train_batch_size=512", "batch.global_lists"),
        ("data.eval.source.dataset_name=x", "data.eval.source.input"),
    ],
)
def test_unknown_keys_suggest_the_nearest_key(minimal_recipe: Path, override: str, meant: str) -> None:
    remedies = [problem.remedy for problem in merge_recipe(minimal_recipe, [override]).problems]
    assert f"Did you mean {meant}?" in remedies and (len(remedies) == 1 or ".source." in override)


def test_keys_of_other_trainers_stand_for_keys_that_exist(minimal_recipe: Path) -> None:
    for name, meant in names.KEYS.items():
        assert name not in {row.name.rpartition(".")[2] for row in describe_keys() if row.name != meant}, name
        key, equals, _ = meant.partition("=")
        assert find_key(key.split(".")) is not None, name
        if equals:
            value = "0.5" if meant.endswith("dur") else "1"
            problems = merge_recipe(minimal_recipe, [meant.format(value)]).problems
            assert key not in {problem.key for problem in problems}, name


def test_unknown_key_in_a_stream(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, MINIMAL.replace("local: shards", "streams: [{local: a}, {lokal: b}]"))
    found = problems(path)
    assert found["data.train.streams[1].lokal"].remedy == "Did you mean data.train.streams[1].local?"
    assert found["data.train.streams[1].local"].found == "missing"


@pytest.mark.parametrize(
    "override, key, found, expected",
    [
        ("run.seed=-1", "run.seed", "-1", "a whole number of at least 0 and at most 2147483647"),
        ("run.seed=1.5", "run.seed", "1.5", "a whole number of at least 0 and at most 2147483647"),
        ("run.seed=true", "run.seed", "true", "a whole number of at least 0 and at most 2147483647"),
        ("run.seed=null", "run.seed", "null", "a whole number of at least 0 and at most 2147483647"),
        ("optimizer.lr=.inf", "optimizer.lr", "inf", "a number above 0"),
        ("optimizer.lr=.nan", "optimizer.lr", "nan", "a number above 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas", "[0.9]", "a list of 2, each a number of at least 0 and below 1"),
        ("optimizer.betas=0.9", "optimizer.betas", "0.9", "a list of 2, each a number of at least 0 and below 1"),
        ("model.compile=1", "model.compile", "1", "true or false"),
        ("model.compile=perhaps", "model.compile", "'perhaps'", "true or false"),
        ("model.config_overrides=3", "model.config_overrides", "3", "a mapping"),
        (
            "model.activation_checkpointing=1.1",
            "model.activation_checkpointing",
            "1.1",
            "a number of at least 0 and at most 1",
        ),
        ("run=3", "run", "3", "a section"),
        ("model.lora=true", "model.lora", "true", "a section, or null"),
        ("data.train.streams=x", "data.train.streams", "'x'", "a list, each a section"),
        ("data.train.streams=[x]", "data.train.streams[0]", "'x'", "a section"),
        ("data.train.cache_limit=lots", "data.train.cache_limit", "'lots'", "text such as 100gb, or null"),
        ("run.max_duration=0ep", "run.max_duration", "'0ep'", "text such as 3ep, 50ba or 4000sp"),
        ("schedule.warmup=50", "schedule.warmup", "'50'", "text such as 3ep, 50ba, 4000sp or 0.1dur"),
        ("schedule.name=cosin", "schedule.name", "'cosin'", "one of cosine, linear, constant"),
        ("parallelism.mixed_precision=pure", "parallelism.mixed_precision", "'pure'", "one of DEFAULT, PURE, FULL"),
        (
            "evaluation.decodings=[greedy]",
            "evaluation.decodings",
            "'greedy'",
            "a list, each one of first_token, generation",
        ),
        ("run.name=a b", "run.name", "'a b'", "text such as first_mistral"),
        ("run.name=", "run.name", "null", "text such as first_mistral"),
        ("logging.loggers.wandb=3", "logging.loggers.wandb", "3", "a mapping, or null"),
        ("logging.loggers=3", "logging.loggers", "3", "a mapping of tensorboard, wandb, mlflow to arguments"),
        (
            "data.train.source.depth=2000000",
            "data.train.source.depth",
            "2000000",
            "a whole number of at least 2 and at most 1000000",
        ),
    ],
)
def test_wrong_values(minimal_recipe: Path, override: str, key: str, found: str, expected: str) -> None:
    problem = problems(minimal_recipe, override)[key]
    assert (problem.found, problem.expected) == (found, expected)
    assert problem.remedy


@pytest.mark.parametrize("row", [row for row in describe_keys() if "[]" not in row.name], ids=lambda row: row.name)
def test_every_key_rejects_values_of_another_type(row: Any, minimal_recipe: Path) -> None:
    """Keys of mappings and sections get text; all other keys get a mapping."""
    accepts_mapping = "mapping" in row.expected or row.expected.startswith("a section")
    override = f"{row.name}=x" if accepts_mapping else f"{row.name}={{x: 1}}"
    override = f"{row.name}=[x]" if "or its keys" in row.expected else override
    assert row.name in problems(minimal_recipe, override)


def test_a_yaml_number_for_a_text_key_suggests_quotes(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, MINIMAL.replace("{name_or_path: some/model}", "{name_or_path: m, revision: 1e5}"))
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
def test_unreadable_overrides(minimal_recipe: Path, override: str, remedy: str) -> None:
    assert problems(minimal_recipe, override)[override].remedy == remedy


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
def test_invalid_files_are_rejected_and_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path, text))
    assert found in caught.value.problems[0].found
    assert not Path("made").exists()


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="recipe is not a file"):
        load_recipe(tmp_path / "absent.yaml")
    assert {"run.name", "model.name_or_path", "optimizer.lr"} <= set(problems(write_recipe(tmp_path, "")))


@pytest.mark.parametrize(
    "override", ["run.folder=${run.nothing}", "run.folder=${run.folder}", "run.folder=${oc.env:NOT_SET_ANYWHERE}"]
)
def test_references_that_cannot_be_resolved(minimal_recipe: Path, override: str) -> None:
    (problem,) = merge_recipe(minimal_recipe, [override]).problems
    assert problem.key == "run.folder"
    assert problem.found.startswith("'${")


def test_secrets_do_not_appear_in_messages(minimal_recipe: Path) -> None:
    overrides = ["data.train.remote='s3://key:hushhush@host/set'", "logging.loggers={wandb: {api_key: hushhush}}"]
    with pytest.raises(RecipeError) as raised:
        load_recipe(minimal_recipe, overrides)
    assert str(raised.value).count("give it where its client looks for it") == 2
    assert "hushhush" not in str(raised.value)


def test_a_secret_from_the_environment_is_rejected(minimal_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    (problem,) = merge_recipe(minimal_recipe, ["run.name=${oc.env:WANDB_API_KEY}"]).problems
    assert (problem.key, problem.found) == ("run.name", "a value that looks like a secret")


RECIPE_LINES = st.lists(
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
@given(lines=RECIPE_LINES, overrides=st.lists(st.text(max_size=20), max_size=2))
def test_any_file_loads_or_raises_recipe_error(
    lines: list[str], overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_recipe(tmp_path_factory.mktemp("any"), "\n".join(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecipeWarning)
        try:
            assert load_recipe(path, overrides).run.name
        except RecipeError as error:
            assert str(path) in str(error)


def test_omegaconf_missing_values_are_reported_as_missing(minimal_recipe: Path) -> None:
    assert problems(minimal_recipe, "run.name=???")["run.name"].found == "missing"
