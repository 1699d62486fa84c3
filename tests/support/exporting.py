"""Shared by tests: exporting."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path

from rankllm_composer.errors import StoreError
from rankllm_composer.export.model_card import CardFacts
from rankllm_composer.export.model_folder import write_model_folder
from rankllm_composer.training.export_callback import ExportFolder
from support.contracts import new_contract
from support.tiny_training import new_hf_model, new_tokenizer


def write(folder: Path, model=None, **changes) -> Path:
    model = model if model is not None else new_hf_model()
    values = {
        "state_dict": model.state_dict(),
        "config": model.config,
        "tokenizer": new_tokenizer(),
        "contract": new_contract(),
        "card": "# card\n",
        "dtype": "float32",
    }
    return write_model_folder(folder, **values | changes)


def new_exporter(folder: Path, **options) -> ExportFolder:
    facts = CardFacts(name="tiny", base_model=None, contract=new_contract())
    options = {"tokenizer": new_tokenizer(), "contract": facts.contract, "facts": facts, "dtype": "float32"} | options
    return ExportFolder(folder, **options)


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
