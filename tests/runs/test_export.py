"""`rankllm-composer export` turns a checkpoint into the same folder that the run exported at that step."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.exporting import run_in_a_child
from support.launching import succeeded, train
from support.small_run import RECIPE, small_run

from rankllm_composer.cli import main
from rankllm_composer.export import model_folder
from rankllm_composer.export.weights import read_checkpoint_weights
from rankllm_composer.prompts.contract import read_contract
from rankllm_composer.training.checkpoint_callback import UNSHARDED_FILE
from rankllm_composer.training.export_run import export_run

LORA = "model.lora={rank: 4, alpha: 8, target_modules: [q_proj, v_proj], frozen_precision: fp32}"
NAMES = ("ep1-ba6", "ep2-ba12")
CASES = {
    "one file": (1, ["parallelism.fsdp=false"]),
    "sharded": (2, ["parallelism.fsdp=true"]),
    "merged LoRA": (1, ["parallelism.fsdp=false", LORA]),
    "LoRA adapter": (2, ["parallelism.fsdp=true", LORA, "checkpoint.export.merge_lora=false"]),
}


def run_case(name: str, folder: Path, tokenizer_folder: Path) -> Path:
    """Train two epochs of 6 batches, with a checkpoint and an export per epoch; returns the folder of the run."""
    ranks, overrides = CASES[name]
    overlay = [*small_run(folder, tokenizer_folder), "run.folder=run", "checkpoint.interval=1ep"]
    overlay = [text for text in overlay if text != "checkpoint.export=null"]
    succeeded(train(RECIPE, *overlay, *overrides, folder=folder, ranks=ranks))
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory, mistral_v3_folder) -> Path:
    return run_case("one file", tmp_path_factory.mktemp("run"), mistral_v3_folder)


def assert_same_model(exported: Path, expected: Path) -> None:
    """Check that tensors, contract and all other files except the model card are equal."""
    files = {path.name for path in expected.iterdir()}
    assert {path.name for path in exported.iterdir()} == files
    (weights,) = (name for name in files if name.endswith(".safetensors"))
    found, wanted = load_file(exported / weights), load_file(expected / weights)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert read_contract(exported) == read_contract(expected)
    if "adapter_config.json" in files:  # PEFT writes a set in any order
        ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (exported, expected))
        assert sorted(ours.pop("target_modules")) == sorted(theirs.pop("target_modules"))
        assert ours == theirs
    for name in files - {weights, "README.md", "adapter_config.json", "export.json"}:
        assert (exported / name).read_bytes() == (expected / name).read_bytes(), name


def without_progress(card: Path) -> list[str]:
    return [line for line in card.read_text().splitlines() if not line.startswith("Weights: ")]


def test_the_newest_or_a_named_checkpoint_is_exported(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    for arguments, export, name in ((["--checkpoint", "ep1-ba6"], "epoch_0", "ep1-ba6"), ([], "epoch_1", "ep2-ba12")):
        with pytest.raises(SystemExit) as ended:  # the second replaces what the first wrote
            main(["export", "run", *arguments, "--output", str(tmp_path / "m")])
        assert not ended.value.code
        assert f"exported checkpoint {name} of run" in capsys.readouterr().out
        assert_same_model(tmp_path / "m", run / "hf" / export)
        card = tmp_path / "m" / "README.md"
        assert f"Weights: checkpoint {name} (after " in card.read_text()
        assert without_progress(card) == without_progress(run / "hf" / export / "README.md")


def test_the_mean_of_checkpoints_is_exported(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    with pytest.raises(SystemExit) as ended:
        main(["export", "run", "--average", "2", "--output", str(tmp_path / "m")])
    assert not ended.value.code
    assert "exported the mean of the checkpoints ep1-ba6, ep2-ba12 of run" in capsys.readouterr().out
    assert "mean of the checkpoints ep1-ba6, ep2-ba12 (after 12 batches)" in (tmp_path / "m" / "README.md").read_text()
    first, second = (read_checkpoint_weights(run / "checkpoints" / name / UNSHARDED_FILE) for name in NAMES)
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert found and not all(torch.equal(first[name], second[name]) for name in found)
    for name, tensor in found.items():
        expected = ((first[name].double() + second[name].double()) / 2).float()
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    with pytest.raises(SystemExit) as ended:
        main(["export", "run", "--average", "3", "--output", str(tmp_path / "n")])
    assert ended.value.code == 2 and not (tmp_path / "n").exists()
    assert "has 2 complete checkpoints up to ep2-ba12; expected 3. Average fewer" in capsys.readouterr().err


def export_and_die(run: Path, output: Path) -> None:
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    model_folder._write_rest = die
    export_run(run, output)


def test_a_killed_export_can_be_rerun(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    output = tmp_path / "m"
    assert run_in_a_child(export_and_die, run, output) == -signal.SIGKILL
    assert not output.exists() and list(tmp_path.iterdir())
    export_run(run, output)
    assert list(tmp_path.iterdir()) == [output]
    assert_same_model(output, run / "hf" / "epoch_1")


def test_without_data_the_contract_comes_from_an_earlier_export(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    (run.parent / "shards").rename(run.parent / "elsewhere")
    try:
        export_run(run, tmp_path / "m")
    finally:
        (run.parent / "elsewhere").rename(run.parent / "shards")
    assert_same_model(tmp_path / "m", run / "hf" / "epoch_1")
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| lists trained | 48 in epochs of 24; 0 too long in the last epoch |" in card


def test_errors_of_export(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    (run / "checkpoints" / "ep9-ba99").mkdir()
    for arguments, message in (
        ([tmp_path], f"{tmp_path} has no recipe.yaml; expected the folder of a run"),
        ([tmp_path / "empty"], "checkpoints has no complete checkpoint"),
        (["run", "--checkpoint", "ep1-ba7"], "ep1-ba7 does not exist; did you mean ep1-ba6?. Complete checkpoints: "),
        (["run", "--checkpoint", "latest"], "latest does not exist. Complete checkpoints: ep1-ba6, ep2-ba12"),
        (["run", "--checkpoint", "ep9-ba99"], "ep9-ba99 is incomplete"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["export", *map(str, arguments), "--output", str(tmp_path / "m")])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "one file"])
def test_sharded_and_adapter_checkpoints_are_exported(tmp_path, mistral_v3_folder, monkeypatch, name):
    run = run_case(name, tmp_path, mistral_v3_folder)
    monkeypatch.chdir(tmp_path)
    export_run(run, tmp_path / "m", "ep1-ba6")
    assert_same_model(tmp_path / "m", run / "hf" / "epoch_0")
