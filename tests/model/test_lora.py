"""LoRA: every name matches, all kinds of PEFT that a recipe names merge exactly, and an adapter can be trained on."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel
from support.exporting import served
from support.tiny_training import new_hf_model, new_tokenizer, new_trainer, probe_logits
from transformers import AutoModelForCausalLM, Phi3Config

from rankllm_composer.errors import ModelError
from rankllm_composer.export.model_folder import export_checkpoints, write_model_folder
from rankllm_composer.export.weights import gather_full_state_dict
from rankllm_composer.model.lora import load_starting_adapter
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker

DEFAULT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def new_reranker(model=None, objective: str = "combined", **options) -> ListwiseReranker:
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    arguments = {"attention": "sdpa", "peft_config": config}
    return ListwiseReranker(model or new_hf_model(), new_tokenizer(), Objective(objective), **arguments)


def phi3():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(Phi3Config(vocab_size=40, num_hidden_layers=1, pad_token_id=0, **sizes))


def test_every_name_has_to_match():
    with pytest.raises(
        ModelError,
        match=r"model\.lora\.target_modules: gate_proj, k_proj, q_proj, up_proj, v_proj match nothing in "
        r"Phi3ForCausalLM; expected names of its layers: down_proj, embed_tokens, gate_up_proj, lm_head, o_proj, "
        r"qkv_proj\. Name some of these, or set model\.lora\.target_modules=\[all-linear\]",
    ):
        new_reranker(phi3(), target_modules=DEFAULT)
    adapted = new_reranker(phi3(), target_modules="all-linear").model
    names = {name.split(".")[-4] for name, _ in adapted.named_parameters() if ".lora_A." in name}
    assert names == {"down_proj", "gate_up_proj", "o_proj", "qkv_proj"}
    with pytest.raises(ModelError, match=r"model\.lora\.modules_to_save: head match nothing in MistralForCausalLM"):
        new_reranker(target_modules=["q_proj"], modules_to_save=["head"])


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, KINDS["whole head"]], ids=str)
def test_a_tied_head_is_refused(options):
    with pytest.raises(ModelError, match=r"contains lm_head, whose weights the output layer and .*\. Remove lm_head\."):
        new_reranker(new_hf_model("llama_tied"), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_live_and_saved_adapters_merge_as_peft_merges_them(tmp_path, kind):
    """Merged and separate exports, of the live model and of its checkpoint, have the logits of training."""
    model = new_reranker(**KINDS[kind])
    torch.manual_seed(1)
    for weight in model.model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    trained = probe_logits(model.model)
    assert not torch.allclose(trained, probe_logits(new_hf_model()), atol=1e-2)
    trainer = new_trainer(model, "1ba")
    checkpoint = trainer.save_checkpoint(str(tmp_path / "saved.pt"))
    trainer.close()
    adapter = served(model, adapter_config=model.model.peft_config["default"])
    merged, apart = tmp_path / "merged", tmp_path / "apart"
    write_model_folder(merged / "live", gather_full_state_dict(model), served(new_hf_model()), "#")
    write_model_folder(apart / "live", gather_full_state_dict(model, merge_lora=False), adapter, "#")
    base = new_reranker(**KINDS[kind]).model
    export_checkpoints([checkpoint], merged / "saved", served(new_hf_model()), "#", base=base)
    export_checkpoints([checkpoint], apart / "saved", adapter, "#")
    for name in ("live", "saved"):
        whole = AutoModelForCausalLM.from_pretrained(merged / name)
        torch.testing.assert_close(probe_logits(whole), trained, rtol=1e-4, atol=1e-5)
        on_base = PeftModel.from_pretrained(new_hf_model(), apart / name)
        torch.testing.assert_close(probe_logits(on_base), trained, rtol=1e-5, atol=1e-6)
        again = new_reranker(**KINDS[kind]).model
        load_starting_adapter(again, apart / name)
        torch.testing.assert_close(probe_logits(again), trained, rtol=1e-5, atol=1e-6)

    other = new_reranker(target_modules=["v_proj"]).model
    with pytest.raises(ModelError, match=r"live has \w+ .*; the recipe has .*\. Set 'model\.lora\.\w+=.*'\."):
        load_starting_adapter(other, apart / "live")
    (apart / "live" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"start_from: .*live cannot be read .*Export it with --adapter-only"):
        load_starting_adapter(again, apart / "live")
