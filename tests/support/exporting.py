"""Write and export tiny models."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path

from rankllm_composer.errors import StoreError
from rankllm_composer.export.model_card import CardFacts
from rankllm_composer.export.model_folder import ServedModel, write_model_folder
from rankllm_composer.recipe.sections import Export
from rankllm_composer.training.export_callback import ExportFolder
from support.contracts import new_contract
from support.tiny_training import new_hf_model, new_tokenizer


def write(folder: Path, model=None, *, weights=None, card="# card\n", max_shard_size="5GB", **changes) -> Path:
    model = model if model is not None else new_hf_model()
    weights = model.state_dict() if weights is None else weights
    return write_model_folder(folder, weights, served(model, **changes), card, max_shard_size=max_shard_size)


def served(model, **changes) -> ServedModel:
    values = {"config": model.config, "tokenizer": new_tokenizer(), "contract": new_contract(), "dtype": "float32"}
    return ServedModel(**values | changes)


def new_exporter(folder: Path, family: str = "mistral", *, tokenizer=None, **options) -> ExportFolder:
    changes = {} if tokenizer is None else {"tokenizer": tokenizer}
    facts = CardFacts(name="tiny", base_model=None, contract=new_contract())
    keys = {name: options.pop(name) for name in ("interval", "keep", "merge_lora") if name in options}
    model = served(new_hf_model(family), **changes)
    return ExportFolder(folder, model=model, facts=facts, options=Export(**keys), **options)


def write_on_a_full_disk(folder: Path, report: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # in the middle of the weights
    try:
        write(folder)
    except StoreError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        report.write_text(str(error))


def run_in_a_child(task, *arguments) -> int:
    child = multiprocessing.get_context("fork").Process(target=task, args=arguments)
    child.start()
    child.join(120)
    return child.exitcode
