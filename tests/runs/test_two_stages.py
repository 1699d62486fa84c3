"""`make reproduce-zephyr STAGES=2` with a tiny model: stage 2 starts from the export of stage 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.launching import ON_CPU, REPOSITORY, metrics
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from rankllm_composer.prompts.encoding import encode_record

NUM_LISTS = 6
SET = [
    *ON_CPU,
    "neftune=null",
    "data.max_length_tokens=2048",
    f"batch.global_lists={NUM_LISTS}",
    "batch.microbatch_tokens=2048",
    "optimizer.lr=1e-2",
    "schedule.warmup=1ba",
]


def language_modelling_loss(folder: Path, records: list[dict]) -> float:
    """Return the mean loss over all response tokens, from a plain Hugging Face forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats = []
    for record in records:
        encoded = encode_record(record, tokenizer, "generation")
        ids = torch.from_numpy(encoded.input_ids.astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, encoded.response_start - 1 : -1]
        nats.append(torch.nn.functional.cross_entropy(logits, ids[encoded.response_start :], reduction="none"))
    return float(torch.cat(nats).mean())


@pytest.mark.slow
def test_stage_2_starts_from_the_export_of_stage_1(tmp_path, golden, zephyr_v1_tokenizer):
    for name in ("rankllm_composer", "yamls", "Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    base = tmp_path / "base"
    zephyr_v1_tokenizer.save_pretrained(base)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, vocab_size=32000)).save_pretrained(base)
    records = json.loads((golden / "records.json").read_text())
    for name in ("large", "small"):
        named = [dict(record, id=f"{name}-{record['id']}") for record in records]
        (tmp_path / f"{name}.json").write_text(json.dumps(named[::-1] if name == "small" else named))
    job = ["make", "-o", "setup", "-o", ".venv/.installed", f"BIN={Path(sys.executable).parent}", "reproduce-zephyr"]
    variables = [
        "STAGES=2",
        "NPROC=2",
        "SLOW=1",
        "MODEL=base",
        "DATA=large.json",
        "DATA2=small.json",
        f"SET={' '.join(SET)}",
    ]
    subprocess.run([*job, *variables], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    first, second = (metrics(tmp_path / "runs" / f"rank_zephyr_stage{stage}" / "metrics.jsonl") for stage in (1, 2))
    assert len(first) == len(second) == 3  # one update per epoch
    exported = tmp_path / "runs" / "rank_zephyr_stage1" / "hf" / "epoch_2"
    began, ended = language_modelling_loss(base, records), language_modelling_loss(exported, records)
    assert first[0]["loss/train/total"] == pytest.approx(began, rel=1e-4)
    assert second[0]["loss/train/total"] == pytest.approx(ended, rel=1e-4)
    assert ended < began - 0.01
    assert (tmp_path / "runs" / "rank_zephyr_stage2" / "hf" / "epoch_2" / "reranker.json").exists()
