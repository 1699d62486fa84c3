"""Full weights: merging of low-rank updates, and reading checkpoints without running code in them."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_training import new_hf_model, new_trainer

from rankllm_composer.errors import ModelError
from rankllm_composer.export.weights import (
    causal_lm_class,
    gather_full_state_dict,
    hf_module,
    mean_weights,
    merge_lora_weights,
    meta_state_dict,
    read_checkpoint_weights,
)


def test_a_low_rank_update_is_added_to_its_weight():
    merged = merge_lora_weights(
        {
            "base_model.model.q.base_layer.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            "base_model.model.q.base_layer.bias": torch.tensor([7.0, 7.0]),
            "base_model.model.q.lora_A.default.weight": torch.tensor([[1.0, -1.0]]),  # (r, in)
            "base_model.model.q.lora_B.default.weight": torch.tensor([[2.0], [3.0]]),  # (out, r)
            "base_model.model.norm.weight": torch.tensor([5.0]),
        },
        {"base_model.model.q": 0.5},
        "default",
    )
    # W + 0.5 * [[2], [3]] @ [[1, -1]] = W + [[1, -1], [1.5, -1.5]]
    assert {name: value.tolist() for name, value in merged.items()} == {
        "q.weight": [[2.0, 1.0], [4.5, 2.5]],
        "q.bias": [7.0, 7.0],
        "norm.weight": [5.0],
    }


def test_embeddings_and_fully_trained_modules_are_merged():
    merged = merge_lora_weights(
        {
            "base_model.model.embed.base_layer.weight": torch.zeros(3, 2),  # (V, D)
            "base_model.model.embed.lora_embedding_A.default": torch.tensor([[1.0, 2.0, 3.0]]),  # (r, V)
            "base_model.model.embed.lora_embedding_B.default": torch.tensor([[1.0], [10.0]]),  # (D, r)
            "base_model.model.head.modules_to_save.default.weight": torch.tensor([9.0]),
            "base_model.model.head.original_module.weight": torch.tensor([0.0]),
        },
        {"base_model.model.embed": 2.0},
        "default",
    )
    assert merged["embed.weight"].tolist() == [[2.0, 20.0], [4.0, 40.0], [6.0, 60.0]]
    assert merged["head.weight"].tolist() == [9.0]
    assert len(merged) == 2


def test_adapters_that_are_not_additive_are_rejected():
    with pytest.raises(ModelError, match=r"lora_magnitude_vector.*expected plain LoRA"):
        merge_lora_weights({"q.lora_magnitude_vector.default.weight": torch.ones(1)}, {}, "default")


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=str)
def test_merging_equals_peft(options):
    settings = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
    } | options
    model = get_peft_model(new_hf_model(), LoraConfig(**settings))
    merged = gather_full_state_dict(model)
    expected = model.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    moved = 0.0
    for name, start in new_hf_model().state_dict().items():
        torch.testing.assert_close(merged[name], expected[name])
        moved = max(moved, float((merged[name] - start).abs().max()))
    assert moved > 0.01


def test_two_adapters_are_refused():
    model = get_peft_model(new_hf_model(), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"adapters \['default', 'second'\]"):
        gather_full_state_dict(model)


def test_gathering_casts_floating_point_tensors():
    model = new_hf_model()
    gathered = gather_full_state_dict(model, dtype=torch.bfloat16)
    assert gathered.keys() == model.state_dict().keys()
    assert {value.dtype for value in gathered.values()} == {torch.bfloat16}
    assert next(model.parameters()).dtype == torch.float32


def test_the_wrapped_model_is_found():
    model = new_hf_model()
    assert hf_module(model) is model
    assert causal_lm_class(model).__name__ == "MistralForCausalLM"
    with pytest.raises(ModelError, match="model is Linear"):
        hf_module(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("merge", [True, False])
def test_shapes_are_known_without_gathering(merge):
    model = get_peft_model(new_hf_model("llama_tied"), LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"]))
    expected, found = gather_full_state_dict(model, merge_lora=merge), meta_state_dict(model, merge_lora=merge)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()
    }
    assert all(tensor.is_meta for tensor in found.values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run: its weights, and its checkpoint in one file."""
    folder = tmp_path_factory.mktemp("run")
    trainer = new_trainer(new_hf_model(), "1ep", save_folder=str(folder), save_interval="1ep")
    trainer.fit()
    weights = {name: value.clone() for name, value in trainer.state.model.model.state_dict().items()}
    trainer.close()
    return weights, folder / "ep1-ba4-rank0.pt"


def test_a_checkpoint_in_one_file(trained):
    weights, checkpoint = trained
    read = read_checkpoint_weights(checkpoint)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    link = checkpoint.parent / "latest-rank0.pt"
    assert link.is_symlink()
    assert read_checkpoint_weights(link).keys() == weights.keys()


class Payload:
    """Create a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_payload_in_a_checkpoint_is_rejected_and_not_run(tmp_path):
    trap = tmp_path / "was run"
    torch.save({"state": {"model": {}, "x": Payload(trap)}}, tmp_path / "file.pt")
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(trap)))
    for checkpoint, named in ((tmp_path / "file.pt", "file.pt"), (folder, r"\.metadata")):
        with pytest.raises(
            ModelError, match=rf"{named} contains a pickle that references posix.mkdir; expected data only"
        ):
            read_checkpoint_weights(checkpoint)
    assert not trap.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert trap.exists()  # it would have been


def test_damaged_and_foreign_checkpoints_are_named(trained, tmp_path):
    _, checkpoint = trained
    cut = tmp_path / "cut.pt"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    garbage = tmp_path / "garbage.pt"
    garbage.write_bytes(b"nothing of the kind")
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.ones(1)}, other)
    tampered = tmp_path / "tampered.pt"
    with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(tampered, "w") as new:
        for name in old.namelist():
            if not name.endswith("data.pkl"):
                new.writestr(name, old.read(name))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    torn_index = tmp_path / "torn"
    torn_index.mkdir()
    (torn_index / ".metadata").write_bytes(b"\x80\x04\x95")
    for path, message in (
        (cut, "damaged"),
        (garbage, "damaged"),
        (other, "has no model weights"),
        (tampered, "damaged"),
        (unfinished, "is missing, so the checkpoint is incomplete"),
        (torn_index, "damaged"),
        (tmp_path / "absent.pt", "does not exist"),
    ):
        with pytest.raises(ModelError, match=message) as failure:
            read_checkpoint_weights(path)
        assert path.name in str(failure.value)


def test_the_mean_of_weights_is_rounded_once():
    many = [{"a": torch.tensor([0.25, 1e8]), "n": torch.tensor(number)} for number in range(3)]
    many[1]["a"] = torch.tensor([0.5, 1.0])
    many[2]["a"] = torch.tensor([1.5, -1e8])
    mean = mean_weights(many)
    assert mean["a"].tolist() == torch.tensor([0.75, 1 / 3]).tolist() and mean["n"] == 2
    with pytest.raises(ModelError, match=r"b: 1 weights differ in name or shape between checkpoints"):
        mean_weights([{"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(1)}])
