"""Full weights of a model under the HF names: gathered from a live, sharded one, or read from a checkpoint."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from rankllm_composer.checkpoints.safe_loading import INDEX_NAME, data_types, explain_unreadable, read_index
from rankllm_composer.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from transformers import PreTrainedModel

Weights = dict[str, torch.Tensor]
_MODEL_PREFIX = "state.model."


def gather_full_state_dict(
    model: torch.nn.Module, *, merge_lora: bool = True, dtype: torch.dtype | None = None
) -> Weights:
    """Full weights on the CPU, named as in the HF model; a collective: every rank has to call it.

    Args:
        model: a Composer model around a HF or PEFT model, or one of those; plain, in DDP, or sharded by FSDP2.
        merge_lora: False = the adapter's tensors alone, named as PEFT keeps them on disk.
        dtype: of the floating-point tensors. None = as they are.
    Returns:
        name → tensor on rank 0, empty on the others. Tensors of a model on the CPU may share its memory.
    Raises:
        ModelError: a kind of adapter that cannot be merged.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    inner = hf_module(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast(Weights, get_model_state_dict(inner, options=options))
    weights = _as_exported(inner, weights, merge_lora) if weights else {}
    if dtype is not None:
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                weights[name] = tensor.to(dtype)
    return weights


def meta_state_dict(model: torch.nn.Module, *, merge_lora: bool = True) -> Weights:
    """Names, shapes and types of what `gather_full_state_dict` returns, on the meta device. Not a collective."""
    inner = hf_module(model)
    wrapper = re.compile(r"(?:^|(?<=\.))(?:_checkpoint_wrapped_module|_orig_mod)\.")
    weights = {
        wrapper.sub("", name): torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in inner.state_dict().items()
    }
    return _as_exported(inner, weights, merge_lora)


def _as_exported(inner: torch.nn.Module, weights: Weights, merge_lora: bool) -> Weights:
    """Weights named as in the HF model, with merged adapters, or those of the adapter alone."""
    adapters = getattr(inner, "peft_config", None)
    if not adapters:
        return weights
    if len(adapters) != 1:
        raise ModelError(f"the model has the adapters {sorted(adapters)}; expected one. Keep the one that was trained.")
    (adapter,) = adapters
    if merge_lora:
        return merge_lora_weights(weights, _lora_scalings(inner, adapter), adapter)
    import peft

    get_adapter: Any = peft.get_peft_model_state_dict
    # "auto" would query a hub for whether the vocabulary grew.
    return cast(Weights, get_adapter(inner, state_dict=weights, adapter_name=adapter, save_embedding_layers=False))


def hf_module(model: torch.nn.Module) -> torch.nn.Module:
    """The HF (or PEFT) model inside a Composer model, with or without DDP around it."""
    from torch.nn.parallel import DistributedDataParallel
    from transformers import PreTrainedModel

    if isinstance(model, DistributedDataParallel):
        model = model.module
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        return model
    inner = getattr(model, "model", None)
    if not isinstance(inner, torch.nn.Module):
        raise ModelError(f"model is {type(model).__name__}; expected a HF model or a Composer model around one")
    return inner


def causal_lm_class(model: torch.nn.Module) -> type[PreTrainedModel]:
    """The HF class of a model: FSDP2 puts a class of its own, `FSDP…`, in front of it, PEFT wraps it."""
    from torch.distributed.fsdp import FSDPModule

    inner: Any = hf_module(model)
    if hasattr(inner, "peft_config"):
        inner = inner.get_base_model()
    mro: tuple[type[PreTrainedModel], ...] = type(inner).__mro__
    return next(kind for kind in mro if not issubclass(kind, FSDPModule))


def merge_lora_weights(weights: Mapping[str, torch.Tensor], scalings: Mapping[str, float], adapter: str) -> Weights:
    """Add each low-rank update to its weight and name the result as in the HF model.

        W' = W + scaling * B @ A                (embeddings: scaling * (B @ A)^T)
        W' = m * W' / |W'| in each row          (DoRA, with the magnitudes m)

    Args:
        scalings: name of a layer in the PEFT model → its scaling.
    Raises:
        ModelError: tensors of another kind of adapter than plain LoRA are left over.
    Source:
        Hu et al. 2021 (arXiv:2106.09685); Liu et al. 2024 (arXiv:2402.09353).
    """
    rest = dict(weights)
    merged: Weights = {}
    for layer, scaling in scalings.items():
        base = rest.pop(f"{layer}.base_layer.weight")
        if (up := rest.pop(f"{layer}.lora_B.{adapter}.weight", None)) is not None:
            update = up.float() @ rest.pop(f"{layer}.lora_A.{adapter}.weight").float()  # (out, r) @ (r, in)
        else:
            up = rest.pop(f"{layer}.lora_embedding_B.{adapter}")
            update = (up.float() @ rest.pop(f"{layer}.lora_embedding_A.{adapter}").float()).T  # (V, D)
        full = base.float() + scaling * update
        magnitude = rest.pop(f"{layer}.lora_magnitude_vector.{adapter}.weight", None)
        if magnitude is not None:
            full = full * (magnitude.float() / full.norm(dim=1)).unsqueeze(1)
        merged[f"{layer}.weight"] = full.to(base.dtype)
    for name in [name for name in rest if f".modules_to_save.{adapter}." in name]:
        plain = name.replace(f".modules_to_save.{adapter}.", ".")
        merged[plain] = rest.pop(name)
        rest.pop(name.replace(f".modules_to_save.{adapter}.", ".original_module."), None)
    foreign = sorted(name for name in rest if "lora_" in name or ".modules_to_save." in name)
    if foreign:
        raise ModelError(
            f"{foreign[0]}: {len(foreign)} adapter tensors do not add to a weight; expected plain LoRA. "
            "Export the adapter separately."
        )
    merged.update({name.replace(".base_layer.", "."): tensor for name, tensor in rest.items()})
    return {name.removeprefix("base_model.model."): tensor for name, tensor in merged.items()}


def mean_weights(many: Sequence[Weights]) -> Weights:
    """Mean of each tensor, summed in float64 and rounded once to the type of the first; others are of the last.

    Args:
        many: weights with the same names and shapes; they are emptied.
    Raises:
        ModelError: names or shapes differ.
    Source:
        Izmailov et al. 2018 (arXiv:1803.05407) for averages along a run.
    """
    first, last = many[0], many[-1]
    for other in many:
        strange = sorted(name for name in first.keys() | other.keys() if _shape(first, name) != _shape(other, name))
        if strange:
            raise ModelError(
                f"{strange[0]}: {len(strange)} weights differ in name or shape between checkpoints; expected those of "
                "one run. Name checkpoints of one run."
            )
    mean: Weights = {}
    for name in list(first):
        if first[name].is_floating_point():
            total = torch.zeros(first[name].shape, dtype=torch.float64)
            for weights in many:
                total += weights[name]
            mean[name] = (total / len(many)).to(first[name].dtype)
        else:
            mean[name] = last[name]
        for weights in many:
            del weights[name]
    return mean


def _shape(weights: Weights, name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None


def is_of_adapter(name: str) -> bool:
    """Whether a weight of a PEFT model belongs to its adapter."""
    return ".lora_" in name or ".modules_to_save." in name


def name_on_disk(name: str) -> str:
    """The name under which PEFT stores a weight of an adapter."""
    name = re.sub(r"\.modules_to_save\.\w+\.", ".", name)
    name = re.sub(r"(\.lora_\w+)\.\w+(\.weight)?$", r"\1\2", name)
    return name.removesuffix(".weight") if ".lora_magnitude_vector" in name else name


def load_adapter(model: torch.nn.Module, adapter: Weights) -> None:
    """Load the adapter of a checkpoint into a PEFT model; raise ModelError if the names differ."""
    inner = hf_module(model)
    expected = {name for name in inner.state_dict() if is_of_adapter(name)}
    if expected != set(adapter):
        strange = sorted(expected ^ set(adapter))
        raise ModelError(
            f"adapter: {len(strange)} tensors do not fit, such as {strange[0]}. Give the model that was trained."
        )
    inner.load_state_dict(adapter, strict=False)


def _lora_scalings(model: torch.nn.Module, adapter: str) -> dict[str, float]:
    from peft.tuners.lora import LoraLayer

    return {
        re.sub(r"\.?(_checkpoint_wrapped_module|_orig_mod)\b", "", name): module.scaling[adapter]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }


def read_checkpoint_weights(checkpoint: str | Path) -> Weights:
    """Model weights of a Composer checkpoint (file or folder of shards), under the HF names, on the CPU.

    Raises:
        ModelError: not found, damaged, without a model, or not data only; no code in it is run.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise ModelError(f"{path} does not exist; expected a checkpoint file or folder on this machine")
    weights = _read_shards(path) if path.is_dir() else _read_file(path)
    if not weights:
        raise ModelError(f"{path} has no model weights; expected a checkpoint that Composer's Trainer saved")
    # `model.` is the attribute of the Composer model for the HF model.
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def _read_file(path: Path) -> Weights:
    try:
        with torch.serialization.safe_globals(data_types()):
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(explain_unreadable(path, error)) from None
    state = saved.get("state", {}) if isinstance(saved, dict) else {}
    return dict(state.get("model", {}))


def _read_shards(path: Path) -> Weights:
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    index = path / INDEX_NAME
    try:
        with index.open("rb") as stream:
            metadata: Metadata = read_index(stream, str(index))
    except FileNotFoundError:
        raise ModelError(f"{index} is missing, so the checkpoint is incomplete. Use an earlier one.") from None
    except CheckpointError as error:
        raise ModelError(str(error)) from None

    class Reader(FileSystemReader):
        def read_metadata(self) -> Metadata:
            return metadata

    # Only tensors are asked for, and torch reads those without unpickling code.
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(_MODEL_PREFIX) and isinstance(entry, TensorStorageMetadata)
    }
    try:
        with warnings.catch_warnings():
            # Intended: other ranks do not take part.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(weights, storage_reader=Reader(path), no_dist=True)
    except (CheckpointException, OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ModelError(explain_unreadable(path, error)) from None
    return {name.removeprefix(_MODEL_PREFIX): tensor for name, tensor in weights.items()}


def is_tied(weights: Mapping[str, torch.Tensor], head: str, embedding: str) -> bool:
    """Whether an output layer holds the same weights as the embeddings, or is absent because it does."""
    if head not in weights or embedding not in weights or weights[head].is_meta:
        return True
    return torch.equal(weights[head], weights[embedding])
