"""Loading a model: nothing is invented, nothing is dropped in silence, and every error names its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.packed_models import new_model
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.utils.logging import is_progress_bar_enabled

from rankllm_composer.errors import ModelError
from rankllm_composer.model.loading import load_causal_lm
from rankllm_composer.options import ModelOptions


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for family in ("mistral", "mistral_tied"):
        new_model(family).save_pretrained(folder / family)
    return {family: folder / family for family in ("mistral", "mistral_tied")}


@pytest.fixture
def model(saved, tmp_path) -> Path:
    """A folder with weights, to damage."""
    return Path(shutil.copytree(saved["mistral"], tmp_path / "model"))


def load(folder: Path, **options):
    return load_causal_lm(ModelOptions(name_or_path=str(folder), **options))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_all_weights_are_loaded_as_they_are(saved):
    for family, folder in saved.items():
        loaded, expected = load(folder), new_model(family)
        for name, weight in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name
    assert "lm_head.weight" not in load_file(
        saved["mistral_tied"] / "model.safetensors"
    )  # tied, and loaded all the same


@pytest.mark.parametrize("source", ["weights", "random", "meta"])
def test_rotary_frequencies_stay_exact_in_half_precision(saved, source):
    """Rounded to bfloat16 they would turn tokens at position 4,000 by several radians too much."""
    options = ModelOptions(name_or_path=str(saved["mistral"]), random_weights=source == "random")
    model = load_causal_lm(options, on_meta=source == "meta", dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    frequencies = model.model.rotary_emb.inv_freq
    size = model.model.layers[0].self_attn.head_dim
    theta = 1e4 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    assert frequencies.dtype == torch.float32
    if source != "meta":
        torch.testing.assert_close(frequencies.double(), theta, rtol=1e-6, atol=0)


def test_loading_shows_no_progress_bars(saved, tmp_path, capfd):
    """Every rank would print them."""
    new_model("mistral").save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    capfd.readouterr()
    load(tmp_path)
    assert capfd.readouterr().err == ""
    assert is_progress_bar_enabled()


MISSING = {
    "a wrong prefix": (
        lambda weights: {f"transformer.{name.removeprefix('model.')}": tensor for name, tensor in weights.items()},
        r"the files lack 39 weights: lm_head\.weight, model\.embed_tokens\.weight, .* and 34 more; expected all of "
        r"MistralForCausalLM\. The files have \S*transformer\.\S+ for ",
    ),
    "a missing layer": (
        lambda weights: {name: tensor for name, tensor in weights.items() if ".layers.3." not in name},
        r"the files lack 9 weights: model\.layers\.3\.input_layernorm\.weight, ",
    ),
    "no head": (
        lambda weights: {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"},
        r"the files lack 1 weight: lm_head\.weight; expected all of MistralForCausalLM\. Restore",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_missing_weights_are_named_and_never_invented(model, case):
    change, message = MISSING[case]
    change_weights(model, change)
    with pytest.raises(ModelError, match=message):
        load(model)


def test_unused_weights_are_listed(model):
    change_weights(model, lambda weights: {**weights, "value_head.weight": torch.ones(2)})
    with pytest.warns(UserWarning, match=r"model: unused weights \(1\): value_head\.weight"):
        load(model)


def test_sizes_that_differ_from_the_configuration(model):
    change_config(model, intermediate_size=64)
    with pytest.raises(
        ModelError, match=r"weights .*\(model\.layers\.0\.mlp\.\w+\.weight is .*48.*; expected .*64.*\)\. Restore"
    ):
        load(model)


def test_damaged_files_are_named(model):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or incomplete, .* bytes .*\. Download"):
        load(model)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 14483464192\n")
    with pytest.raises(ModelError, match=r"model\.safetensors is a Git LFS pointer, .*`git lfs pull`"):
        load(model)
    path.unlink()
    with pytest.raises(ModelError, match=r"the weights cannot be loaded \(.*no file named.*\)\. Expected safetensors"):
        load(model)
    path.write_bytes(whole)
    (model / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"model\.name_or_path: cannot load '.*model'"):
        load(model)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantized_bases_are_refused(model, method):
    change_config(model, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=rf"the weights are quantized \({method}\); expected .*Use the model that"):
        load(model)


def test_models_of_other_kinds_are_refused(tmp_path):
    small = {"vocab_size": 96, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"t5 is T5ForConditionalGeneration; expected a decoder-only causal LM"):
        load(tmp_path / "t5")
    bert = BertConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertLMHeadModel(bert).save_pretrained(tmp_path / "bert")
    from rankllm_composer.model.loading import load_config
    from rankllm_composer.model.self_check import check_model

    with pytest.raises(ModelError, match=r"bert \(bert\) cannot be trained: its tokens see the tokens after them"):
        check_model(load_config(ModelOptions(name_or_path=str(tmp_path / "bert"))), max_length_tokens=64)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_that_names_a_kernel_of_the_hub_is_refused(model, key):
    change_config(model, **{key: "someone/kernel:attention"})
    with pytest.raises(ModelError, match=r"attn_implementation is 'someone/kernel:attention', compiled code of a hub"):
        load(model)
