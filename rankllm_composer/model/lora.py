"""Low-rank adapters: names that have to match, and the adapter of an earlier run to start from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankllm_composer.errors import ModelError, first_line

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEYS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "target_modules": "target_modules",
    "modules_to_save": "modules_to_save",
}
"""Setting of PEFT → recipe key, of those that decide what an adapter computes."""


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter without the model that it changes."""
    return Path(folder, ADAPTER_CONFIG).is_file() and not Path(folder, "config.json").is_file()


def base_of_adapter(folder: str | Path) -> str:
    """Name or path of the model that an adapter was trained on; "" = unknown."""
    written = json.loads(Path(folder, ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return str(written.get("base_model_name_or_path") or "")


def check_adapter_names(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    """Raise ModelError if a name of an adapter matches no layer of a model, or one that is tied to another."""
    import torch

    modules = dict(model.named_modules())
    layers = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear | torch.nn.Embedding)}
    targets: Any = peft_config.target_modules  # type: ignore[attr-defined]
    wanted = [] if targets == ALL_LINEAR else sorted(targets)
    _check_key("target_modules", wanted, layers, type(model).__name__)
    kept = sorted(peft_config.modules_to_save or ())  # type: ignore[attr-defined]
    parts = {name for name, module in modules.items() if next(module.parameters(), None) is not None}
    _check_key("modules_to_save", kept, parts - {""}, type(model).__name__)
    if model.config.tie_word_embeddings:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        tied = {name for name, module in modules.items() if any(module is end for end in ends)}
        for key, names in (("target_modules", wanted), ("modules_to_save", kept)):
            found = [name for name in names if _matched(name, tied)]
            if found:
                raise ModelError(
                    f"model.lora.{key} contains {', '.join(found)}, whose weights the output layer and the embeddings "
                    f"share; expected layers with weights of their own. Remove {', '.join(found)}."
                )


def _check_key(key: str, names: Iterable[str], layers: set[str], model: str) -> None:
    missing = [name for name in names if not _matched(name, layers)]
    if missing:
        there = sorted({name.rpartition(".")[2] for name in layers if not name.rpartition(".")[2].isdigit()})
        remedy = "Name some of these"
        if key == "target_modules":
            remedy += f", or set model.lora.target_modules=[{ALL_LINEAR}] for all linear layers but the output layer"
        raise ModelError(
            f"model.lora.{key}: {', '.join(missing)} match nothing in {model}; expected names of its layers: "
            f"{', '.join(there)}. {remedy}."
        )


def _matched(name: str, layers: Iterable[str]) -> bool:
    """Whether a name means one of the layers, by PEFT's rule."""
    return any(layer == name or layer.endswith(f".{name}") for layer in layers)


def check_starting_adapter(folder: str | Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check that a folder holds an adapter with these settings, without reading its weights.

    Args:
        settings: key of `model.lora` → the value here, of those that decide what an adapter computes; target_modules
            may be all-linear, with which any layers agree.
    Returns:
        What PEFT has written about the adapter.
    Raises:
        ModelError: the folder lacks a file, or the adapter is of another kind.
    """
    try:
        written: Mapping[str, Any] = json.loads(Path(folder, ADAPTER_CONFIG).read_text(encoding="utf-8"))
        absent = {"use_rslora": False, "use_dora": False}  # in adapters of an older PEFT
        named = {key: _plain({**absent, **written}.get(setting)) for setting, key in _KEYS.items()}
        Path(folder, ADAPTER_WEIGHTS).open("rb").close()
    except Exception as error:  # damaged files raise almost anything
        raise _unreadable(folder, error) from error
    for key, found in named.items():
        here = _plain(settings[key])
        if found != here and not (key == "target_modules" and here == [ALL_LINEAR]):
            value = f"[{', '.join(found)}]" if isinstance(found, list) else str(found).lower()
            raise ModelError(
                f"model.lora.start_from: {folder} has {key} {value}; the recipe has {here}. Set "
                f"'model.lora.{key}={value}'."
            )
    return written


def _unreadable(folder: str | Path, error: Exception) -> ModelError:
    return ModelError(
        f"model.lora.start_from: {folder} cannot be read ({first_line(error)}); expected an exported adapter with "
        f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}. Export it with --adapter-only."
    )


def load_starting_adapter(model: Any, folder: str | Path) -> None:
    """Load the weights of an exported adapter into a PEFT model that has an adapter of the same kind.

    Raises:
        ModelError: it cannot be read, is of another kind, or does not fit the model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = model.peft_config["default"]
    written = check_starting_adapter(folder, {key: getattr(config, setting) for setting, key in _KEYS.items()})
    try:
        weights = load_file(Path(folder, ADAPTER_WEIGHTS))
    except Exception as error:  # a damaged file raises almost anything
        raise _unreadable(folder, error) from error
    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    strange = sorted(
        name
        for name in expected.keys() | weights.keys()
        if name not in expected or name not in weights or expected[name] != weights[name].shape
    )
    if strange:
        raise ModelError(
            f"model.lora.start_from: {folder}: {len(strange)} tensors do not fit the model, such as {strange[0]}. Set "
            f"model.name_or_path to the model that it was trained on, {written.get('base_model_name_or_path')}."
        )
    if not any(parameter.is_meta for parameter in model.parameters()):  # else they come from rank 0
        set_peft_model_state_dict(model, weights)


def _plain(value: Any) -> Any:
    """A setting to compare: names in order, none as an empty list."""
    return sorted(value or ()) if value is None or isinstance(value, list | tuple | set) else value
