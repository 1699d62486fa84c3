"""The model that reranks: any Hugging Face folder or id, and how it is prompted and read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rankllm_composer.errors import ModelError, RunError, first_line
from rankllm_composer.options import ModelOptions, ObjectiveName, RerankOptions
from rankllm_composer.prompts.chat import template_notes
from rankllm_composer.prompts.clients import CURRENT_CLIENT
from rankllm_composer.prompts.contract import (
    CONTRACT_FILE,
    DecodingContract,
    chat_template_sha256,
    decoding_contract,
    read_contract,
)
from rankllm_composer.screen import warn
from rankllm_composer.storage.content import check_content

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rankllm_composer.prompts.permutations import IdentifierStyle
from rankllm_composer.prompts.prompt_template import read_prompt_template

WEIGHTS_INDEX = "model.safetensors.index.json"


def load_served_model(
    name_or_path: str | Path, options: RerankOptions
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, DecodingContract, str]:
    """Load a model to rerank with, its tokenizer, its contract, and a name with its version.

    Raises:
        ModelError: it cannot be loaded, or its tokenizer has another chat template than its contract states.
        RunError: it has no `reranker.json` and the options do not replace it, or the device cannot be used.
    """
    import torch

    from rankllm_composer.model.loading import load_causal_lm, load_config, load_tokenizer
    from rankllm_composer.model.remote_code import code_refused

    name = str(name_or_path)
    given = read_given_contract(name, options)
    if given is None:
        _description(name, options)  # fails now, not after the model is loaded
    source = ModelOptions(name_or_path=name, revision=options.revision, trust_remote_code=options.trust_remote_code)
    with code_refused(name):
        tokenizer, config = load_tokenizer(source), load_config(source)
    contract = served_contract(name, given, tokenizer, config, options)
    for note in template_notes(tokenizer):
        warn(note, stacklevel=2)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"device is {device!r}, which torch cannot use ({first_line(error)}). Use cpu.") from error
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{name}: the tokenizer has {len(tokenizer):,} tokens but the model only {config.vocab_size:,}. Restore "
            "the tokenizer's files."
        )
    with code_refused(name):
        model = load_causal_lm(source, config=config, dtype=_dtype(config, options, place))
    try:
        model = model.to(place).eval()  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{name} does not fit the memory of {device} ({first_line(error)}). Use --dtype bfloat16, another device "
            "or a smaller model."
        ) from error
    version = _folder_version(Path(name)) if Path(name).is_dir() else f"{name} {_commit(model)}"
    return model, tokenizer, contract, version


def read_given_contract(name: str, options: RerankOptions) -> DecodingContract | None:
    """Contract of a local folder or a hub id; None if it has none."""
    if Path(name).is_dir():
        check_weight_files(Path(name))
        check_content(name)
        return read_contract(name) if Path(name, CONTRACT_FILE).is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            name,
            CONTRACT_FILE,
            revision=options.revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model: there is no folder {name!r}, and the Hugging Face Hub has no such model ({first_line(error)}). "
            "Correct the path or the id."
        ) from error
    return None if found is None else read_contract(Path(found).parent)


def served_contract(
    name: str,
    given: DecodingContract | None,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    options: RerankOptions,
) -> DecodingContract:
    """The contract that a model came with, or the one that the options describe.

    Raises:
        ModelError: the tokenizer has another chat template than the contract states, or none.
        RunError: the options contradict the contract, or leave something open where there is none.
    """
    if given is None:
        return _described_contract(name, tokenizer, config, options)
    if chat_template_sha256(tokenizer) != given.chat_template_sha256:
        raise ModelError(
            f"{name}: the tokenizer's chat template is not the one that the model was trained with (the hash in "
            "reranker.json). Export the model again, or restore the tokenizer's files."
        )
    for option, wanted, trained in (
        ("objective", options.objective, given.objective),
        ("identifiers", options.identifiers, given.identifier_style),
    ):
        if wanted is not None and wanted != trained:
            raise RunError(
                f"{option} is {wanted}, but {name} was trained with {trained} (reranker.json). Leave it out."
            )
    if options.prompt_template is not None and read_prompt_template(options.prompt_template) != given.template:
        raise RunError(
            f"prompt_template is {options.prompt_template}, but {name} was trained with another prompt "
            f"({CONTRACT_FILE}). Leave it out."
        )
    version = options.client_version
    if version is not None and version != given.client_version:
        shown = given.shown_words
        given = given.with_client(version)
        if given.shown_words != shown:
            warn(
                f"client_version is {version}, which shows up to {given.shown_words} words of a passage in windows of "
                f"{given.window_size}; {name} was trained with up to {shown} ({CONTRACT_FILE}).",
                stacklevel=2,
            )
    if options.context_size_tokens is None:
        return given
    return dataclasses.replace(given, context_size_tokens=options.context_size_tokens)


def _described_contract(
    name: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, options: RerankOptions
) -> DecodingContract:
    objective, style, window = _description(name, options)
    return decoding_contract(
        tokenizer,
        objective,
        style,
        num_identifiers=window,
        stride=options.stride,
        context_size_tokens=options.context_size_tokens or min(4096, _num_positions(config)),
        client_version=options.client_version or CURRENT_CLIENT,
        template=None if options.prompt_template is None else read_prompt_template(options.prompt_template),
    )


def _description(name: str, options: RerankOptions) -> tuple[ObjectiveName, IdentifierStyle, int]:
    """Objective, identifiers and window that the options give; RunError if one of them is missing."""
    of_decoding: dict[str | None, ObjectiveName] = {"first_token": "combined", "generation": "generation"}
    objective = options.objective or of_decoding.get(options.decoding)
    style, window = options.identifiers, options.window_size
    if objective is None or style is None or window is None:
        examples = {
            "--decoding generation (or first_token, for a model trained with a ranking loss)": objective,
            "--identifiers letters (or numbers)": style,
            "--window 20": window,
        }
        missing = ", ".join(example for example, value in examples.items() if value is None)
        raise RunError(
            f"{name} has no {CONTRACT_FILE}, so how to prompt and read it has to be given. Add what it was trained "
            f"with: {missing}."
        )
    return objective, style, window


def check_weight_files(folder: Path) -> None:
    """Raise ModelError if the index of a folder's weights names a file outside the folder, or cannot be read."""
    path = folder / WEIGHTS_INDEX
    if not path.is_file():
        return
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read ({error!r}). Export or download the model again.") from error
    outside = sorted(str(name) for name in names if not isinstance(name, str) or Path(name).name != name)
    if outside:
        raise ModelError(f"{path} names the file {outside[0]!r}, which is not in its folder. Do not use this model.")


def _num_positions(config: PretrainedConfig) -> int:
    """Tokens that a model was made for; the client's context if it does not say."""
    return int(getattr(config, "max_position_embeddings", None) or 4096)


def _dtype(config: PretrainedConfig, options: RerankOptions, device: torch.device) -> torch.dtype:
    import torch

    from rankllm_composer.model.loading import DTYPE

    if options.dtype is not None:
        return getattr(torch, options.dtype)  # type: ignore[no-any-return]
    return torch.float32 if device.type == "cpu" else getattr(config, DTYPE) or torch.float32


def _commit(model: PreTrainedModel) -> str:
    return str(getattr(model.config, "_commit_hash", None))


def _folder_version(folder: Path) -> str:
    """Path of a model folder and a hash of the names, sizes and times of its files."""
    folder = folder.resolve()
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    versions = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
    return f"{folder} {hashlib.blake2b(repr(versions).encode(), digest_size=8).hexdigest()}"
