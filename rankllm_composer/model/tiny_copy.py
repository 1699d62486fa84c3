"""Tiny copies of a model: the same architecture with few layers and small sizes, to test what it computes."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

try:  # transformers 5
    from transformers.initialization import no_init_weights
except ImportError:
    from transformers.modeling_utils import no_init_weights

NUM_LAYERS, MOST_LAYERS = 2, 4
"""Layers of a copy: 2, or one of each kind up to 4."""
NUM_HEADS = 4
VOCABULARY = 96
SHORT, LONG = 16, 512
"""A limit on positions that some lists of a test exceed, and one that none exceeds."""

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
_WIDTHS = re.compile(
    r"\w*(hidden_size|embedding_size|embed_proj_dim)|n_embd|d_model|emb_dim|dim_model|d_embed|lru_width"
)
_INNER = re.compile(
    r"(?:(?!intermediate_size)\w)*intermediate_size\w*"
    r"|\w*(ffn_dim|ffn_hidden_size|n_inner|d_inner|dim_ff|dff|feed_forward_size)"
)
_EXPERTS = re.compile(r"num_experts|num_local_experts|n_routed_experts|moe_num_experts")
_WINDOWS = re.compile(r"sliding_window|attention_window_size|window_size|attention_chunk_size")
_POSITIONS = re.compile(r"original_max_position_embeddings|max_position_embeddings|n_positions|n_ctx|max_seq_len")
_SCANS = re.compile(r"(mamba_)?chunk_size|(mamba_d_)?state(_size)?")  # of state-space layers
_TOKENS = re.compile(r"(pad|bos|eos|sep|mask|unk|cls|decoder_start)_(token_id|index)")


def tiny_config(config: PretrainedConfig, max_length_tokens: int, *, narrow: bool = True) -> PretrainedConfig:
    """Copy a configuration with few layers and small sizes; what decides how tokens see each other is kept.

    The size of a head is kept, so that all that follows from it stays valid. Limits on positions and windows become
    short if lists of `max_length_tokens` exceed them, and longer than any list of a test otherwise.

    Args:
        narrow: reduce the widths, too; False = only layers and vocabulary.
    """
    tiny = copy.deepcopy(config)
    _shrink(tiny, max_length_tokens, narrow)
    return tiny


def _shrink(config: Any, max_length_tokens: int, narrow: bool) -> None:
    values = vars(config)
    for value in values.values():
        if isinstance(value, PretrainedConfig):
            _shrink(value, max_length_tokens, narrow)
    num_layers = next((values[name] for name in _LAYERS if _is_size(values.get(name))), 0)
    layers = _layers_kept(values, num_layers)
    for name, value in list(values.items()):
        if isinstance(value, list) and num_layers and len(value) == num_layers:
            values[name] = [value[layer] for layer in layers]
        elif name == "rope_scaling" and isinstance(value, dict):
            values[name] = {key: _limit(key, item, max_length_tokens) for key, item in value.items()}
        elif name == "use_mamba_kernels":
            values[name] = False
        elif _TOKENS.fullmatch(name) and isinstance(value, int | list):
            values[name] = 1
        elif not _is_size(value):
            continue
        elif name in _LAYERS:
            values[name] = len(layers) if value == num_layers else min(value, NUM_LAYERS)
        elif name.endswith("vocab_size") or name == "vocab_size_per_layer_input":
            values[name] = min(value, VOCABULARY)
        elif _SCANS.fullmatch(name):
            values[name] = min(value, SHORT)
        else:
            values[name] = _limit(name, value, max_length_tokens)
    if "hybrid_layer_ids" in values:
        values["hybrid_layer_ids"] = [n for n, kind in enumerate(values["layers_block_type"]) if kind == "hybrid"]
    if narrow:
        _narrow(values)


def _narrow(values: dict[str, Any]) -> None:
    num_heads = next((values[name] for name in _HEADS if _is_size(values.get(name))), 0)
    width = next((value for name, value in values.items() if _WIDTHS.fullmatch(name) and _is_size(value)), 0)
    new_width = width // num_heads * NUM_HEADS if num_heads else min(width, 64)
    for name, value in list(values.items()):
        if _INNER.fullmatch(name):
            values[name] = [min(item, 64) for item in value] if isinstance(value, list) else value and min(value, 64)
        elif not _is_size(value):
            continue
        elif name in _HEADS:
            values[name] = NUM_HEADS
        elif name in _KEY_VALUE_HEADS:
            values[name] = NUM_HEADS if value == num_heads else min(value, NUM_HEADS // 2)
        elif _WIDTHS.fullmatch(name) and width and value % width == 0:
            values[name] = value // width * new_width
        elif _EXPERTS.fullmatch(name):
            values[name] = min(value, 16)
    expand = values.get("mamba_expand") or values.get("expand")
    for heads, head_dim in (("mamba_n_heads", "mamba_d_head"), ("num_heads", "head_dim")):  # of state-space layers
        if expand and heads in values and head_dim in values:
            values[heads] = max(1, (values.get("mamba_d_ssm") or int(expand * new_width)) // values[head_dim])
    values |= {name: 1 for name in ("n_groups", "mamba_n_groups", "mamba_ngroups") if expand and name in values}
    if expand and "mamba_headdim" in values:
        values["mamba_headdim"] = int(expand * new_width) // values["n_mamba_heads"]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _limit(name: str, value: Any, max_length_tokens: int) -> Any:
    """A limit on positions or a window, replaced by one that short lists exceed, or that no list exceeds."""
    if not _is_size(value):
        return value
    short = SHORT // 2 if _WINDOWS.fullmatch(name) else SHORT
    if _WINDOWS.fullmatch(name) or _POSITIONS.fullmatch(name):
        return short if value < max_length_tokens else LONG
    return value


def _layers_kept(values: dict[str, Any], num_layers: int) -> list[int]:
    """Layers of a copy: the first of each kind that lists with one entry per layer distinguish, then the first ones."""
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == num_layers]
    first_of_kind: dict[str, int] = {}
    for layer in range(num_layers):
        first_of_kind.setdefault(repr([value[layer] for value in lists]), layer)
    chosen = list(first_of_kind.values())[:MOST_LAYERS]
    chosen += [layer for layer in range(num_layers) if layer not in chosen][: max(0, NUM_LAYERS - len(chosen))]
    return sorted(chosen)


def tiny_model(config: PretrainedConfig, attention: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a model on the CPU in float32 and evaluation mode, with weights large enough for every token to matter.

    Two models of one configuration have the same weights; torch's random state is not changed.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.manual_seed(0)
        with no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation=attention, trust_remote_code=trust_remote_code
            )
        model = model.float().eval()
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5)
            else:
                weight.normal_(1, 0.1)
    return model
