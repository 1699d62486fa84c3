"""Small runs that write checkpoints and resume from them."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from composer.core import Callback
from composer.models import HuggingFaceModel
from peft import LoraConfig, get_peft_model

from rankllm_composer.checkpoints.folder import MANIFEST, complete_checkpoints, parse_manifest
from rankllm_composer.storage.content import hash_files
from rankllm_composer.training.checkpoint_callback import CheckpointFolder
from support.tiny_training import new_hf_model, new_tokenizer, new_trainer


class Draws(Callback):
    """Draw random numbers from every generator in each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, ...]] = []

    def batch_start(self, state, logger):
        self.seen.append((torch.rand(1).item(), np.random.rand(), random.random()))


def train(folder: Path, duration: str, *, interval: str = "1ba", family: str = "mistral", lora=False, **options):
    """Train with 4 batches per epoch; return the random draws, the final weights and the callback."""
    draws, checkpoints = Draws(), CheckpointFolder(folder, interval=interval, **options)
    model = new_hf_model(family)
    if lora:
        model = HuggingFaceModel(get_peft_model(model, LORA), new_tokenizer())
    trainer = new_trainer(model, duration, callbacks=[draws, checkpoints])
    if trainer.state.timestamp < trainer.state.max_duration:
        trainer.fit()
    checkpoints.finish()
    trainer.close()
    return draws.seen, {name: weight.clone() for name, weight in model.state_dict().items()}, checkpoints


LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def names(folder: Path) -> list[str]:
    return [path.name for path, _ in complete_checkpoints(folder)]


class Payload:
    """Creates a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def poison(checkpoint: Path, change) -> None:
    """Change the content of a checkpoint and update its manifest."""
    content = torch.load(checkpoint / "rank0.pt", weights_only=False)
    change(content["state"])
    torch.save(content, checkpoint / "rank0.pt")
    before = parse_manifest((checkpoint / MANIFEST).read_text())
    files, sha256 = {"rank0.pt": (checkpoint / "rank0.pt").stat().st_size}, hash_files(checkpoint, ["rank0.pt"])
    (checkpoint / MANIFEST).write_text(replace(before, files=files, sha256=sha256).to_json())
