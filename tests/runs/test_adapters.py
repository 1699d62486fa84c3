"""A LoRA adapter exported apart: a second run trains it further; it is inspected, and merged before it is served."""

from __future__ import annotations

import shlex

import pytest
import torch
from safetensors.torch import load_file
from support import launching
from support.launching import metrics, succeeded
from support.small_run import RECIPE, small_run

from rankllm_composer.cli import main
from rankllm_composer.errors import ModelError
from rankllm_composer.model.loading import load_causal_lm
from rankllm_composer.options import ModelOptions
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.training.announcements import describe_outputs
from rankllm_composer.training.run import train

LORA = "model.lora={target_modules: [q_proj, gate_proj], rank: 2, dropout: 0, rslora: true"


def succeed(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


@pytest.mark.filterwarnings("ignore::rankllm_composer.recipe.load.RecipeWarning")
def test_an_adapter_is_trained_in_two_stages_and_merged(tmp_path, mistral_v3_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    overrides = small_run(tmp_path, mistral_v3_folder)
    overrides += ["run.max_duration=1ba", "schedule.warmup=0ba", "checkpoint.export={merge_lora: false}"]
    first = train(load_recipe(RECIPE, [*overrides, "run.folder=first", LORA + "}"]))
    further = ["run.folder=second", f"{LORA}, start_from: {first.best}}}", "optimizer.lr=1e-9"]
    recipe = load_recipe(RECIPE, [*overrides, *further])
    second = train(recipe)
    before, after = (load_file(run.best / "adapter_model.safetensors") for run in (first, second))
    assert before.keys() == after.keys() and len(before) == 8
    assert any(tensor.abs().max() > 1e-4 for name, tensor in before.items() if "lora_B" in name)  # they start at 0
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)

    capsys.readouterr()
    succeed("inspect", "--model", str(second.best))
    assert "<s>" in capsys.readouterr().out
    with pytest.raises(ModelError, match=r"is a LoRA adapter without the model .*--merge-lora.*start_from"):
        load_causal_lm(ModelOptions(name_or_path=str(second.best)))
    summary = describe_outputs(recipe, second.exports, second.best)
    assert (
        "serve it with rank_llm" not in summary
        and "cannot be served as it is" in (second.best / "README.md").read_text()
    )
    lines = [shlex.split(line) for line in summary.splitlines() if line.startswith("    rankllm-composer ")]
    assert [command for _, command, *_ in lines] == ["report", "export", "rerank"]
    for _, *command in lines[1:]:
        succeed(*command)
    merged = load_causal_lm(ModelOptions(name_or_path="second/merged"))
    base = load_causal_lm(ModelOptions(name_or_path=str(tmp_path / "base")))
    name = "model.layers.0.self_attn.q_proj"
    adapter = {key.rpartition(f"{name}.")[2]: tensor for key, tensor in after.items() if name in key}
    update = adapter["lora_B.weight"] @ adapter["lora_A.weight"] * 32 / 2**0.5  # alpha / sqrt(rank)
    expected = base.get_parameter(f"{name}.weight") + update
    torch.testing.assert_close(merged.get_parameter(f"{name}.weight"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_sharded_ranks_train_whole_modules_and_dora_like_one(tmp_path, mistral_v3_folder):
    """The second stage, which starts from the adapter that the first has exported."""
    overrides = small_run(tmp_path, mistral_v3_folder)
    keys = "target_modules: [q_proj, down_proj], modules_to_save: [norm], rank: 2, dropout: 0, dora: true"
    overrides += ["run.max_duration=2ba", "schedule.warmup=0ba", "checkpoint.export={merge_lora: false}"]
    succeeded(
        launching.train(RECIPE, *overrides, f"model.lora={{{keys}}}", "run.folder=first", folder=tmp_path, ranks=1)
    )
    further = [*overrides, f"model.lora={{{keys}, start_from: first/hf/batch_2}}"]
    for name, ranks in (("one", 1), ("two", 2)):
        succeeded(launching.train(RECIPE, *further, f"run.folder={name}", folder=tmp_path, ranks=ranks))
    losses = [
        [line["loss/train/total"] for line in metrics(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    start, one, two = (
        load_file(tmp_path / name / "hf" / "batch_2" / "adapter_model.safetensors") for name in ("first", "one", "two")
    )
    assert one.keys() == two.keys() and {"lora_magnitude_vector", "norm"} <= {
        part for name in one for part in name.split(".")
    }
    for name, tensor in one.items():
        assert not torch.equal(tensor, start[name]), name
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
