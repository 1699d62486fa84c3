"""Exported folders load like any HF model and reproduce the trainer's logits; kills and full disks leave nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composer.core import Callback
from composer.models import HuggingFaceModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from support.contracts import new_contract
from support.exporting import new_exporter, run_in_a_child, served, write, write_on_a_full_disk
from support.tiny_training import CONFIGS, new_hf_model, new_tokenizer, new_trainer, probe_logits
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rankllm_composer.errors import ModelError
from rankllm_composer.export.model_folder import export_checkpoint
from rankllm_composer.export.weights import gather_full_state_dict
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker
from rankllm_composer.prompts.client_names import ServingNameWarning
from rankllm_composer.prompts.contract import read_contract
from rankllm_composer.training.progress import read_metrics

RANKS = Path(__file__).parents[1] / "workers" / "export_ranks.py"
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "reranker.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **options)


def weight_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("shard_size", ["5GB", "10KB"])
def test_the_exported_model_has_bit_identical_logits(tmp_path, family, shard_size):
    model = new_hf_model(family)
    folder = write(tmp_path / "m", model, max_shard_size=shard_size)
    shards = sorted(path.name for path in folder.glob("model*.safetensors"))
    assert (shards == ["model.safetensors"]) == (shard_size == "5GB")
    assert {path.name for path in folder.iterdir()} - {*shards, "model.safetensors.index.json"} == FILES - {
        "model.safetensors"
    }
    loaded = load(folder)
    assert torch.equal(probe_logits(loaded), probe_logits(model))
    assert type(loaded) is type(model)
    assert ("lm_head.weight" in weight_names(folder)) == (family != "llama_tied")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (family == "llama_tied")


def test_weights_are_cast_to_the_requested_dtype(tmp_path):
    model = new_hf_model()
    loaded = load(write(tmp_path / "m", model, dtype="bfloat16"), torch_dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, value in loaded.named_parameters():
        assert torch.equal(value, model.get_parameter(name).bfloat16())
    assert model.dtype == torch.float32
    with pytest.raises(ModelError, match="dtype is 'int8'; expected one of bfloat16, float16, float32"):
        write(tmp_path / "x", dtype="int8")


def test_config_contains_no_training_settings(tmp_path):
    model = ListwiseReranker(new_hf_model(), new_tokenizer(), Objective("combined")).model
    model.config.name_or_path = "/home/me/base"
    before = model.config.to_dict()
    folder = write(tmp_path / "m", model)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["use_cache"] is True
    assert config["torch_dtype"] == "float32"
    text = "".join(path.read_text() for path in folder.glob("*.json"))
    assert "attn_implementation" not in text
    assert "/home/me" not in text
    assert model.config.to_dict() == before
    assert model.config.use_cache is False


def test_the_tokenizer_writes_the_prompts_of_training(tmp_path):
    tokenizer = new_tokenizer()
    folder = write(tmp_path / "m", tokenizer=tokenizer)
    # Readers from before chat_template.jinja find the template too.
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == tokenizer.chat_template
    loaded = AutoTokenizer.from_pretrained(folder)
    prompt = loaded.apply_chat_template([{"role": "user", "content": "query cat"}], tokenize=False)
    assert prompt == "<s>[INST] query cat [/INST]"
    assert loaded(prompt)["input_ids"] == tokenizer(prompt)["input_ids"] == [1, 1, 3, 8, 9, 4]


@pytest.mark.parametrize(
    ("eos_of_base", "expected"), [(None, 2), (2, 2), (5, [2, 5]), ([5, 2], [5, 2]), ([5, 6], [2, 5, 6])]
)
def test_answers_end_where_training_ended_them(tmp_path, eos_of_base, expected):
    base = GenerationConfig(eos_token_id=eos_of_base, do_sample=True, temperature=0.6, top_p=0.9)
    folder = write(tmp_path / "m", generation_config=base)
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == expected
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == expected
    assert (generation.do_sample, generation.temperature, generation.top_p) == (False, 1.0, 1.0)
    assert (generation.bos_token_id, generation.pad_token_id) == (1, 2)
    assert base.eos_token_id == eos_of_base
    assert base.temperature == 0.6


def test_contract_and_card_are_written(tmp_path):
    folder = write(tmp_path / "m", card="key: hf_" + "a1" * 12)
    assert read_contract(folder) == new_contract()
    assert (folder / "README.md").read_text() == "key: [redacted]"


def test_mismatched_parts_are_refused_and_nothing_is_left(tmp_path):
    model = new_hf_model()
    weights = model.state_dict()
    without = {name: value for name, value in weights.items() if name != "model.norm.weight"}
    tied = new_hf_model("llama_tied")
    drifted = {name: value.clone() for name, value in tied.state_dict().items()}
    drifted["lm_head.weight"] += 1
    other_template = new_tokenizer()
    other_template.chat_template += " "
    bigger = new_tokenizer()
    bigger.add_tokens([f"word{index}" for index in range(40)])
    for changes, error, message in (
        ({"weights": without}, ModelError, r"1 missing \['model.norm.weight'\] and 0 unknown"),
        ({"weights": weights | {"x": torch.ones(1)}}, ModelError, r"and 1 unknown \['x'\].*MistralForCausalLM"),
        ({"weights": weights | {"model.norm.weight": torch.ones(3)}}, ModelError, r"model.norm.weight of shape \(3,\)"),
        ({"weights": drifted, "config": tied.config}, ModelError, "lm_head.weight differs"),
        ({"tokenizer": other_template}, ModelError, "another chat template than the contract"),
        ({"tokenizer": bigger}, ModelError, "has 72 tokens but the model only 40"),
    ):
        with pytest.raises(error, match=message):
            write(tmp_path / "m", model, **changes)
        assert not list(tmp_path.iterdir())
    with pytest.raises(ModelError, match="is a URL; expected a local folder"):
        write("s3://bucket/m")


def test_a_path_that_the_client_misreads_warns(tmp_path):
    with pytest.warns(ServingNameWarning, match="contains 'gpt'"):
        write(tmp_path / "gpt-like")


def write_and_die(folder: Path, report: Path) -> None:
    import transformers.modeling_utils as modeling

    save = modeling.safe_save_file

    def save_and_die(tensors, path, **options):
        save(tensors, path, **options)
        report.write_text("about to die")
        os.kill(os.getpid(), signal.SIGKILL)

    modeling.safe_save_file = save_and_die
    write(folder)


def test_a_disk_that_fills_up_while_weights_are_written_leaves_nothing(tmp_path):
    folder, report = tmp_path / "runs" / "m", tmp_path / "report"
    assert run_in_a_child(write_on_a_full_disk, folder, report) == 0
    assert (
        report.read_text()
        == f"{folder}: no space to write it (file too large); no partial folder is left behind. Free some space."
    )
    assert not list(folder.parent.iterdir())


def test_a_kill_while_weights_are_written_leaves_no_folder(tmp_path):
    folder, report = tmp_path / "runs" / "m", tmp_path / "report"
    assert run_in_a_child(write_and_die, folder, report) == -signal.SIGKILL
    assert report.exists()
    assert not folder.exists()
    assert [path.name[:11] for path in folder.parent.iterdir()] == [".m.partial-"]
    write(folder)
    assert list(folder.parent.iterdir()) == [folder]
    load(folder)


@pytest.mark.parametrize("family", ["mistral", "llama_tied"])
def test_a_run_exports_a_folder_per_epoch(tmp_path, family):
    model = HuggingFaceModel(new_hf_model(family), new_tokenizer())
    trainer = new_trainer(model, "2ep", callbacks=[new_exporter(tmp_path / "hf", family)])
    trainer.fit()
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["epoch_0", "epoch_1"]
    last = probe_logits(load(tmp_path / "hf" / "epoch_1"))
    assert torch.equal(last, probe_logits(model.model))
    assert not torch.equal(last, probe_logits(load(tmp_path / "hf" / "epoch_0")))
    assert "epoch_1 (after 8 batches)" in (tmp_path / "hf" / "epoch_1" / "README.md").read_text()
    trainer.close()


@pytest.mark.parametrize(
    ("interval", "duration", "expected"),
    # four batches per epoch
    [
        ("1ep", "1ep", ["epoch_0"]),
        ("2ep", "3ep", ["epoch_1", "epoch_2"]),
        ("1ep", "6ba", ["batch_6", "epoch_0"]),
        ("1ep", "4ba", ["epoch_0"]),
        ("3ba", "2ep", ["batch_3", "batch_6", "epoch_1"]),
        ("4ba", "1ep", ["batch_4"]),
        ("100ba", "12sp", ["batch_6"]),
    ],
)
def test_when_a_run_exports(tmp_path, monkeypatch, interval, duration, expected):
    monkeypatch.setattr(
        "rankllm_composer.training.export_callback.write_model_folder", lambda target, *_: target.mkdir(parents=True)
    )
    trainer = new_trainer(new_hf_model(), duration, callbacks=[new_exporter(tmp_path, interval=interval)])
    trainer.fit()
    trainer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_an_export_precedes_the_checkpoint_of_the_same_step(tmp_path):
    exporter = new_exporter(tmp_path / "hf")
    # Given after the checkpoint saver's folder, as a recipe does.
    trainer = new_trainer(
        new_hf_model(), "1ep", callbacks=[exporter], save_folder=str(tmp_path / "checkpoints"), save_interval="1ep"
    )
    exported = []
    exporter._write = lambda *_: exported.append(list((tmp_path / "checkpoints").glob("*")))
    trainer.fit()
    trainer.close()
    assert exported == [[]]
    assert list((tmp_path / "checkpoints").glob("ep1-*"))


def test_current_metrics_are_on_the_card(tmp_path):
    exporter = new_exporter(tmp_path, figures=lambda batch: {"held-out nDCG@10": torch.tensor(batch / 8)})
    trainer = new_trainer(new_hf_model(), "1ep", callbacks=[exporter])
    trainer.fit()
    trainer.close()
    assert "| held-out nDCG@10 | 0.5000 |" in (tmp_path / "epoch_0" / "README.md").read_text()


def exports_with(folder, figures, best=None):
    """Return the target of the `best` link after each of four exports with these metrics."""
    measured = iter(figures)
    exporter = new_exporter(folder, figures=lambda batch: next(measured), best_by="first_token/ndcg@10")
    if best is not None:
        exporter.load_state_dict(best)
    pointed = []

    class Look(Callback):
        def epoch_checkpoint(self, state, logger):
            link = folder / "best"
            pointed.append(link.readlink().name if link.is_symlink() else None)

    exporter._write = lambda state, target, weights: target.mkdir(parents=True, exist_ok=True)
    trainer = new_trainer(new_hf_model(), "4ep", callbacks=[exporter, Look()])
    trainer.fit()
    trainer.close()
    return pointed, exporter.state_dict()


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.5, 0.7, 0.7, 0.6], ["epoch_0", "epoch_1", "epoch_1", "epoch_1"]),  # of equals the first
        ([math.nan, 0.1, math.nan, 0.2], [None, "epoch_1", "epoch_1", "epoch_3"]),
        ([-0.5, -0.7, 0.0, 0.0], ["epoch_0", "epoch_0", "epoch_2", "epoch_2"]),
    ],
)
def test_the_best_export_is_linked(tmp_path, values, expected):
    pointed, state = exports_with(tmp_path / "hf", [{"eval/first_token/ndcg@10": value} for value in values])
    assert pointed == expected
    assert state["best"] == max(value for value in values if not math.isnan(value))


def test_a_resumed_run_remembers_the_best_export(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "best").symlink_to("epoch_9")
    figures = [{"eval/first_token/ndcg@10": value} for value in (0.5, 0.8, 0.81, 0.1)]
    pointed, _ = exports_with(folder, figures, best={"best": 0.8})
    assert pointed == ["epoch_9", "epoch_9", "epoch_2", "epoch_2"]


def test_a_missing_metric_warns_and_links_nothing(tmp_path):
    with pytest.warns(UserWarning, match=r"best_by: no metric 'first_token/ndcg@10' at epoch_0; .*best is unchanged"):
        pointed, _ = exports_with(tmp_path / "hf", [{}, {"eval/first_token/ndcg@10": 0.1}, {}, {}])
    assert pointed == [None, "epoch_1", "epoch_1", "epoch_1"]


@pytest.mark.parametrize("interval", ["0ep", "10tok", "0.5dur"])
def test_intervals_in_other_units_are_refused(tmp_path, interval):
    with pytest.raises(ModelError, match=f"interval is '{interval}'; expected epochs or batches"):
        new_exporter(tmp_path, interval=interval)


def test_a_tokenizer_of_another_template_stops_before_training(tmp_path):
    other = new_tokenizer()
    other.chat_template += " "
    with pytest.raises(ModelError, match="another chat template"):
        new_trainer(new_hf_model(), callbacks=[new_exporter(tmp_path, tokenizer=other)])


@pytest.fixture
def lora_model():
    """Base model without adapter, and a Composer model around it with one."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return HuggingFaceModel(get_peft_model(new_hf_model(), config), new_tokenizer())


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_are_exported_merged_or_separately(tmp_path, lora_model, merge):
    trainer = new_trainer(lora_model, "1ep", callbacks=[new_exporter(tmp_path, merge_lora=merge)])
    trainer.fit()
    folder = tmp_path / "epoch_0"
    trained = probe_logits(lora_model.model)
    assert not torch.allclose(trained, probe_logits(new_hf_model()), atol=1e-3)
    if merge:
        assert {path.name for path in folder.iterdir()} == FILES
        torch.testing.assert_close(probe_logits(load(folder)), trained, rtol=1e-4, atol=1e-5)
    else:
        assert not (folder / "model.safetensors").exists()
        assert (folder / "adapter_model.safetensors").stat().st_size < 20_000
        assert torch.equal(probe_logits(PeftModel.from_pretrained(new_hf_model(), folder)), trained)
    assert read_contract(folder) == new_contract()
    trainer.close()


def test_checkpoints_become_folders(tmp_path):
    options = {"save_folder": str(tmp_path / "checkpoints"), "save_interval": "1ep"}
    trainer = new_trainer(new_hf_model("llama_tied"), "1ep", **options)
    trainer.fit()
    model = trainer.state.model.model
    checkpoint = tmp_path / "checkpoints" / "ep1-ba4-rank0.pt"
    folder = export_checkpoint(checkpoint, tmp_path / "m", served(model), "#")
    assert torch.equal(probe_logits(load(folder)), probe_logits(model))
    trainer.close()


def test_checkpoints_of_adapters_become_adapter_folders(tmp_path, lora_model):
    options = {"save_folder": str(tmp_path / "checkpoints"), "save_interval": "1ep"}
    trainer = new_trainer(lora_model, "1ep", **options)
    trainer.fit()
    checkpoint = tmp_path / "checkpoints" / "ep1-ba4-rank0.pt"
    with pytest.raises(ModelError, match=r"holds 8 tensors of an adapter"):
        export_checkpoint(checkpoint, tmp_path / "m", served(lora_model), "#")
    adapter_config = lora_model.model.peft_config["default"]
    folder = export_checkpoint(checkpoint, tmp_path / "m", served(lora_model, adapter_config=adapter_config), "#")
    assert torch.equal(probe_logits(PeftModel.from_pretrained(new_hf_model(), folder)), probe_logits(lora_model.model))
    trainer.close()


@pytest.mark.slow
def test_two_ranks_export_what_they_trained(tmp_path):
    """FSDP2 (tied, with activation checkpointing), DDP and LoRA under FSDP2; a failure on rank 0 reaches both ranks."""
    launcher = Path(sys.executable).with_name("composer")
    done = subprocess.run(
        [sys.executable, launcher, "-n", "2", "--stdout", f"{tmp_path}/out{{rank}}", RANKS, tmp_path],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for case in ("fsdp2", "ddp", "fsdp2_lora"):
        folder = tmp_path / case / "epoch_0"
        trained = torch.load(tmp_path / f"{case}_logits.pt", weights_only=True)
        loaded = load(folder)
        assert type(loaded).__name__ == "LlamaForCausalLM"
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert "lm_head.weight" not in weight_names(folder)
        tolerance = 1e-5 if case == "fsdp2_lora" else 0.0  # merging rounds
        torch.testing.assert_close(probe_logits(loaded), trained, rtol=0, atol=tolerance)
        assert not torch.allclose(trained, probe_logits(new_hf_model("llama_tied")), atol=1e-3)
        # Two batches of two rows of eight tokens on each rank, logged once.
        assert [(line["samples"], line["tokens"]) for line in read_metrics(tmp_path / case / "metrics.jsonl")] == [
            (4, 32),
            (8, 64),
        ]
    assert done.stderr.count("batch 2/2") == 4
    # The sharded checkpoint holds the same weights as the export beside it.
    model = load(tmp_path / "fsdp2" / "epoch_0")
    folder = export_checkpoint(tmp_path / "checkpoints" / "ep1-ba2", tmp_path / "from_shards", served(model), "#")
    assert torch.equal(probe_logits(load(folder)), probe_logits(model))
    for rank in (0, 1):
        raised = (tmp_path / f"raised_{rank}").read_text()
        assert "is a folder without reranker.json" in raised
        assert raised.startswith("StoreError" if rank == 0 else "RunError: rank 0, export of")


def test_one_process_gathers_without_a_process_group():
    model = new_hf_model()
    assert gather_full_state_dict(model).keys() == model.state_dict().keys()
