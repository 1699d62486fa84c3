"""`recipes check` finds what a run would refuse before its first batch, in the words of the run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.recipes import write_recipe
from support.small_run import mark_trained

from rankllm_composer import cli
from rankllm_composer.errors import RankLLMComposerError, RecipeError
from rankllm_composer.model.objective import find_loss
from rankllm_composer.options import SourceOptions
from rankllm_composer.preflight.refusals import find_refusals
from rankllm_composer.recipe.load import load_recipe, recipe_to_yaml
from rankllm_composer.shards.build import build_shards
from rankllm_composer.train import train
from rankllm_composer.training.folders import recipe_of_checkpoints
from rankllm_composer.training.run import claim_run_folder, prepare_shards

Found = Callable[..., dict[str, str]]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that can be trained, as far as its folders are concerned."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").write_text('{"shards": []}')
    path = write_recipe(tmp_path)
    folders = f"run: {{name: small, folder: {tmp_path / 'run'}}}"
    text = path.read_text().replace("run: {name: small}", folders)
    path.write_text(text.replace("local: shards", f"local: {tmp_path / 'shards'}"))
    return path


@pytest.fixture
def found(recipe: Path, capsys: pytest.CaptureFixture[str]) -> Found:
    """Run `recipes check --json`; return the messages of its problems by key."""

    def check(*overrides: str) -> dict[str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(["recipes", "check", str(recipe), "--json", *overrides])
        value = json.loads(capsys.readouterr().out)
        assert value["ok"] == (not value["problems"]) == (not stop.value.code)
        return {problem["key"]: problem["message"] for problem in value["problems"]}

    return check


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(RankLLMComposerError) as error:
        action()
    return str(error.value)


def test_packages_that_are_not_installed(recipe: Path, found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {
        "logging.loggers.wandb": ("wandb", "logging.loggers={wandb: {}, tensorboard: {}}", "`loggers` extra"),
        "logging.loggers.tensorboard": ("tensorboard", "schedule.name=constant", "remove logging.loggers.tensorboard."),
        "optimizer.name": ("bitsandbytes", "optimizer.name=adamw_8bit", "`bitsandbytes` extra, or use adamw."),
        "model.lora": ("peft", "model.lora={}", "`lora` extra, or set model.lora: null."),
        "model.attention": ("flash_attn", "model.attention=flash_attention_2", "Install flash-attn, or use auto"),
        "data.train.source.run": (
            "ir_datasets",
            "data.train.source={run: 'irds:a/b', judgments: 'irds:a/b', queries: 'irds:a/b', docs: 'irds:a/b'}",
            "Install the `irds` extra, or give files.",
        ),
    }
    overrides = [override for _, override, _ in needed.values()] + ["parallelism.fsdp=false"]
    for module, _, _ in needed.values():
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    messages = found(*overrides)
    others = {f"data.train.source.{name}" for name in ("judgments", "queries", "docs")}
    assert set(messages) == set(needed) | others
    for key, (module, _, remedy) in needed.items():
        assert f"which needs the package {module}; expected it to be installed. " in messages[key]
        assert remedy in messages[key]
    with pytest.raises(RecipeError) as error:
        train(load_recipe(recipe, overrides))
    assert {problem.key: str(problem) for problem in error.value.problems} == messages
    assert not (recipe.parent / "run").exists()
    for module, _, _ in needed.values():
        monkeypatch.setitem(sys.modules, module, type(sys)(module))
        monkeypatch.setattr(sys.modules[module], "__spec__", sys.__spec__)
    assert found(*overrides) == {}


def test_a_loss_of_the_users_own(found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checked_losses.py").write_text(
        "number = 1\ndef mine(scores, ranks, *, mask, reduction, grades, scale=1.0): ...\ndef other(scores): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loss = "objective.ranking_loss"
    assert found(f"{loss}=checked_losses:mine", "objective.ranking_loss_options={scale: 2}") == {}
    for name in ("no_such_module_here:loss", "checked_losses:none", "checked_losses:number"):
        assert found(f"{loss}={name}") == {loss: refused(lambda name=name: find_loss(name))}
    assert "cannot be called with (scores, ranks, mask=, reduction=)" in found(f"{loss}=checked_losses:other")[loss]
    assert "'depth'" in found(f"{loss}=checked_losses:mine", "objective.ranking_loss_options={depth: 2}")[loss]
    del sys.modules["checked_losses"]


def test_an_adapter_to_start_from(found: Found, tmp_path: Path) -> None:
    folder, key = tmp_path / "adapter", "model.lora.start_from"
    assert "cannot be read" in found(f"model.lora={{start_from: {folder}}}")[key]
    folder.mkdir()
    written = {"r": 8, "lora_alpha": 32, "target_modules": ["v_proj", "q_proj"], "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    given = f"model.lora={{start_from: {folder}, target_modules: [q_proj, v_proj], rank: %d}}"
    assert "adapter_model.safetensors. Export it with --adapter-only." in found(given % 8)[key]
    (folder / "adapter_model.safetensors").touch()
    assert found(given % 8) == {}
    assert found(given % 8, "model.lora.target_modules=[all-linear]") == {}
    message = found(given % 4)[key]
    assert message.endswith(f"{folder} has rank 8; the recipe has 4. Set 'model.lora.rank=8'.")
    assert found(given % 4, "model.lora.rank=8") == {}  # the remedy


def test_an_empty_variable_leaves_the_messages_readable(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", "")
    message = found("logging.loggers={wandb: {project: '${oc.env:EMPTY}'}}", "objective.ranking_loss=nowhere:loss")
    assert "'nowhere:loss', which cannot be imported" in message["objective.ranking_loss"]


def test_folders_of_another_run(recipe: Path, found: Found, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before, after = (recipe_to_yaml(load_recipe(recipe, [f"optimizer.lr={lr}"])) for lr in (1, 2))
    with claim_run_folder(run, before):
        pass
    assert found("optimizer.lr=2") == {}  # nothing was trained
    mark_trained(run)
    (run / "hf" / "epoch_0").rename(run / "hf" / "best-of-all")  # no name that a run would write

    def claim() -> None:
        with claim_run_folder(run, after):
            pass

    assert found("optimizer.lr=1") == {}
    assert found("optimizer.lr=2") == {"run.folder": refused(claim)}
    assert found("optimizer.lr=2", "run.accept_changes=[optimizer.lr]") == {}

    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "recipe.yaml").write_text(before.replace("seed: 17", "seed: 3"))
    elsewhere = (f"run.folder={tmp_path / 'new'}", f"checkpoint.folder={checkpoints}")
    assert found(*elsewhere, "optimizer.lr=2") == {}
    mark_trained(tmp_path / "new")
    assert "epoch_0 is the export of another run" in found(*elsewhere)["checkpoint.export.folder"]
    with pytest.raises(RankLLMComposerError, match="holds a run of another recipe"):
        recipe_of_checkpoints(checkpoints, after, lambda _: 3)

    (tmp_path / "file").touch()
    blocked = load_recipe(recipe, [f"run.folder={tmp_path / 'file' / 'run'}"])
    with pytest.raises(RankLLMComposerError) as error, claim_run_folder(Path(blocked.run_folder), before):
        pass
    assert found(f"run.folder={blocked.run_folder}") == {"run.folder": str(error.value)}


def test_shards_of_another_source(recipe: Path, tmp_path: Path) -> None:
    records, shards = Path(__file__).parents[1] / "golden" / "records.json", tmp_path / "built"
    build_shards(shards, SourceOptions(input=str(records)))
    named = [f"data.train.local={shards}", f"data.train.source={{input: {records}}}"]
    assert [*find_refusals(load_recipe(recipe, named))] == []
    other = load_recipe(recipe, [*named, "data.train.source.on_error=quarantine"])
    (problem,) = find_refusals(other)
    assert problem.key == "data.train.source"
    assert str(problem) == refused(lambda: prepare_shards(other.data.train, "data.train"))
