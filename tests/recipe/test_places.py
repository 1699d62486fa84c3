"""Paths, names and arguments of a recipe: expanded, kept out of files where they come from the environment, checked."""

from __future__ import annotations

import copy
import inspect
import pickle
import shlex
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support.recipes import problems

from rankllm_composer import cli
from rankllm_composer.environment import FromEnvironment, as_written, expand_path
from rankllm_composer.errors import shell_line
from rankllm_composer.options import SourceOptions
from rankllm_composer.recipe.bundled import recipe_path
from rankllm_composer.recipe.keys import describe_keys
from rankllm_composer.recipe.load import load_recipe, recipe_to_yaml
from rankllm_composer.recipe.places import ARGUMENTS, LISTED_SCHEMES, READ_SCHEMES
from rankllm_composer.recipe.resume import check_same_recipe

HOME = "/home/of a user"
SECRET = "pin7"
READ = "data.prompt_template"  # what its file holds takes its place, see test_prompt_of_recipe.py
PATH_KEYS = [row.name for row in describe_keys() if ("path" in row.unit or row.unit == "URL") and row.name != READ]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", HOME)
    monkeypatch.setenv("COLOR", SECRET)  # short, and innocently named
    monkeypatch.delenv("ABSENT", raising=False)


def override(key: str, value: str) -> list[str]:
    """Overrides that set a key of a path, with the sections that it needs."""
    needed = {
        "data.train.source": ["data.train.source={run: r, judgments: j, queries: q, docs: d}"],
        "data.eval.": ["data.eval={local: x}", "evaluation={}"],
        "data.train.streams": ["data.train={streams: [{local: x}]}"],
        "data.eval.streams": ["data.eval={streams: [{local: x}]}"],
        "data.eval.source": ["data.eval={local: x, source: {run: r, judgments: j, queries: q, docs: d}}"],
    }
    sections = [given for section, given in needed.items() if key.startswith(section)]
    if key.endswith("source.input"):
        sections.append([f"{key.removesuffix('.input')}={{input: x}}"])
    return [*(text for given in sections for text in given), f"{key.replace('[]', '.0')}='{value}'"]


def value_of(recipe: object, key: str) -> str:
    for step in key.replace("[]", ".0").split("."):
        recipe = recipe[int(step)] if step.isdigit() else getattr(recipe, step)  # type: ignore[index]
    assert isinstance(recipe, str)
    return recipe


@pytest.mark.filterwarnings("ignore::rankllm_composer.recipe.load.RecipeWarning")
@pytest.mark.parametrize("key", PATH_KEYS)
def test_home_is_expanded_in_every_path(minimal_recipe: Path, key: str) -> None:
    for written in ("~/x", "$HOME/x", "${HOME}/x"):
        recipe = load_recipe(minimal_recipe, override(key, written))
        assert value_of(recipe, key) == f"{HOME}/x"
    assert f"{HOME}/x" in recipe_to_yaml(load_recipe(minimal_recipe, override(key, "~/x")))


@pytest.mark.filterwarnings("ignore::rankllm_composer.recipe.load.RecipeWarning")
@pytest.mark.parametrize("key", PATH_KEYS)
def test_unset_variables_and_homes_are_refused_in_every_path(minimal_recipe: Path, key: str) -> None:
    shown = key.replace("[]", "[0]")
    found = problems(minimal_recipe, *override(key, "$ABSENT/x"))[shown]
    assert str(found) == (
        f"{shown} is '$ABSENT/x'; expected a path; ABSENT is not set. Set ABSENT, or correct the path."
    )
    assert "no such home folder" in problems(minimal_recipe, *override(key, "~nobody-here/x"))[shown].expected


@pytest.mark.filterwarnings("ignore::rankllm_composer.recipe.load.RecipeWarning")
@pytest.mark.parametrize(
    "key, written, value",
    [
        *[(key, "${oc.env:COLOR}/x", f"{SECRET}/x") for key in PATH_KEYS],
        ("run.folder", "$COLOR/x", f"{SECRET}/x"),
        ("run.folder", "${COLOR}/x", f"{SECRET}/x"),
        ("run.folder", "${oc.env:COLOR,other}/${run.name}", f"{SECRET}/small"),
        ("checkpoint.folder", "${run.folder}/c", f"{SECRET}/c"),
        ("model.revision", "${oc.env:COLOR}", SECRET),
        ("logging.loggers.wandb.project", "p-${oc.env:COLOR}", f"p-{SECRET}"),
        ("logging.loggers.mlflow.tags", "{a: ['${oc.env:COLOR}']}", {"a": [SECRET]}),
        ("model.config_overrides.x", "${oc.env:COLOR}", SECRET),
    ],
)
def test_the_environment_is_written_as_a_reference(
    minimal_recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    written: str,
    value: object,
) -> None:
    given = override(key, written) if isinstance(value, str) else [f"{key}={written}"]
    if key == "checkpoint.folder" and "run.folder" in written:
        given.append("run.folder='${oc.env:COLOR}'")
    recipe = load_recipe(minimal_recipe, given)
    text = recipe_to_yaml(recipe)
    assert SECRET not in text and "${oc.env:COLOR}" in text
    again = minimal_recipe.with_name("again.yaml")
    again.write_text(text)
    assert load_recipe(again) == recipe and recipe_to_yaml(load_recipe(again)) == text
    assert check_same_recipe(text, text, "here") == text
    if isinstance(value, str) and key in PATH_KEYS:
        assert value_of(recipe, key) == value
    with pytest.raises(SystemExit):
        cli.main(["recipes", "check", str(minimal_recipe), *given])
    output = capsys.readouterr()
    assert SECRET not in output.out + output.err and "${oc.env:COLOR}" in output.out
    monkeypatch.delenv("COLOR")
    assert "Set the variable" not in text
    if ",other" not in written:
        found = [problem.remedy for problem in problems(again).values() if "COLOR" in problem.found]
        assert found and set(found) == {"Correct it, or set the variable."}


def test_a_secret_by_reference_is_no_secret_in_the_recipe(minimal_recipe: Path) -> None:
    """The remedy that the message about a secret names."""
    secret = problems(minimal_recipe, "logging.loggers={wandb: {init_kwargs: {api_key: word}}}")
    (found,) = secret.values()
    assert found.found == "a value that looks like a secret" and "write ${oc.env:NAME} instead" in found.remedy
    assert problems(minimal_recipe, "logging.loggers={wandb: {init_kwargs: {api_key: '${oc.env:COLOR}'}}}") == {}


def test_text_of_the_environment_survives_copies() -> None:
    text = FromEnvironment("value", "${oc.env:X}")
    for again in (copy.deepcopy(text), pickle.loads(pickle.dumps(text)), SourceOptions(input=text).input):
        assert again == "value" and as_written(again) == "${oc.env:X}"
    assert as_written(expand_path("$COLOR/x")) == "${oc.env:COLOR}/x"
    assert as_written("plain") == "plain" and expand_path(None) is None


@pytest.mark.parametrize("name", ["..", ".", "...", ".hidden", "-n", "a/b", "../a", "a b", "", "a\\b"])
def test_names_that_are_no_folder_of_their_own_are_refused(minimal_recipe: Path, name: str) -> None:
    assert "run.name" in problems(minimal_recipe, f"run.name='{name}'")


@pytest.mark.parametrize(
    "overrides, key, remedy",
    [
        (["run.folder=s3://b/run"], "run.folder", "checkpoint.folder for copies"),
        (["checkpoint.export.folder=s3://b/hf"], "checkpoint.export.folder", "upload it when the run has ended"),
        (["data.train.local=s3://b/set"], "data.train.local", "Name the URL in remote"),
        (["model.name_or_path=s3://b/model"], "model.name_or_path", "Download it"),
        (["data.train.remote=ftp://b/set"], "data.train.remote", "Use one of these stores"),
        (["checkpoint.folder=https://b/run"], "checkpoint.folder", "Use one of these stores"),
        (["run.seed=4294967296"], "run.seed", "Correct it"),
        (["data.train.source.seed=4294967296"], "data.train.source.seed", "Correct it"),
        (["logging.loggers={wandb: {projet: x}}"], "logging.loggers.wandb.projet", "Did you mean project?"),
        (
            ["logging.loggers={tensorboard: {flush_interval: 0}}"],
            "logging.loggers.tensorboard.flush_interval",
            "Correct",
        ),
        (["logging.loggers={mlflow: {tags: x}}"], "logging.loggers.mlflow.tags", "Correct"),
        (["logging.callbacks={lr_monitor: {x: 1}}"], "logging.callbacks.lr_monitor.x", "Remove it"),
        (
            ["logging.callbacks={optimizer_monitor: {batch_log_interval: 0}}"],
            "logging.callbacks.optimizer_monitor.batch_log_interval",
            "Correct",
        ),
        (
            ["logging.callbacks={speed_monitor: {time_unit: weeks}}"],
            "logging.callbacks.speed_monitor.time_unit",
            "Choose one",
        ),
    ],
)
def test_check_refuses_what_no_run_could_open_or_call(
    minimal_recipe: Path, overrides: list[str], key: str, remedy: str
) -> None:
    assert remedy in problems(minimal_recipe, *overrides)[key].remedy


@pytest.mark.parametrize(
    "override",
    [
        "data.train.remote=s3://b/set",
        "data.train.remote=/a/folder",
        "checkpoint.folder=gs://b/run",
        "logging.loggers={tensorboard: {log_dir: ~/tb, flush_interval: 5}, wandb: {tags: [a], init_kwargs: {mode: x}}}",
        "logging.callbacks={speed_monitor: {window_size: 2, gpu_flops_available: 1.0e+12, time_unit: hours}}",
        "run.seed=2147483647",
    ],
)
def test_what_a_run_takes_is_accepted(minimal_recipe: Path, override: str) -> None:
    assert problems(minimal_recipe, override) == {}


def test_arguments_and_stores_are_those_of_composer_and_streaming() -> None:
    from streaming.base.storage.download import DOWNLOADER_MAPPINGS

    from rankllm_composer.training.loggers import CALLBACKS, LOGGERS

    for section, classes in (("loggers", LOGGERS), ("callbacks", CALLBACKS)):
        assert set(classes) == set(ARGUMENTS[section])
        for name, kind in classes.items():
            parameters = inspect.signature(kind).parameters.values()
            names = [parameter.name for parameter in parameters if "VAR" not in parameter.kind.name]
            assert list(ARGUMENTS[section][name]) == names, name
    assert set(READ_SCHEMES) == {scheme for scheme in DOWNLOADER_MAPPINGS if scheme}
    assert set(LISTED_SCHEMES) <= set(READ_SCHEMES)


def test_flags_and_recipe_files_are_expanded(minimal_recipe: Path) -> None:
    expanded = [cli._expand(text) for text in ("~/a", "--model=~/a", "$HOME/a", "run.folder=~/a", "--lists", "a=b")]
    assert expanded == [f"{HOME}/a", f"--model={HOME}/a", f"{HOME}/a", "run.folder=~/a", "--lists", "a=b"]
    assert recipe_path("~/a.yaml") == Path(f"{HOME}/a.yaml")


@pytest.mark.parametrize("place", ["plain/folder", "with space", "quote's", "$HOME; rm -rf", "s3://b/x?y&z", "(a)"])
def test_printed_commands_reach_the_program_as_they_were_meant(place: str) -> None:
    words = ["printf", "%s\n", "shards", "verify", place]
    done = subprocess.run(["bash", "-c", shell_line(*words)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == words[2:]
    assert shlex.split(shell_line("--input", "RECORDS")) == shell_line("--input", "RECORDS").split()


def test_omegaconf_has_no_resolver_of_ours_but_one() -> None:
    assert OmegaConf.has_resolver("rankllm_composer.env") and OmegaConf.has_resolver("oc.env")
