"""Base models and tokenizers: from the Hugging Face Hub or a folder, or with random weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    __version__,
)
from transformers.utils import cached_file, logging

from rankllm_composer.errors import ModelError, counted, first_line
from rankllm_composer.model.lora import is_adapter
from rankllm_composer.options import ModelOptions
from rankllm_composer.prompts.template import fix_date
from rankllm_composer.screen import warn
from rankllm_composer.storage.content import check_content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHOWN = 5
LFS_POINTER = b"version https://git-lfs"
DTYPE = "torch_dtype" if "torch_dtype" in vars(PretrainedConfig()) else "dtype"
"""The weights' type in configurations, `from_config` and `from_pretrained`, renamed in transformers 4.56."""
REBUILDS_TOKENIZERS = int(__version__.partition(".")[0]) >= 5
"""Whether transformers builds some tokenizers, such as Zephyr's, from the vocabulary in tokenizer.json alone."""
_ACCESS = "Check the name and your access to it (HF_TOKEN), or set a local folder."


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or raise ModelError.

    Its pad token defaults to the EOS token; of several chat templates it keeps the default one.
    """
    name_or_path = options.tokenizer or options.name_or_path
    if options.trust_remote_code:
        warn_trust_remote_code(name_or_path)
    try:
        where = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **where)
        if REBUILDS_TOKENIZERS and _is_rebuilt(tokenizer, name_or_path, options.revision):
            padding_side = tokenizer.padding_side
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name_or_path, padding_side=padding_side, **where)
    except Exception as error:  # damaged files raise almost anything
        raise ModelError(f"model.tokenizer: cannot load {name_or_path!r}: {first_line(error)}. {_ACCESS}") from error
    if options.template_date is not None:
        fix_date(tokenizer, options.template_date)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if isinstance(tokenizer.chat_template, dict):  # such as those of Command-R and Mixtral
        if "default" not in tokenizer.chat_template:
            raise ModelError(
                f"model.tokenizer: {name_or_path!r} has the chat templates {', '.join(tokenizer.chat_template)}, and "
                "none is named default; expected one that writes a user turn. Set model.tokenizer to a local copy with "
                "that template alone in chat_template.jinja."
            )
        tokenizer.chat_template = tokenizer.chat_template["default"]
    return tokenizer


def _is_rebuilt(tokenizer: PreTrainedTokenizerBase, name_or_path: str, revision: str | None) -> bool:
    """Whether there is a tokenizer.json, and transformers took only the vocabulary from it."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or type(tokenizer) is PreTrainedTokenizerFast:
        return False
    if not type(tokenizer).__module__.startswith("transformers."):
        return False
    found = cached_file(name_or_path, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    return found is not None


def load_config(options: ModelOptions) -> PretrainedConfig:
    """Load the configuration of a model, with `options.config_overrides`.

    Raises:
        ModelError: it cannot be loaded, is not of a causal LM, names a quantization or a kernel of a hub repository, or
            lacks a key of the overrides.
    """
    name_or_path, trust = options.name_or_path, options.trust_remote_code
    if trust:
        warn_trust_remote_code(name_or_path)
    if is_adapter(name_or_path):
        raise ModelError(
            f"{name_or_path} is a LoRA adapter without the model that it changes. Merge it (rankllm-composer export "
            "RUN --output FOLDER --merge-lora); or, to train it further, name it in model.lora.start_from and the base "
            "model in model.name_or_path."
        )
    try:
        written, _ = PretrainedConfig.get_config_dict(name_or_path, revision=options.revision)
        _refuse_kernels(written, name_or_path)
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name_or_path, revision=options.revision, trust_remote_code=trust
        )
    except ModelError:
        raise
    except Exception as error:  # damaged files raise almost anything
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model.name_or_path: {name_or_path} comes with Python code of its own, which is not run "
                "(trust_remote_code). Read that code, then set model.trust_remote_code=true, or use a model that "
                "transformers contains."
            ) from error
        raise ModelError(f"model.name_or_path: cannot load {name_or_path!r}: {first_line(error)}. {_ACCESS}") from error
    check_config(config, name_or_path)
    unknown = sorted(set(options.config_overrides) - set(config.to_dict()))
    if unknown:
        raise ModelError(
            f"model.config_overrides contains {', '.join(unknown)}; expected keys of {type(config).__name__}. "
            "The config.json of the model lists them."
        )
    config.update(dict(options.config_overrides))
    return config


def check_config(config: PretrainedConfig, name: str) -> None:
    """Raise ModelError for a model that is quantized, or no causal LM."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        values = quantization if isinstance(quantization, Mapping) else vars(quantization)
        method = values.get("quant_method", "an unknown method")
        raise ModelError(
            f"{name}: the weights are quantized ({method}); expected float32, bfloat16 or float16. Use the model that "
            "they were made from; with model.lora.frozen_precision=bf16 it needs 2 bytes per weight."
        )
    known = type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in getattr(
        config, "auto_map", {}
    )
    if config.is_encoder_decoder or not known:
        architectures = ", ".join(config.architectures or ()) or config.model_type
        raise ModelError(f"{name} is {architectures}; expected a decoder-only causal LM. Use another model.")


def _refuse_kernels(written: Mapping[str, Any], name: str) -> None:
    """Raise ModelError if config.json names a kernel of a hub repository, "owner/repository:function"."""
    for key, value in written.items():
        if isinstance(value, Mapping):
            _refuse_kernels(value, name)
        elif isinstance(value, str) and "/" in value and ("implementation" in key or "kernel" in key):
            raise ModelError(
                f"{name}/config.json: {key} is {value!r}, compiled code of a hub repository, which would be downloaded "
                f"and run. Remove {key} from config.json."
            )


def load_causal_lm(
    options: ModelOptions,
    *,
    config: PretrainedConfig | None = None,
    attention: str | None = None,
    on_meta: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Load a causal LM in training mode from a checkpoint, or build it with random weights.

    Args:
        options: which model; a warning names a model whose own code is run.
        config: of `load_config`; None = load it.
        attention: name of the attention that the model is built with; None = its default.
        on_meta: allocate no memory; the weights come from rank 0 when the model is sharded.
        dtype: of the weights. float32 if they are trained; frozen weights may be bfloat16.
    Raises:
        ModelError: it cannot be loaded, or weights are missing.
    """
    config = config or load_config(options)
    trust = options.trust_remote_code
    if on_meta or options.random_weights:
        with torch.device("meta") if on_meta else nullcontext():
            model = new_causal_lm(config, dtype, attn_implementation=attention, trust_remote_code=trust)
    else:
        arguments = {DTYPE: dtype, "trust_remote_code": trust, "attn_implementation": attention}
        model = load_weights(options.name_or_path, config=config, revision=options.revision, **arguments)
    return model.train()


def new_causal_lm(config: PretrainedConfig, dtype: torch.dtype, **arguments: Any) -> PreTrainedModel:
    """Build a model whose weights have a type. Buffers keep theirs: rotary frequencies are exact in float32 only."""
    config = copy.deepcopy(config)  # transformers 5 changes it
    build: Any = AutoModelForCausalLM.from_config
    model: PreTrainedModel = build(config, **{DTYPE: dtype}, **arguments)
    return model


def load_weights(name_or_path: str, **arguments: Any) -> PreTrainedModel:
    """Load a causal LM with all its weights from safetensors; a warning lists those that it does not use.

    Args:
        arguments: of `from_pretrained`, `config` among them.
    Raises:
        ModelError: a file is damaged, or weights are missing or have other sizes; the message names them.
    """
    _check_files(Path(name_or_path))
    check_content(name_or_path)
    try:
        with without_progress_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                name_or_path, use_safetensors=True, output_loading_info=True, **arguments
            )
    except Exception as error:  # damaged files raise almost anything
        if "size mismatch" in str(error):
            found = (
                f"weights have other sizes than config.json says{_mismatch(Path(name_or_path), arguments['config'])}"
            )
            raise ModelError(f"{name_or_path}: {found}. Restore the config.json of these weights.") from error
        raise ModelError(
            f"{name_or_path}: the weights cannot be loaded ({first_line(error)}). Expected safetensors; convert or "
            "download them again."
        ) from error
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        hint = _renaming(missing, unused)
        raise ModelError(
            f"{name_or_path}: the files lack {counted(len(missing), 'weight')}: {_shown(missing)}; expected all of "
            f"{type(model).__name__}.{hint} Restore the files or the config.json that the weights belong to."
        )
    if unused:
        warn(f"{name_or_path}: unused weights ({len(unused)}): {_shown(unused)}", stacklevel=2)
    return model


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence transformers' bars, which every rank would print."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_files(folder: Path) -> None:
    """Raise ModelError for a safetensors file of a local folder that is damaged."""
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with path.open("rb") as stream:
            is_pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
        try:
            if not is_pointer:
                with safe_open(path, framework="pt"):
                    continue
            reason = "a Git LFS pointer, not the weights"
            remedy = "Fetch them with `git lfs pull`"
        except (SafetensorError, OSError) as error:
            reason = f"damaged or incomplete, {path.stat().st_size:,} bytes ({first_line(error)})"
            remedy = "Download it again"
        raise ModelError(f"{path} is {reason}. {remedy}.")


def _mismatch(folder: Path, config: PretrainedConfig) -> str:
    """The first weight of a local folder whose size is not that of the configuration, in parentheses."""
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (it is no mapping)
                found = tuple(weights.get_slice(name).get_shape())
                if name in expected and found != expected[name].shape:
                    return f" ({name} is {found}; expected {tuple(expected[name].shape)})"
    return ""


def _renaming(missing: Sequence[str], unused: Sequence[str]) -> str:
    """A sentence on a prefix that the names in the files have or lack."""
    for name in missing:
        other = next((other for other in unused if other.endswith(name) or name.endswith(other)), None)
        if other is not None:
            return f" The files have {other} for {name}: the names were changed when the weights were saved."
    return ""


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_SHOWN]) + (f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else "")


def warn_trust_remote_code(name_or_path: str) -> None:
    """Warn that Python code shipped with a model is about to run."""
    warn(f"model.trust_remote_code: Python code shipped with {name_or_path!r} will be run", stacklevel=3)
