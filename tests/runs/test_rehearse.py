"""Run every recipe in yamls/ on CPU: two ranks under FSDP2, a tiny random model of its architecture, a few batches,
checkpoint, resume, export, reload. The data is the six golden lists, repeated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.launching import ON_CPU, REPOSITORY, metrics, succeeded, train
from support.small_tokenizers import CHATML, LLAMA3_WORDS, QWEN_WORDS, byte_level_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen3Config

from rankllm_composer.cli import main
from rankllm_composer.prompts.contract import chat_template_sha256, read_contract
from rankllm_composer.prompts.encoding import encode_record
from rankllm_composer.prompts.record import Record
from rankllm_composer.ranking.evaluation import EvaluationOptions, evaluate_windows, summarize
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.training.run_files import read_metrics

RECIPES = sorted((REPOSITORY / "yamls").glob("*.yaml"))
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NO_THINKING = (
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def material(tmp_path_factory, golden, mistral_v3_tokenizer, zephyr_v1_tokenizer):
    """Return a folder with 24 records and, per base model, a folder with its tokenizer and a tiny configuration."""
    folder = tmp_path_factory.mktemp("rehearse")
    records = json.loads((golden / "records.json").read_text())
    copies = [dict(record, id=f"{record['id']}-{copy}") for copy in range(4) for record in records]
    (folder / "records.json").write_text(json.dumps(copies))
    (folder / "windows.json").write_text(json.dumps(records[:3]))
    seen = [turn["value"] for record in records for turn in record["conversations"]]
    qwen = byte_level_tokenizer(QWEN_WORDS, 3000, seen)
    qwen.chat_template = CHATML.removesuffix("{% endif %}") + NO_THINKING + "{% endif %}"
    llama = byte_level_tokenizer(LLAMA3_WORDS, 3000, seen)
    llama.chat_template = "{{ bos_token }}Today: {{ strftime_now('%d %b %Y') }}\n" + CHATML
    llama.bos_token = "<|im_start|>"
    bases = {
        "mistral": (mistral_v3_tokenizer, MistralConfig, {"sliding_window": None, "rope_theta": 1e6}),
        "zephyr": (zephyr_v1_tokenizer, MistralConfig, {"sliding_window": 4096}),
        "qwen3": (qwen, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
        "qwen3_8b": (qwen, Qwen3Config, {"head_dim": 16}),
        "llama": (llama, LlamaConfig, {"tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE}),
    }
    for name, (tokenizer, config, keys) in bases.items():
        tokenizer.save_pretrained(folder / name)
        config(**TINY, **keys, vocab_size=len(tokenizer), max_position_embeddings=32768).save_pretrained(folder / name)
    return folder


def base_of(recipe: Path) -> str:
    """Name of the tiny base model that takes the place of a recipe's."""
    names = ("zephyr", "qwen3_8b", "qwen3", "llama")
    if recipe.stem == "small_data":
        return "qwen3"
    return next((name for name in names if name in recipe.stem), "mistral")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_rehearsal(recipe: Path, material: Path, tmp_path: Path):
    base = base_of(recipe)
    overlay = [
        *ON_CPU,
        "run.folder=run",
        f"model.name_or_path={material / base}",
        "model.tokenizer=null",
        "model.random_weights=true",
        "model.config_overrides={}",
        "data.train.local=shards",
        "data.train.remote=null",
        f"data.train.source={{input: {material / 'records.json'}}}",
        "data.max_length_tokens=2048",
        "batch.global_lists=8",
        "batch.microbatch_lists=null",
        "batch.microbatch_tokens=2048",
        "parallelism.fsdp=true",
        "schedule.warmup=2ba",
        "checkpoint.interval=1ep",
        f"data.eval={{local: windows, source: {{input: {material / 'windows.json'}}}}}",
        "evaluation={interval: 1ep, decodings: [first_token], num_shuffles: 1}",
    ]
    if load_recipe(recipe).model.lora is not None:
        overlay.append("model.lora.frozen_precision=fp32")
    succeeded(train(recipe, *overlay, "run.max_duration=1ep", folder=tmp_path))
    succeeded(train(recipe, *overlay, "run.max_duration=2ep", folder=tmp_path))

    lines = metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["batch"] for line in lines] == [1, 2, 3, 4, 5, 6]  # resumed after batch 3, no batch repeated
    assert all(np.isfinite(line["loss/train/total"]) for line in lines)
    keys = load_recipe(recipe)
    if keys.schedule.name == "cosine":  # two updates of warmup, then half a cosine over the other four
        shape = [0.5 * (1 + np.cos(np.pi * done / 4)) for done in (1, 2, 3)]
        assert [line["lr"] / keys.optimizer.lr for line in lines[3:]] == pytest.approx(shape)
    assert lines[-1]["data/lists_trained"] == 24 and lines[-1]["data/lists_too_long"] == 0

    validated = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval/windows" in line]
    assert [line["eval/windows"] for line in validated] == [3, 3]
    assert all(-1 <= line["eval/first_token/tau"] <= 1 for line in validated)

    export = tmp_path / "run" / "hf" / "epoch_1"
    assert "eval/first_token/tau" in (export / "README.md").read_text()
    contract = read_contract(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)
    assert contract.chat_template_sha256 == chat_template_sha256(tokenizer)
    families = {"qwen3": "Qwen3", "qwen3_8b": "Qwen3", "llama": "Llama"}
    assert type(model).__name__ == f"{families.get(base, 'Mistral')}ForCausalLM" and model.config.use_cache
    assert contract.bracket_merges == (base in families)
    stored = [name for name in load_file(export / "model.safetensors") if "embed_tokens" in name or "lm_head" in name]
    assert len(stored) == (1 if base in ("qwen3", "llama") else 2)  # tied embeddings are stored once
    record = json.loads((material / "records.json").read_text())[3]
    ids = encode_record(record, tokenizer, contract.objective).input_ids
    windows = [Record.from_conversations(record) for record in json.loads((material / "windows.json").read_text())]
    options = EvaluationOptions(decodings=["first_token"], num_shuffles=1, seed=keys.run.seed)
    figures = summarize(evaluate_windows(model, tokenizer, windows, contract, options))
    # Two ranks that share three windows and a sharded model agree with the exported model in one process.
    assert {f"eval/{name}": value for name, value in figures.items()} == pytest.approx(
        {name: value for name, value in validated[-1].items() if name.startswith("eval/")}
    )
    with torch.no_grad():
        assert model(torch.from_numpy(ids.astype(np.int64))[None]).logits.isfinite().all()

    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "run")])
    assert not ended.value.code
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f'<figure class="{name}">' in page for name in ("positions", "losses", "learning_rate", "throughput"))
    assert "s τ" in page and "Recipe of run" in page
