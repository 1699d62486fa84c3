"""Exported model folders: weights, tokenizer, decoding contract and card, there as a whole or not at all."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rankllm_composer.errors import ModelError
from rankllm_composer.export.weights import Weights, check_tied, read_checkpoint_weights
from rankllm_composer.prompts.client_names import warn_misread
from rankllm_composer.prompts.contract import (
    CONTRACT_FILE,
    DecodingContract,
    chat_template_sha256,
)
from rankllm_composer.redaction import redact
from rankllm_composer.storage.atomic import staged_folder

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


Dtype = Literal["bfloat16", "float16", "float32"]


BEST = "best"


def write_model_folder(
    folder: str | Path,
    *,
    state_dict: Mapping[str, torch.Tensor],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    contract: DecodingContract,
    card: str,
    generation_config: GenerationConfig | None = None,
    dtype: Dtype = "bfloat16",
    max_shard_size: str = "5GB",
    model_class: type[PreTrainedModel] | None = None,
    adapter_config: Any | None = None,
) -> Path:
    """Writes a folder that `AutoModelForCausalLM`, `AutoTokenizer` and the inference client load.

    It is written beside its place and renamed into it, so a killed process leaves no half folder; what killed
    processes left there is cleaned up, and an earlier export of the same name is replaced.

    Args:
        folder: local path of the folder.
        state_dict: full weights on the CPU, named as in the HF model; the adapter's alone with `adapter_config`.
        config: of the model; not changed.
        tokenizer: with the chat template of training.
        contract: written as `reranker.json`.
        card: text of `README.md`; what looks like a credential is blotted out.
        generation_config: of the base model. None = made from `config`.
        dtype: of the weights on disk.
        max_shard_size: bytes of a weights file, such as "5GB".
        model_class: HF class of the model. None = the one `AutoModelForCausalLM` picks.
        adapter_config: PEFT configuration: the folder holds an adapter instead of a model.
    Returns:
        The folder.
    Raises:
        ModelError: weights that do not fit the configuration, or a tokenizer that does not fit the contract.
        StoreError: something else at that path, or no space. Nothing is left behind in any case.
    """
    target = _local_path(folder)
    warn_misread(target)
    _check_tokenizer(tokenizer, config, contract)
    if dtype not in DTYPES:
        raise ModelError(f"dtype: found {dtype!r}, allowed are {', '.join(DTYPES)}")
    weights = {
        name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()
    }
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    with staged_folder(target, mark=CONTRACT_FILE, num_bytes=num_bytes) as stage:
        if adapter_config is not None:
            _write_adapter(stage, weights, adapter_config)
        else:
            served = _served_config(config, tokenizer, generation_config, DTYPES[dtype])
            _write_model(stage, weights, *served, max_shard_size, model_class)
        # Older readers know the chat template in tokenizer_config.json only.
        tokenizer.save_pretrained(stage, save_jinja_files=False)
        (stage / CONTRACT_FILE).write_text(contract.to_json(), encoding="utf-8")
        (stage / "README.md").write_text(redact(card), encoding="utf-8")
    return target


def export_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    contract: DecodingContract,
    card: str,
    generation_config: GenerationConfig | None = None,
    dtype: Dtype = "bfloat16",
    adapter_config: Any | None = None,
) -> Path:
    """Turns a Composer checkpoint, in one file or sharded, into a model folder.

    Args:
        checkpoint: file, folder of shards, or a link to either; no code in it is run.
        folder: see `write_model_folder`, as all that follows.
        config: of the model that was trained.
        tokenizer: with the chat template of training.
        contract: written as `reranker.json`.
        card: text of `README.md`.
        generation_config: of the base model.
        dtype: of the weights on disk.
        adapter_config: PEFT configuration, if the checkpoint holds an adapter.
    Raises:
        ModelError: a checkpoint that cannot be read.
        ModelError: see `write_model_folder`; or an adapter without its configuration.
    """
    weights = read_checkpoint_weights(checkpoint)
    adapter = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    if adapter and adapter_config is None:
        raise ModelError(
            f"{checkpoint}: found {len(adapter)} tensors of an adapter, allowed are full weights; "
            "give adapter_config to export the adapter",
        )
    if adapter_config is not None:
        weights = {re.sub(r"(\.lora_\w+)\.\w+(\.weight)?$", r"\1\2", name): tensor for name, tensor in adapter.items()}
    return write_model_folder(
        folder,
        state_dict=weights,
        config=config,
        tokenizer=tokenizer,
        contract=contract,
        card=card,
        generation_config=generation_config,
        dtype=dtype,
        adapter_config=adapter_config,
    )


def _local_path(folder: str | Path) -> Path:
    if "://" in str(folder):
        raise ModelError(f"{folder}: found a URL, allowed is a local folder; copy the finished export there")
    return Path(os.path.abspath(folder))  # noqa: PTH100  (Path.resolve would follow the links a user made)


def _check_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig | None,
    contract: DecodingContract,
) -> None:
    if chat_template_sha256(tokenizer) != contract.chat_template_sha256:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path}: found another chat template than the contract's, allowed is the one "
            "of training; make the contract from this tokenizer",
        )
    if config is not None and len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path}: found {len(tokenizer)} tokens, the model knows {config.vocab_size}; "
            "resize the embeddings before training",
        )


def _served_config(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    dtype: torch.dtype,
) -> tuple[PretrainedConfig, GenerationConfig]:
    """Configurations for serving: a key-value cache, no trace of training's attention, greedy decoding.

    Answers end at the token training ended them with, besides those of the base model.
    """
    from transformers import GenerationConfig

    served = copy.deepcopy(config)
    served.use_cache = True
    served._attn_implementation = None
    served.torch_dtype = dtype
    generation = copy.deepcopy(generation_config or GenerationConfig.from_model_config(served))
    generation._from_model_config = False
    generation.do_sample = False
    defaults = GenerationConfig()
    for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
        for holder in (generation, served):
            if name in vars(holder):
                setattr(holder, name, getattr(defaults, name))
    eos = generation.eos_token_id
    stops = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.insert(0, tokenizer.eos_token_id)
    generation.eos_token_id = served.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    generation.bos_token_id = tokenizer.bos_token_id
    generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return served, generation


def _write_model(
    stage: Path,
    weights: Weights,
    served: PretrainedConfig,
    generation: GenerationConfig,
    max_shard_size: str,
    model_class: type[PreTrainedModel] | None,
) -> None:
    """Weights, config.json and generation_config.json through `save_pretrained` of a model without storage."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    skeleton_config = copy.deepcopy(served)
    skeleton_config._attn_implementation = "eager"
    with torch.device("meta"), no_init_weights():
        if model_class is None:
            model = AutoModelForCausalLM.from_config(skeleton_config, torch_dtype=served.torch_dtype)
        else:
            model = model_class._from_config(skeleton_config, torch_dtype=served.torch_dtype)
    model.config = served
    model.generation_config = generation

    known = set(model.state_dict())
    tied = set(model._tied_weights_keys or ()) & known if served.tie_word_embeddings else set()
    embedding = next(name for name, tensor in model.named_parameters() if tensor is model.get_input_embeddings().weight)
    for head in tied:
        check_tied(weights, served, head, embedding)
        weights.pop(head, None)
    missing, unknown = sorted(known - tied - set(weights)), sorted(set(weights) - known)
    if missing or unknown:
        raise ModelError(
            f"weights: found {len(missing)} missing {missing[:3]} and {len(unknown)} unknown {unknown[:3]}, allowed "
            f"are those of {type(model).__name__}; give the configuration of the model that was trained",
        )
    for name, parameter in model.named_parameters():
        if name in weights and weights[name].shape != parameter.shape:
            raise ModelError(
                f"weights: found {name} of shape {tuple(weights[name].shape)}, the configuration says "
                f"{tuple(parameter.shape)}; give the configuration of the model that was trained",
            )
    model.save_pretrained(stage, state_dict=weights, max_shard_size=max_shard_size, safe_serialization=True)


def _write_adapter(stage: Path, weights: Weights, adapter_config: Any) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        stage / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    served = copy.deepcopy(adapter_config)
    served.inference_mode = True
    served.save_pretrained(stage)
