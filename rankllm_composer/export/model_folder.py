"""Exported model folders: weights, tokenizer, decoding contract and card, written atomically."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rankllm_composer.errors import ModelError
from rankllm_composer.export.weights import (
    Weights,
    check_tied,
    gather_full_state_dict,
    load_adapter,
    read_checkpoint_weights,
)
from rankllm_composer.prompts.client_names import warn_misread
from rankllm_composer.prompts.contract import CONTRACT_FILE, DecodingContract, chat_template_sha256
from rankllm_composer.redaction import redact
from rankllm_composer.storage.atomic import staged_folder

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Dtype = Literal["bfloat16", "float16", "float32"]
BEST = "best"


@dataclass(frozen=True)
class ServedModel:
    """Content of an exported folder besides the weights and the card."""

    config: PretrainedConfig  # not changed
    tokenizer: PreTrainedTokenizerBase  # with the chat template of training
    contract: DecodingContract
    generation_config: GenerationConfig | None = None  # of the base model; None = made from `config`
    dtype: Dtype = "bfloat16"  # of the weights on disk
    model_class: type[PreTrainedModel] | None = None  # None = the one that `AutoModelForCausalLM` picks
    adapter_config: Any | None = None  # of PEFT; with it the folder contains an adapter instead of a model

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ModelError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if chat_template_sha256(self.tokenizer) != self.contract.chat_template_sha256:
            raise ModelError(
                f"tokenizer {self.tokenizer.name_or_path} has another chat template than the contract; expected the "
                "one of training. Make the contract from this tokenizer."
            )


def write_model_folder(
    folder: str | Path, weights: Weights, model: ServedModel, card: str, *, max_shard_size: str = "5GB"
) -> Path:
    """Write a folder that `AutoModelForCausalLM`, `AutoTokenizer` and the inference client load.

    It is complete or absent, as in `staged_folder`, and replaces an earlier export of the same name.

    Args:
        folder: local path.
        weights: full weights on the CPU, named as in the HF model; with an adapter configuration the adapter's alone.
        card: text of `README.md`; credentials in it are redacted.
    Raises:
        ModelError: the weights do not fit the configuration, or the tokenizer has more tokens than the model.
        StoreError: something else is at that path, or there is no space. Nothing is left behind in any case.
    """
    target = local_path(folder)
    warn_misread(target)
    if len(model.tokenizer) > model.config.vocab_size:
        raise ModelError(
            f"tokenizer {model.tokenizer.name_or_path} has {len(model.tokenizer)} tokens but the model only "
            f"{model.config.vocab_size}. Resize the embeddings before training."
        )
    dtype = DTYPES[model.dtype]
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    num_bytes = sum(tensor.nbytes for tensor in cast.values())
    with staged_folder(target, mark=CONTRACT_FILE, num_bytes=num_bytes) as stage:
        if model.adapter_config is not None:
            _write_adapter(stage, cast, model.adapter_config)
        else:
            _write_model(stage, cast, model, max_shard_size)
        # Older readers look for the chat template in tokenizer_config.json only.
        model.tokenizer.save_pretrained(stage, save_jinja_files=False)
        (stage / CONTRACT_FILE).write_text(model.contract.to_json(), encoding="utf-8")
        (stage / "README.md").write_text(redact(card), encoding="utf-8")
    return target


def export_checkpoint(
    checkpoint: str | Path, folder: str | Path, model: ServedModel, card: str, *, base: torch.nn.Module | None = None
) -> Path:
    """Turn a Composer checkpoint, in one file or sharded, into a model folder, as `write_model_folder` does.

    Args:
        base: PEFT model that a checkpoint's adapter is loaded into and merged with; full weights need none.
    Raises:
        ModelError: the checkpoint cannot be read, or holds an adapter without `base` or an adapter configuration; see
            also `write_model_folder`.
    """
    weights = read_checkpoint_weights(checkpoint)
    adapter = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    if adapter and base is not None:
        load_adapter(base, adapter)
        weights = gather_full_state_dict(base, dtype=DTYPES[model.dtype])
    elif adapter and model.adapter_config is not None:
        weights = {re.sub(r"(\.lora_\w+)\.\w+(\.weight)?$", r"\1\2", name): tensor for name, tensor in adapter.items()}
    elif adapter:
        raise ModelError(
            f"{checkpoint} holds {len(adapter)} tensors of an adapter; expected full weights. Give the adapter's "
            "configuration to export the adapter, or the base model to merge it into."
        )
    return write_model_folder(folder, weights, model, card)


def local_path(folder: str | Path) -> Path:
    if "://" in str(folder):
        raise ModelError(f"{folder} is a URL; expected a local folder. Copy the finished export there.")
    return Path(os.path.abspath(folder))  # noqa: PTH100  (Path.resolve would follow the links a user made)


def _served_config(model: ServedModel) -> tuple[PretrainedConfig, GenerationConfig]:
    """Configurations for serving: a key-value cache, no trace of training's attention, greedy decoding.

    Answers end at the token training ended them with, besides those of the base model.
    """
    from transformers import GenerationConfig

    tokenizer = model.tokenizer
    served = copy.deepcopy(model.config)
    served.use_cache = True
    served._attn_implementation = None
    served.torch_dtype = DTYPES[model.dtype]
    generation = copy.deepcopy(model.generation_config or GenerationConfig.from_model_config(served))
    generation._from_model_config = False
    generation.do_sample = False
    defaults = GenerationConfig()  # type: ignore[no-untyped-call]
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


def _write_model(stage: Path, weights: Weights, model: ServedModel, max_shard_size: str) -> None:
    """Weights, config.json and generation_config.json through `save_pretrained` of a model without storage."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    served, generation = _served_config(model)
    skeleton_config = copy.deepcopy(served)
    skeleton_config._attn_implementation = "eager"
    with torch.device("meta"), no_init_weights():
        if model.model_class is None:
            make: Any = AutoModelForCausalLM.from_config
            skeleton = make(skeleton_config, torch_dtype=served.torch_dtype)
        else:
            skeleton = model.model_class._from_config(skeleton_config, torch_dtype=served.torch_dtype)
    skeleton.config = served
    skeleton.generation_config = generation

    known = set(skeleton.state_dict())
    tied = set(skeleton._tied_weights_keys or ()) & known if served.tie_word_embeddings else set()
    embedding = next(
        name for name, tensor in skeleton.named_parameters() if tensor is skeleton.get_input_embeddings().weight
    )
    for head in tied:
        check_tied(weights, served, head, embedding)
        weights.pop(head, None)
    missing, unknown = sorted(known - tied - set(weights)), sorted(set(weights) - known)
    if missing or unknown:
        raise ModelError(
            f"weights: {len(missing)} missing {missing[:3]} and {len(unknown)} unknown {unknown[:3]}; expected those "
            f"of {type(skeleton).__name__}. Give the configuration of the model that was trained."
        )
    for name, parameter in skeleton.named_parameters():
        if name in weights and weights[name].shape != parameter.shape:
            raise ModelError(
                f"weights: {name} of shape {tuple(weights[name].shape)}, but the configuration has "
                f"{tuple(parameter.shape)}. Give the configuration of the model that was trained."
            )
    skeleton.save_pretrained(stage, state_dict=weights, max_shard_size=max_shard_size, safe_serialization=True)


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
