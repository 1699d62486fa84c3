"""Every message in docs/troubleshooting.md is one that the code raises."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from support import exporting, guarded_updates
from support.launching import REPOSITORY
from support.real_tokenizers import build_tokenizer
from support.small_run import mark_trained
from support.synthetic_records import conversation
from support.templates import TEMPLATES
from support.tiny_rerankers import new_contract, new_tokenizer, record_of
from transformers import PretrainedConfig

from rankllm_composer.export.hub import push_export
from rankllm_composer.model.attention import choose_attention
from rankllm_composer.model.loading import load_config
from rankllm_composer.model.lora import check_starting_adapter
from rankllm_composer.model.loss_table import import_loss
from rankllm_composer.model.remote_code import code_refused
from rankllm_composer.options import ModelOptions, RerankOptions
from rankllm_composer.prompts.chat import template_notes
from rankllm_composer.prompts.encoding import encode_record
from rankllm_composer.prompts.identifier_tokens import check_tokenizer
from rankllm_composer.ranking.decoding import check_not_nan
from rankllm_composer.ranking.served_model import served_contract
from rankllm_composer.recipe.bundled import find_recipe
from rankllm_composer.recipe.checks import check_world
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.recipe.packages import check_packages
from rankllm_composer.sources.retrieval_files import load_queries, require_shared
from rankllm_composer.training import assembly
from rankllm_composer.training.devices import hide_gpus
from rankllm_composer.training.dry_run import Written, check_space
from rankllm_composer.training.guards import LossGuard
from rankllm_composer.training.rendezvous import VARIABLES, meet
from rankllm_composer.training.run import claim_run_folder, prepare_shards

PAGE = REPOSITORY / "docs" / "troubleshooting.md"
FIRST_MISTRAL = REPOSITORY / "yamls" / "first_mistral.yaml"
MESSAGES = re.findall(r"^\| `([^`]+)` \| ", PAGE.read_text(), re.MULTILINE)


class Tools:
    """A temporary folder and pytest's monkeypatch, which every case receives."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch


def first_mistral(*overrides: str):
    return load_recipe(FIRST_MISTRAL, overrides)


def batch_does_not_divide(tools: Tools) -> None:
    check_world(first_mistral("batch.global_lists=10"), 4)


def unknown_key(tools: Tools) -> None:
    first_mistral("objective.nam=x")


def no_local(tools: Tools) -> None:
    first_mistral("data.train.local=null")


def no_shards(tools: Tools) -> None:
    prepare_shards(first_mistral(f"data.train.local={tools.folder}", "data.train.source=null").data.train, "data.train")


def files_apart(tools: Tools) -> None:
    require_shared("query", ("run", ["q1"]), ("queries", {"x": "text"}))


def another_file(tools: Tools) -> None:
    (tools.folder / "bm25.trec").write_text("1 Q0 d1 1 9.5 bm25\n")
    load_queries(tools.folder / "bm25.trec")


def merged_identifiers(tools: Tools) -> None:
    encode_record(conversation(3, num_candidates=12, style="numbers"), build_tokenizer("mistral_v3"), "combined")


def no_template(tools: Tools) -> None:
    tokenizer = build_tokenizer("mistral_v3")
    tokenizer.chat_template = None
    check_tokenizer(tokenizer, "combined", "letters", 2)


def template_of_another_kind(tools: Tools) -> None:
    (tools.folder / "prompt.yaml").write_text(TEMPLATES["own_words"][1])
    first_mistral(f"data.prompt_template={tools.folder / 'prompt.yaml'}").data.prompt_template.check_reads(
        20, "numbers"
    )


def printed_date(tools: Tools) -> None:
    tokenizer = build_tokenizer("mistral_v3")
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    raise ValueError(next(template_notes(tokenizer)))  # a warning


def endless_template(tools: Tools) -> None:
    tokenizer = build_tokenizer("mistral_v3")
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    check_tokenizer(tokenizer, "combined", "letters", 2)


def no_flash(tools: Tools) -> None:
    choose_attention("flash_attention_2", "cpu")


def no_bitsandbytes(tools: Tools) -> None:
    tools.patch.setitem(sys.modules, "bitsandbytes", None)  # an import of it fails
    check_packages(first_mistral("optimizer.name=adamw_8bit", "parallelism.fsdp=false"))


def no_such_recipe(tools: Tools) -> None:
    find_recipe("mistral")


def no_such_loss(tools: Tools) -> None:
    import_loss("no_such_package.losses:mine")


def no_adapter(tools: Tools) -> None:
    check_starting_adapter(tools.folder / "adapter", {})


def no_token(tools: Tools) -> None:
    exporting.write(tools.folder / "export")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        tools.patch.delenv(name, raising=False)
    tools.patch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tools.folder / "absent"))
    push_export(tools.folder / "export", "me/mine")


def sharded_8bit(tools: Tools) -> None:
    first_mistral("optimizer.name=adamw_8bit")


def no_wandb(tools: Tools) -> None:
    tools.patch.setitem(sys.modules, "wandb", None)
    check_packages(first_mistral("logging.loggers={wandb: {}}"))


def no_gpu(tools: Tools) -> None:
    assembly.choose_device("gpu")


def gpus_counted_before(tools: Tools) -> None:
    tools.patch.setenv("CUDA_VISIBLE_DEVICES", "0")
    tools.patch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 1)  # the driver, on a machine with a GPU
    hide_gpus()


def another_recipe(tools: Tools) -> None:
    for text in ("run: {seed: 1}", "run: {seed: 2}"):
        with claim_run_folder(tools.folder, text):
            mark_trained(tools.folder)


def another_process(tools: Tools) -> None:
    with claim_run_folder(tools.folder, "run: {seed: 1}"), claim_run_folder(tools.folder, "run: {seed: 1}"):
        pass


def bad_loss(tools: Tools) -> None:
    guarded_updates.run([1.0, math.nan], LossGuard())


def no_relevant_window(tools: Tools) -> None:
    windows = SimpleNamespace(num_samples=1, record=lambda number: replace(record_of([0, 1]), grades=(0, 0)))
    tools.patch.setattr(assembly, "build_dataset", lambda *_: windows)
    keys = ["data.eval={local: windows}", "evaluation={best_by: first_token/ndcg@10}"]
    assembly.build_validation(first_mistral(*keys), new_contract(new_tokenizer()), new_tokenizer())


def full_disk(tools: Tools) -> None:
    check_space({tools.folder: Written("export", 3, 10**18)})


def another_runs_export(tools: Tools) -> None:
    exporting.write(tools.folder / "hf" / "epoch_0")
    exporting.new_exporter(tools.folder / "hf").after_load(None, None)  # type: ignore[arg-type]


def logits_that_are_nan(tools: Tools) -> None:
    check_not_nan(torch.full((1, 3), math.nan), [SimpleNamespace(id="q")])  # type: ignore[list-item]


def no_contract(tools: Tools) -> None:
    served_contract("model", None, new_tokenizer(), PretrainedConfig(), RerankOptions())


def code_of_a_model(tools: Tools) -> None:
    tools.folder.mkdir(exist_ok=True)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tools.folder / "config.json").write_text(json.dumps(config))
    with code_refused("the model"):
        load_config(ModelOptions(name_or_path=str(tools.folder)))


def exports_at_other_times(tools: Tools) -> None:
    keys = [
        "data.eval={local: w}",
        "evaluation={best_by: first_token/tau, interval: 2ep}",
        "checkpoint.export.interval=1ep",
    ]
    first_mistral(*keys)


def leftover_variables(tools: Tools) -> None:
    for name, value in zip(VARIABLES, ("1", "2", "1", "2", "127.0.0.1", "1")):
        tools.patch.setenv(name, value)
    meet(0.1)


CASES: dict[str, Callable[[Tools], None]] = {
    "batch.global_lists": batch_does_not_divide,
    "is an unknown key": unknown_key,
    "data.train.local": no_local,
    "data.train: no shards": no_shards,
    "share no query id": files_apart,
    "found …, read as": another_file,
    "is several tokens": merged_identifiers,
    "has no chat template": no_template,
    "does not match the answer": template_of_another_kind,
    "the chat template prints the date": printed_date,
    "it takes more than 200,000 steps": endless_template,
    "model.attention": no_flash,
    "optimizer.name is adamw_8bit, which": no_bitsandbytes,
    "optimizer.name is adamw_8bit with": sharded_8bit,
    "logging.loggers.wandb": no_wandb,
    "expected a path with": no_such_recipe,
    "objective.ranking_loss is": no_such_loss,
    "model.lora.start_from": no_adapter,
    "no token for": no_token,
    "parallelism.device is gpu": no_gpu,
    "parallelism.device is cpu": gpus_counted_before,
    "holds a run of another recipe": another_recipe,
    "another process is training in": another_process,
    "the loss is not finite": bad_loss,
    "which did not start": leftover_variables,
    "evaluation.best_by is …": no_relevant_window,
    "GB free, but the run adds": full_disk,
    "is the export of another run": another_runs_export,
    "logits contain NaN": logits_that_are_nan,
    "evaluation.best_by is set": exports_at_other_times,
    "has no reranker.json": no_contract,
    "comes with Python code": code_of_a_model,
}


def test_messages_and_cases_correspond_one_to_one():
    assert len(MESSAGES) == len(CASES) > 12
    for message in MESSAGES:
        assert sum(message.startswith(begin) for begin in CASES) == 1, message


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_raises_the_message(message, tmp_path, monkeypatch):
    (case,) = (case for begin, case in CASES.items() if message.startswith(begin))
    with pytest.raises(ValueError) as raised:
        case(Tools(tmp_path, monkeypatch))
    assert re.search(".*".join(map(re.escape, message.split("…"))), str(raised.value), re.DOTALL), str(raised.value)
