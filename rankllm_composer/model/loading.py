"""Base models and tokenizers: from the Hugging Face Hub or a folder, or with random weights."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rankllm_composer.errors import ModelError, first_line
from rankllm_composer.options import ModelOptions
from rankllm_composer.prompts.template import fix_date
from rankllm_composer.screen import warn
from rankllm_composer.storage.content import check_content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or raise ModelError.

    Its pad token defaults to the EOS token; of several chat templates it keeps the default one.
    """
    name_or_path = options.tokenizer or options.name_or_path
    if options.trust_remote_code:
        warn_trust_remote_code(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ModelError(
            f"model.tokenizer: cannot load {name_or_path!r}: {first_line(error)}. "
            "Check the name and your access to it (HF_TOKEN), or set a local folder."
        ) from error
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


def load_causal_lm(
    options: ModelOptions, *, on_meta: bool = False, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load a causal LM in training mode from a checkpoint, or build it with random weights.

    Args:
        options: which model; a warning names a model whose own code is run.
        on_meta: allocate no memory; the weights come from rank 0 when the model is sharded.
        dtype: of the weights. float32 if they are trained; frozen weights may be bfloat16.
    Raises:
        ModelError: it cannot be loaded, or its configuration lacks a key of `options.config_overrides`.
    """
    name_or_path, trust = options.name_or_path, options.trust_remote_code
    if trust:
        warn_trust_remote_code(name_or_path)
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=options.revision, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name_or_path: cannot load {name_or_path!r}: {first_line(error)}. "
            "Check the name and your access to it (HF_TOKEN), or set a local folder."
        ) from error
    unknown = sorted(set(options.config_overrides) - set(config.to_dict()))
    if unknown:
        raise ModelError(
            f"model.config_overrides contains {', '.join(unknown)}; expected keys of {type(config).__name__}. "
            "The config.json of the model lists them."
        )
    config.update(dict(options.config_overrides))
    if on_meta or options.random_weights:
        with torch.device("meta") if on_meta else nullcontext():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    else:
        check_content(name_or_path)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                config=config,
                revision=options.revision,
                trust_remote_code=trust,
                use_safetensors=True,
                torch_dtype=dtype,
            )
        except OSError as error:
            raise ModelError(
                f"model.name_or_path: cannot load weights of {name_or_path!r}: {first_line(error)}. "
                "Weights are read from safetensors only."
            ) from error
    return model.to(dtype).train()


def warn_trust_remote_code(name_or_path: str) -> None:
    """Warn that Python code shipped with a model is about to run."""
    warn(f"model.trust_remote_code: Python code shipped with {name_or_path!r} will be run", stacklevel=3)
