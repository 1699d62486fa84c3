"""A model whose layers mix the lists of a pack: refused in packs, trained and reranked exactly one list at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.small_run import RECIPE, small_run
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from rankllm_composer.errors import ModelError
from rankllm_composer.ranking.forward import inference, packed_forwards
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.training.run import train
from rankllm_composer.training.run_files import read_metrics

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}


@pytest.mark.filterwarnings("ignore::rankllm_composer.recipe.load.RecipeWarning")
def test_one_list_per_forward_pass(tmp_path, mistral_v3_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = small_run(tmp_path, mistral_v3_folder, tied=True)
    torch.manual_seed(0)
    config = Qwen2MoeConfig(vocab_size=32768, num_key_value_heads=1, initializer_range=0.1, **SIZES, **EXPERTS)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    overrides += [
        "run.max_duration=1ba",
        "schedule.warmup=0ba",
        "checkpoint.export={}",
        "run.folder=run",
        "model.activation_checkpointing=1",
    ]
    with pytest.raises(ModelError, match=r"qwen2_moe\) cannot .* Set batch\.packing=false to train one list per"):
        train(load_recipe(RECIPE, overrides))
    assert not list(tmp_path.glob("run/checkpoints/*"))

    # The start says what the recipe makes of these lists: all but the first of 2 to 20 candidates are tied.
    with pytest.warns(UserWarning, match=r"^8\d% of the pairs .* are tied by .*Set objective\.ties=tied\."):
        run = train(load_recipe(RECIPE, [*overrides, "batch.packing=false", "objective.ties=ordered"]))
    (line,) = [line for line in read_metrics(run.folder / "metrics.jsonl") if line["event"] == "batch"]
    assert 0 < line["loss/train/total"] < 1e3
    assert run.best is not None
    model = AutoModelForCausalLM.from_pretrained(Path(run.best), torch_dtype=torch.float32)
    lists = {0: torch.arange(5, 16).numpy(), 1: torch.arange(40, 57).numpy()}
    with inference(model, "auto", 17):
        found = dict(
            zip(
                (0, 1), (logits[0] for _, logits in packed_forwards(model, lists, 2, batch_tokens=4096, lockstep=False))
            )
        )
    for key, tokens in lists.items():
        with torch.no_grad():
            alone = model(input_ids=torch.from_numpy(tokens)[None]).logits[0, -2:]
        torch.testing.assert_close(found[key], alone, rtol=1e-4, atol=1e-5)
