"""rankllm_composer/model/loading.py."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from rankllm_composer.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model; pad falls back to eos.

    Args:
        name_or_path, revision, trust_remote_code: see `load_causal_lm`.
    Raises:
        ModelError: it cannot be loaded; says what to check.
    """
    if trust_remote_code:
        warn_of_foreign_code(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ModelError(
            f"model.tokenizer: cannot load {name_or_path!r}: {first_line(error)}. "
            "Check the name, your access to it (HF_TOKEN), or give a local folder."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_weights: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
    on_meta: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A causal LM, from a checkpoint or with random weights.

    Args:
        name_or_path: HF id or local folder.
        revision: branch, tag or commit. None = the default one.
        trust_remote_code: run Python code that comes with the model. Warns with the model's name.
        random_weights: build from the configuration alone.
        config_overrides: HF configuration keys to replace.
        on_meta: allocate nothing; the weights come from rank 0 when the model is sharded.
        dtype: of the weights: float32 for those that are trained; for frozen ones bfloat16 too.
    Returns:
        The model in training mode.
    Raises:
        ModelError: it cannot be loaded, or an override is no key of its configuration.
    """
    if trust_remote_code:
        warn_of_foreign_code(name_or_path)
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name_or_path: cannot load {name_or_path!r}: {first_line(error)}. "
            "Check the name, your access to it (HF_TOKEN), or give a local folder."
        ) from error
    _override(config, dict(config_overrides or {}))
    if on_meta:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    elif random_weights:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                config=config,
                revision=revision,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                torch_dtype=dtype,
            )
        except OSError as error:
            raise ModelError(
                f"model.name_or_path: cannot load weights of {name_or_path!r}: {first_line(error)}. "
                "Weights are read from safetensors only."
            ) from error
    return model.to(dtype).train()


def warn_of_foreign_code(name_or_path: str) -> None:
    """Warn, before it happens, that code will be run which came with a model."""
    warnings.warn(f"model.trust_remote_code: Python code shipped with {name_or_path!r} will be run", stacklevel=3)


def _override(config: PretrainedConfig, overrides: dict[str, Any]) -> None:
    unknown = sorted(set(overrides) - set(config.to_dict()))
    if unknown:
        raise ModelError(
            f"model.config_overrides: {', '.join(unknown)} is no key of {type(config).__name__}; "
            "see config.json of the model for the keys it has"
        )
    config.update(overrides)
