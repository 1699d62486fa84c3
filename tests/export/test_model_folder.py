"""Exported folders load like any HF model and reproduce the trainer's logits; kills and full disks leave nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from composer.core import Callback
from composer.models import HuggingFaceModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from support.contracts import new_contract
from support.exporting import new_exporter, run_in_a_child, served, write, write_on_a_full_disk
from support.launching import launch, succeeded
from support.tiny_training import CONFIGS, new_hf_model, new_tokenizer, new_trainer, probe_logits
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rankllm_composer.checkpoints.folder import complete_checkpoints
from rankllm_composer.errors import ModelError, StoreError
from rankllm_composer.export.model_folder import export_checkpoints, exports_in, write_model_folder
from rankllm_composer.export.serving_check import inspect_folder
from rankllm_composer.export.weights import gather_full_state_dict
from rankllm_composer.model.loading import load_causal_lm, load_tokenizer
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker
from rankllm_composer.options import ModelOptions
from rankllm_composer.prompts.client_names import ServingNameWarning
from rankllm_composer.prompts.contract import read_contract
from rankllm_composer.ranking.reranker import Reranker
from rankllm_composer.storage.content import check_content
from rankllm_composer.training.checkpoint_callback import CheckpointFolder
from rankllm_composer.training.run_files import read_metrics

RANKS = Path(__file__).parents[1] / "workers" / "export_ranks.py"
FILES = {
    "README.md",
    "config.json",
    "export.json",
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


@pytest.mark.parametrize(
    "settings",
    [
        {"length_penalty": 0.6, "early_stopping": True},
        {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True, "length_penalty": 2.0},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "max_new_tokens": 8, "min_length": 30},
        {"do_sample": True, "top_k": 7, "min_p": 0.1, "penalty_alpha": 0.6, "suppress_tokens": [8]},
    ],
    ids=str,
)
def test_an_export_decodes_greedily_whatever_the_base_did(tmp_path, settings):
    """The settings may be in generation_config.json of the base, or in its config.json."""
    base = GenerationConfig(**settings, max_length=48)
    model = new_hf_model()
    for name, value in settings.items():
        setattr(model.config, name, value)
    folder = write(tmp_path / "m", model, generation_config=base)
    expected = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2, max_length=48).to_dict()
    assert GenerationConfig.from_pretrained(folder).to_dict() == expected
    loaded = load(folder)
    prompt = torch.tensor([[1, 8, 9]])
    greedy = prompt
    with torch.no_grad():
        for _ in range(6):
            logits = loaded(input_ids=greedy).logits[:, -1]
            greedy = torch.cat([greedy, logits.argmax(-1, keepdim=True)], dim=1)
            if greedy[0, -1] == 2:
                break
    assert torch.equal(loaded.generate(prompt, max_new_tokens=6), greedy)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_one_of_two_tied_layers_unties_them(tmp_path, target):
    config = LoraConfig(r=2, target_modules=[target, "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(new_hf_model("llama_tied"), config)
    base = model.get_base_model()
    folder = write(tmp_path / "m", base, weights=gather_full_state_dict(model))
    loaded = load(folder)
    assert loaded.config.tie_word_embeddings is False and "lm_head.weight" in weight_names(folder)
    torch.testing.assert_close(probe_logits(loaded), probe_logits(model), rtol=1e-4, atol=1e-5)
    assert base.config.tie_word_embeddings is True  # the trained model is not changed


def test_a_tokenizer_with_several_chat_templates_is_exported_with_the_one_of_training(tmp_path):
    tokenizer = new_tokenizer()
    default = tokenizer.chat_template
    tokenizer.chat_template = {"default": default, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "base")
    chosen = load_tokenizer(ModelOptions(name_or_path=str(tmp_path / "base")))
    assert chosen.chat_template == default
    folder = write(tmp_path / "m", tokenizer=chosen)
    assert AutoTokenizer.from_pretrained(folder).chat_template == default
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"chat templates tool_use, and none is named default"):
        load_tokenizer(ModelOptions(name_or_path=str(tmp_path / "base")))


def test_others_may_read_an_export_as_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        folder = write(tmp_path / "m")
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == dict.fromkeys(FILES, "0o640")
    assert folder.stat().st_mode & 0o777 == 0o750


def test_damage_to_an_export_is_found_when_it_is_loaded(tmp_path):
    folder = write(tmp_path / "m")
    check_content(folder)
    (folder / "README.md").write_text("figures are added to the card")
    check_content(folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for use in (
        check_content,
        Reranker.from_pretrained,
        lambda path: load_causal_lm(ModelOptions(name_or_path=str(path))),
    ):
        with pytest.raises(ModelError, match=r"model\.safetensors is not what was exported.* remove export\.json"):
            use(folder)
    assert any("model.safetensors is not what was exported" in text for text in inspect_folder(folder).problems)
    (folder / "export.json").unlink()  # what the message says
    check_content(folder)
    (folder / "export.json").write_text('{"run": "x", "batch": 1, "sha256": {"../x": "a"}}')
    with pytest.raises(ModelError, match="is not the list of an export's files"):
        check_content(folder)
    (folder / "export.json").write_text("{")
    with pytest.raises(ModelError, match=r"export\.json is damaged"):
        check_content(folder)


def test_contract_and_card_are_written(tmp_path):
    folder = write(tmp_path / "m", card="key: hf_" + "a1" * 12)
    assert read_contract(folder) == new_contract()
    assert (folder / "README.md").read_text() == "key: [redacted]"


def test_mismatched_parts_are_refused_and_nothing_is_left(tmp_path):
    model = new_hf_model()
    weights = model.state_dict()
    without = {name: value for name, value in weights.items() if name != "model.norm.weight"}
    other_template = new_tokenizer()
    other_template.chat_template += " "
    bigger = new_tokenizer()
    bigger.add_tokens([f"word{index}" for index in range(40)])
    for changes, error, message in (
        ({"weights": without}, ModelError, r"1 missing \['model.norm.weight'\] and 0 unknown"),
        ({"weights": weights | {"x": torch.ones(1)}}, ModelError, r"and 1 unknown \['x'\].*MistralForCausalLM"),
        ({"weights": weights | {"model.norm.weight": torch.ones(3)}}, ModelError, r"model.norm.weight of shape \(3,\)"),
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
        "rankllm_composer.training.export_callback.write_model_folder",
        lambda target, *_, **__: target.mkdir(parents=True),
    )
    trainer = new_trainer(new_hf_model(), duration, callbacks=[new_exporter(tmp_path, interval=interval)])
    trainer.fit()
    trainer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


class Failing(Exception):
    pass


def run_exports(folder: Path, duration: str = "1ep", *, broken: bool = False, **options):
    """Train four batches per epoch with checkpoints and exports; returns the names of both."""
    checkpoints = CheckpointFolder(folder / "checkpoints", interval="2ep", keep=-1)
    exporter = new_exporter(folder / "hf", save=checkpoints.save, **options)
    if broken:

        def fail(*_):
            raise Failing

        exporter._write = fail
    trainer = new_trainer(new_hf_model(), duration, callbacks=[exporter, checkpoints])
    if trainer.state.timestamp < trainer.state.max_duration:
        trainer.fit()
    trainer.close()
    return exporter


def exported(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "hf").iterdir())


def test_a_failed_export_is_made_from_the_checkpoint_of_the_same_step(tmp_path):
    options = {"figures": lambda batch: {"eval/x": batch / 8}, "best_by": "x", "interval": "1ep"}
    whole = tmp_path / "whole"
    run_exports(whole, "2ep", **options)
    with pytest.raises(Failing):
        run_exports(tmp_path, "2ep", broken=True, **options)
    assert [path.name for path, _ in complete_checkpoints(tmp_path / "checkpoints")] == ["ep1-ba4"]
    run_exports(tmp_path, "2ep", **options)
    assert exported(tmp_path) == exported(whole) == ["best", "epoch_0", "epoch_1"]
    for name in ("epoch_0", "epoch_1"):
        ours, theirs = tmp_path / "hf" / name, whole / "hf" / name
        assert (ours / "README.md").read_text() == (theirs / "README.md").read_text()  # with the figures
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    # A finished run whose exports are gone, or lost a file, exports again, and the best one stays the best.
    shutil.rmtree(tmp_path / "hf")
    run_exports(tmp_path, "2ep", **options)
    assert exported(tmp_path) == ["best", "epoch_1"] and (tmp_path / "hf" / "best").readlink() == Path("epoch_1")
    (tmp_path / "hf" / "epoch_1" / "model.safetensors").unlink()
    (tmp_path / "hf" / "best").unlink()
    run_exports(tmp_path, "2ep", **options)
    load(tmp_path / "hf" / "best")


def test_the_newest_exports_and_the_best_one_are_kept(tmp_path):
    figures = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.4}
    options = {"figures": lambda batch: {"eval/x": figures[batch // 4]}, "best_by": "x", "interval": "1ep", "keep": 1}
    run_exports(tmp_path, "4ep", **options)
    assert exported(tmp_path) == ["best", "epoch_1", "epoch_3"]
    names = ["batch_3", "epoch_0", "epoch_1", "batch_40"]  # by batch, not by name or time
    for age, (name, batch) in enumerate(zip(names, (3, 4, 8, 40))):
        path = write_model_folder(
            tmp_path / "many" / name, new_hf_model().state_dict(), served(new_hf_model()), "#", batch=batch
        )
        os.utime(path / "reranker.json", (1e9 - age, 1e9 - age))
    assert list(exports_in(tmp_path / "many")) == names


def test_the_exports_of_another_run_are_not_replaced(tmp_path):
    run_exports(tmp_path)
    before = (tmp_path / "hf" / "epoch_0" / "export.json").read_text()
    other = CheckpointFolder(tmp_path / "other", interval="1ep")
    with pytest.raises(StoreError, match=r"hf/epoch_0 is the export of another run\. Move it away, or choose another"):
        new_trainer(new_hf_model(), "1ep", callbacks=[new_exporter(tmp_path / "hf", save=other.save), other])
    assert (tmp_path / "hf" / "epoch_0" / "export.json").read_text() == before
    run_exports(tmp_path, "2ep")  # its own run continues
    assert exported(tmp_path) == ["epoch_0", "epoch_1"]


def test_current_metrics_are_on_the_card(tmp_path):
    exporter = new_exporter(tmp_path, figures=lambda batch: {"held-out nDCG@10": torch.tensor(batch / 8)})
    trainer = new_trainer(new_hf_model(), "1ep", callbacks=[exporter])
    trainer.fit()
    trainer.close()
    assert "| held-out nDCG@10 | – | 0.5000 |" in (tmp_path / "epoch_0" / "README.md").read_text()


def exports_with(folder, figures, best=None):
    """Return the target of the `best` link after each of four exports with these metrics."""
    measured = iter(figures)
    exporter = new_exporter(folder, figures=lambda batch: next(measured), best_by="first_token/ndcg@10")
    if best is not None:
        exporter._best = best
    pointed = []

    class Look(Callback):
        def epoch_checkpoint(self, state, logger):
            link = folder / "best"
            pointed.append(link.readlink().name if link.is_symlink() else None)

    exporter._write = lambda state, target, weights: target.mkdir(parents=True, exist_ok=True)
    trainer = new_trainer(new_hf_model(), "4ep", callbacks=[exporter, Look()])
    trainer.fit()
    trainer.close()
    return pointed, exporter._best


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
    assert state["figure"] == max(value for value in values if not math.isnan(value))


def test_a_resumed_run_remembers_the_best_export(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "best").symlink_to("epoch_9")
    figures = [{"eval/first_token/ndcg@10": value} for value in (0.5, 0.8, 0.81, 0.1)]
    pointed, _ = exports_with(folder, figures, best={"figure": 0.8, "name": "epoch_9"})
    assert pointed == ["epoch_9", "epoch_9", "epoch_2", "epoch_2"]


def test_a_missing_metric_warns_and_links_nothing(tmp_path):
    with pytest.warns(UserWarning, match=r"best_by: no metric 'first_token/ndcg@10' at epoch_0; .*best is unchanged"):
        pointed, _ = exports_with(tmp_path / "hf", [{}, {"eval/first_token/ndcg@10": 0.1}, {}, {}])
    assert pointed == [None, "epoch_1", "epoch_1", "epoch_1"]


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
    folder = export_checkpoints([checkpoint], tmp_path / "m", served(model), "#")
    assert torch.equal(probe_logits(load(folder)), probe_logits(model))
    trainer.close()


def test_checkpoints_of_adapters_become_adapter_folders(tmp_path, lora_model):
    options = {"save_folder": str(tmp_path / "checkpoints"), "save_interval": "1ep"}
    trainer = new_trainer(lora_model, "1ep", **options)
    trainer.fit()
    checkpoint = tmp_path / "checkpoints" / "ep1-ba4-rank0.pt"
    with pytest.raises(ModelError, match=r"holds 8 tensors of an adapter"):
        export_checkpoints([checkpoint], tmp_path / "m", served(lora_model), "#")
    adapter_config = lora_model.model.peft_config["default"]
    folder = export_checkpoints([checkpoint], tmp_path / "m", served(lora_model, adapter_config=adapter_config), "#")
    assert torch.equal(probe_logits(PeftModel.from_pretrained(new_hf_model(), folder)), probe_logits(lora_model.model))
    trainer.close()


@pytest.mark.slow
def test_two_ranks_export_what_they_trained(tmp_path):
    """FSDP2 (tied, with activation checkpointing), DDP and LoRA under FSDP2; a failure on rank 0 reaches both ranks."""
    output = succeeded(launch(RANKS, tmp_path, folder=tmp_path))
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
    assert output.count("batch 2/2") == 4
    # The sharded checkpoint holds the same weights as the export beside it.
    model = load(tmp_path / "fsdp2" / "epoch_0")
    folder = export_checkpoints([tmp_path / "checkpoints" / "ep1-ba2"], tmp_path / "from_shards", served(model), "#")
    assert torch.equal(probe_logits(load(folder)), probe_logits(model))
    for rank in (0, 1):
        raised = (tmp_path / f"raised_{rank}").read_text()
        assert "is a folder without reranker.json" in raised
        assert raised.startswith("StoreError" if rank == 0 else "RunError: rank 0, export of")


def test_one_process_gathers_without_a_process_group():
    model = new_hf_model()
    assert gather_full_state_dict(model).keys() == model.state_dict().keys()
