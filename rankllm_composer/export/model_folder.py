"""Exported model folders: weights, tokenizer, decoding contract and card, written atomically."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rankllm_composer.errors import ModelError, StoreError, first_line
from rankllm_composer.export.tokenizer import probe_tokens, save_tokenizer
from rankllm_composer.export.weights import (
    Weights,
    gather_full_state_dict,
    is_of_adapter,
    is_tied,
    load_adapter,
    mean_weights,
    name_on_disk,
    read_checkpoint_weights,
)
from rankllm_composer.model.loading import DTYPE, without_progress_bars
from rankllm_composer.prompts.client_names import warn_misread
from rankllm_composer.prompts.contract import CONTRACT_FILE, DecodingContract, chat_template_sha256
from rankllm_composer.prompts.prompt_template import TEMPLATE_FILE
from rankllm_composer.redaction import redact
from rankllm_composer.storage.atomic import staged_folder
from rankllm_composer.storage.content import ExportContent, read_content, write_content

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Dtype = Literal["bfloat16", "float16", "float32"]
BEST = "best"
_DRY_RUN = ".dry-run-"
_KEPT = {
    "bos_token_id",
    "eos_token_id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict_in_generate",
    "transformers_version",
    "use_cache",
}
"""Attributes that the configurations of a model and of its generation both have, but that are no decoding settings."""


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
    folder: str | Path,
    weights: Weights,
    model: ServedModel,
    card: str,
    *,
    run: str = "",
    batch: int = 0,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a folder that `AutoModelForCausalLM`, `AutoTokenizer` and the inference client load.

    It is complete or absent, as in `staged_folder`, and replaces an earlier export of the same name.

    Args:
        folder: local path.
        weights: full weights on the CPU, named as in the HF model; with an adapter configuration the adapter's alone.
        card: text of `README.md`; credentials in it are redacted.
        run, batch: see `ExportContent`.
    Raises:
        ModelError: the weights do not fit the configuration, or the tokenizer has more tokens than the model.
        StoreError: something else is at that path, or there is no space. Nothing is left behind in any case.
    """
    target = local_path(folder)
    warn_misread(target, model.contract.client_version)
    dtype = DTYPES[model.dtype]
    saved = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    num_bytes = sum(tensor.nbytes for tensor in saved.values())
    with staged_folder(target, mark=CONTRACT_FILE, num_bytes=num_bytes) as stage:
        if model.adapter_config is not None:
            _write_adapter(stage, saved, model.adapter_config)
        else:
            skeleton = _skeleton(model, saved)
            with without_progress_bars():
                skeleton.save_pretrained(stage, state_dict=saved, max_shard_size=max_shard_size)
            _make_readable(stage / "config.json")
        _write_rest(stage, model, card)
        write_content(stage, run, batch)
    return target


def check_export(folder: Path, weights: Weights, model: ServedModel, card: str) -> None:
    """Try what `write_model_folder` does, without weights, beside the folders of `folder`, and load the result.

    Args:
        weights: on the meta device.
        card: as in `write_model_folder`.
    Raises:
        ModelError: the parts do not fit together, or cannot be saved and loaded.
        StoreError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_DRY_RUN}*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_DRY_RUN, dir=folder) as stage:
            if model.adapter_config is None:
                skeleton = _skeleton(model, dict(weights))
                skeleton.config.save_pretrained(stage)
                _served_config(model)[1].save_pretrained(stage)
                AutoConfig.from_pretrained(stage)
            _write_rest(Path(stage), model, card)
            load: Any = AutoTokenizer.from_pretrained
            loaded = load(stage)
            template, tokens = chat_template_sha256(loaded), probe_tokens(loaded)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds
        if isinstance(error, OSError) and error.errno is not None:
            raise StoreError(
                f"checkpoint.export.folder: {folder} cannot be written ({error.strerror}). Free space, correct the "
                "permissions, or choose another folder."
            ) from error
        raise ModelError(
            f"checkpoint.export: the model could not be exported ({first_line(error)}). Correct the files of "
            "model.name_or_path or model.tokenizer that this names, or set checkpoint.export: null."
        ) from error
    if template != model.contract.chat_template_sha256:
        raise ModelError(
            f"tokenizer {model.tokenizer.name_or_path}: the chat template changes when it is saved and loaded. Give "
            "the tokenizer one chat template."
        )
    if tokens != probe_tokens(model.tokenizer):
        raise ModelError(
            f"tokenizer {model.tokenizer.name_or_path}: the tokens of a text change when it is saved and loaded. Set "
            "model.tokenizer to a folder with a tokenizer.json that holds all of its settings."
        )


def exported_bytes(weights: Weights, dtype: Dtype) -> int:
    """Return the bytes of weights on disk."""
    size = DTYPES[dtype].itemsize
    return sum(t.numel() * (size if t.is_floating_point() else t.element_size()) for t in weights.values())


def exports_in(folder: Path) -> dict[str, ExportContent | None]:
    """Return the exported folders in a folder by name, by batch; None for one whose list of files cannot be read."""
    found: dict[str, ExportContent | None] = {}
    for path in folder.glob(f"*/{CONTRACT_FILE}"):
        if path.parent.name.startswith(".") or path.parent.is_symlink():
            continue
        try:
            found[path.parent.name] = read_content(path.parent)
        except ModelError:
            found[path.parent.name] = None
    return dict(sorted(found.items(), key=lambda item: (item[1].batch if item[1] else -1, item[0])))


def is_whole(folder: Path) -> bool:
    """Whether a folder is an export with all of its files."""
    content = exports_in(folder.parent).get(folder.name)
    return content is not None and all((folder / name).is_file() for name in content.sha256)


def export_checkpoints(
    checkpoints: Sequence[str | Path],
    folder: str | Path,
    model: ServedModel,
    card: str,
    *,
    batch: int = 0,
    base: torch.nn.Module | None = None,
) -> Path:
    """Turn a Composer checkpoint, in one file or sharded, or the mean of several, into a model folder.

    Args:
        checkpoints: at least one; of several the mean of their weights, see `mean_weights`.
        batch: optimizer steps before the last of them.
        base: PEFT model that a checkpoint's adapter is loaded into and merged with; full weights need none.
    Raises:
        ModelError: a checkpoint cannot be read, or holds an adapter without `base` or an adapter configuration, or
            several adapters are to be averaged without being merged; see also `write_model_folder`.
    """
    found = [_served_weights(checkpoint, model, base, is_alone=len(checkpoints) == 1) for checkpoint in checkpoints]
    weights = found[0] if len(found) == 1 else mean_weights(found)
    return write_model_folder(folder, weights, model, card, batch=batch)


def _served_weights(
    checkpoint: str | Path, model: ServedModel, base: torch.nn.Module | None, *, is_alone: bool
) -> Weights:
    """Weights of a checkpoint, named as in the folder."""
    weights = read_checkpoint_weights(checkpoint)
    adapter = {name: tensor for name, tensor in weights.items() if is_of_adapter(name)}
    if not adapter:
        return weights
    if base is not None:
        load_adapter(base, adapter)
        if is_alone:
            return gather_full_state_dict(base, dtype=DTYPES[model.dtype])
        return {name: tensor.clone() for name, tensor in gather_full_state_dict(base).items()}
    if model.adapter_config is None:
        raise ModelError(
            f"{checkpoint} holds {len(adapter)} tensors of an adapter; expected full weights. Give the adapter's "
            "configuration to export the adapter, or the base model to merge it into."
        )
    if not is_alone:
        raise ModelError(
            f"{checkpoint} holds an adapter; expected full weights, as the mean of adapters is not the adapter of the "
            "mean. Merge them with --merge-lora."
        )
    return {name_on_disk(name): tensor for name, tensor in adapter.items()}


def local_path(folder: str | Path) -> Path:
    if "://" in str(folder):
        raise ModelError(f"{folder} is a URL; expected a local folder. Copy the finished export there.")
    return Path(os.path.abspath(folder))  # noqa: PTH100  (Path.resolve would follow the links a user made)


def _served_config(model: ServedModel) -> tuple[PretrainedConfig, GenerationConfig]:
    """Configurations for serving: a key-value cache, no trace of training's attention, greedy decoding.

    Of the base model's generation settings only its length limit and its ends of an answer are kept; answers also end
    at the token training ended them with.
    """
    tokenizer = model.tokenizer
    served = copy.deepcopy(model.config)
    served.use_cache = True
    served._attn_implementation = None
    setattr(served, DTYPE, DTYPES[model.dtype])
    base = model.generation_config or GenerationConfig.from_model_config(served)
    generation = GenerationConfig(max_length=base.max_length)  # type: ignore[no-untyped-call]
    for name, default in vars(GenerationConfig()).items():  # type: ignore[no-untyped-call]
        if name in vars(served) and name not in _KEPT and not name.startswith("_"):
            setattr(served, name, default)
    eos = base.eos_token_id
    stops = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.insert(0, tokenizer.eos_token_id)
    generation.eos_token_id = served.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    generation.bos_token_id = tokenizer.bos_token_id
    generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return served, generation


def _skeleton(model: ServedModel, weights: Weights) -> PreTrainedModel:
    """A model without storage whose `save_pretrained` writes these weights; drops output layers that are tied.

    An output layer that differs from the embeddings, as after merging an adapter of one of the two, is not tied.
    """
    served, generation = _served_config(model)
    if len(model.tokenizer) > served.vocab_size:
        raise ModelError(
            f"tokenizer {model.tokenizer.name_or_path} has {len(model.tokenizer)} tokens but the model only "
            f"{served.vocab_size}. Resize the embeddings before training."
        )
    skeleton = _on_meta(model, served)
    known = set(skeleton.state_dict())
    tied: set[str] = set(skeleton._tied_weights_keys or ()) & known if served.tie_word_embeddings else set()
    embedding = next(
        name for name, tensor in skeleton.named_parameters() if tensor is skeleton.get_input_embeddings().weight
    )
    if not all(is_tied(weights, head, embedding) for head in tied):
        served.tie_word_embeddings = False
        skeleton, tied = _on_meta(model, served), set()
    skeleton.config, skeleton.generation_config = served, generation
    for head in tied:
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
    return skeleton


def _on_meta(model: ServedModel, served: PretrainedConfig) -> PreTrainedModel:
    config = copy.deepcopy(served)
    config._attn_implementation = "eager"
    make: Any = AutoModelForCausalLM.from_config if model.model_class is None else model.model_class._from_config
    with torch.device("meta"):
        skeleton: PreTrainedModel = make(config, **{DTYPE: getattr(served, DTYPE)})
    return skeleton


def _make_readable(path: Path) -> None:
    """Write the type of the weights and the rotary frequencies also in the form that older readers expect.

    Before transformers 4.56 the type is `torch_dtype`. Before 5 `rope_theta` and `rope_scaling` hold what
    `rope_parameters` does: without them a reader would silently use the frequencies of another model.
    """
    keys = json.loads(path.read_text(encoding="utf-8"))
    keys = {"torch_dtype" if name == "dtype" else name: value for name, value in keys.items()}
    rotary = keys.get("rope_parameters") or {}
    everywhere = rotary.get("full_attention", rotary)  # some models have a set of them per kind of layer
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in everywhere:
            keys.setdefault(name, everywhere[name])
    if everywhere.get("rope_type", "default") != "default":
        scaling = {name: value for name, value in everywhere.items() if name not in keys}
        keys.setdefault("rope_scaling", scaling)
    if "full_attention" in rotary and "sliding_attention" in rotary:
        keys.setdefault("rope_local_base_freq", rotary["sliding_attention"]["rope_theta"])
    path.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_rest(stage: Path, model: ServedModel, card: str) -> None:
    """Write tokenizer, contract, with its prompt template as a file for the inference client, and card."""
    save_tokenizer(model.tokenizer, stage)
    if model.contract.template is not None:
        (stage / TEMPLATE_FILE).write_text(model.contract.template.to_yaml(), encoding="utf-8")
    (stage / CONTRACT_FILE).write_text(model.contract.to_json(), encoding="utf-8")
    (stage / "README.md").write_text(redact(card), encoding="utf-8")


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
