"""Attention over packed sequences: torch's variable-length kernel on a GPU, one call per sequence elsewhere.

Registered with transformers as `packed_varlen` and `packed_sdpa`. Both accept the variable-length arguments that
transformers passes to flash-attn (`cu_seq_lens_q`, `max_length_q`, …), so the forward call of the model is the same on
every device, and neither allocates a (T, T) mask. `packed_varlen` is one launch of the FlashAttention-2 kernel that
torch contains, for all sequences and without a wait for the device; what that kernel cannot compute goes to
`packed_sdpa`, which calls PyTorch's scaled-dot-product attention for each sequence.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface

from rankllm_composer.options import ATTENTION_NAMES

PACKED_SDPA = "packed_sdpa"
PACKED_VARLEN = "packed_varlen"
FLASH_ATTENTION = "flash_attention_2"
OUR_ATTENTION = (PACKED_SDPA, PACKED_VARLEN)
MAX_KERNEL_WIDTH = 256
OWN_ATTENTION = ("sdpa", "eager")
"""A model's own attention, under which the tokens of all lists in a forward pass see each other."""
PLAIN_ARGUMENTS = {"cu_seq_lens_k", "max_length_k", "position_ids", "cache_position", "use_cache"}
PLAIN_ARGUMENTS |= {
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "logits_to_keep",
    "return_dict",
}
"""Arguments that models pass through to their attention and that change nothing in a pack without a cache."""


def _windowed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scaling: float | None
) -> torch.Tensor:
    """Causal attention to the last `window` tokens (self included), in query blocks of `window` tokens.

    A block of queries attends to at most 2 * window - 1 keys, so memory is linear in the length of the sequence.
    """
    length = query.shape[-2]
    index = torch.arange(length, device=query.device)
    blocks = []
    for start in range(0, length, window):
        queries, keys = slice(start, start + window), slice(max(0, start - window + 1), start + window)
        distance = index[queries, None] - index[None, keys]
        visible = (distance >= 0) & (distance < window)
        q, k, v = query[..., queries, :], key[..., keys, :], value[..., keys, :]
        blocks.append(F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling))
    return torch.cat(blocks, dim=-2)


def _capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    softcap: float,
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention with scores capped to ±softcap by tanh; memory is quadratic in the length of the sequence."""
    length = query.shape[-2]
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    hidden = (distance < 0) | (distance >= (window or length))
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value


@dataclass
class AttentionCalls:
    """Calls of our attention by models, and why calls of `packed_varlen` went to `packed_sdpa`."""

    number: int = 0
    fallbacks: set[str] = field(default_factory=set)


_watched: AttentionCalls | None = None
_bounds = WeakTensorKeyDictionary()


@contextmanager
def watch_attention() -> Iterator[AttentionCalls]:
    """Count the calls of our attention in this context, in which no layer may be compiled."""
    global _watched
    _watched, before = AttentionCalls(), _watched
    try:
        yield _watched
    finally:
        _watched = before


def kernel_problem(query: torch.Tensor, value: torch.Tensor, softcap: float | None) -> str | None:
    """Why torch's variable-length kernel cannot compute attention with these heads, (…, d) each; None = it can."""
    if softcap is not None:
        return "the model caps its attention scores"
    widest = max(query.shape[-1], value.shape[-1])
    if widest > MAX_KERNEL_WIDTH:
        return f"the heads have {widest} dimensions, more than {MAX_KERNEL_WIDTH}"
    return "attention is computed in float32" if _computed_in(value) == torch.float32 else None


def _computed_in(value: torch.Tensor) -> torch.dtype:
    """The type in which attention computes: that of autocast where it is on, else that of the values."""
    kind = value.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype


def packed_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Causal self-attention within each sequence of a pack, by one call of torch's FlashAttention-2 kernel.

    Args:
        query, key, value, cu_seqlens, scaling, sliding_window: see `packed_sdpa`; on CUDA, in float16 or bfloat16, the
            three of one type, with heads of at most 256 dimensions.
        longest: tokens of the longest sequence.
    Returns:
        (1, T, H, d).
    """
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    width = -(-max(head_dim, value_dim) // 8) * 8
    if 192 < width <= 224:
        width = MAX_KERNEL_WIDTH  # some GPUs have no backward pass for heads of 224 dimensions
    heads = [part.squeeze(0).transpose(0, 1) for part in (query, key, value)]  # (T, H, d), views
    heads = [F.pad(part, (0, width - part.shape[-1])) if part.shape[-1] < width else part for part in heads]
    # The kernel's window counts the tokens before the token itself; -1 = all.
    left = -1 if sliding_window is None else sliding_window - 1
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        *heads,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        0.0,  # dropout
        left < 0,  # causal; under a window the bound of 0 tokens to the right makes it so
        False,  # return_debug_mask
        scale=head_dim**-0.5 if scaling is None else scaling,
        window_size_left=left,
        window_size_right=0,
    )[0]
    return output[None, ..., :value_dim]


@torch.compiler.disable
def packed_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal self-attention within each sequence of a pack; no token attends to another sequence.

    Args:
        query: (1, H, T, d).
        key, value: (1, K, T, d) with K key-value heads; H is a multiple of K (grouped-query attention). The heads of
            `value` may have another size, which is then that of the result.
        cu_seqlens: (S + 1,) int32, cumulative lengths 0 … T.
        scaling: factor on the scores; None = 1 / sqrt(d).
        sliding_window: most tokens that a token attends to, itself included. None = all before it.
        softcap: scores are softcap * tanh(score / softcap). None = as they are.
    Returns:
        (1, T, H, d).
    Raises:
        ValueError: the pack's first dimension is not 1, or cu_seqlens does not end at T.
    """
    if query.shape[0] != 1:
        raise ValueError(f"packed_sdpa: the first dimension of a pack is {query.shape[0]}; expected 1.")
    num_heads, total, head_dim = query.shape[1:]
    num_groups = num_heads // key.shape[1]
    # The CPU flash kernel lacks grouped-query attention (enable_gqa falls back to the (L, L) math path), but accepts
    # stride-0 heads: key-value heads become the batch, and the query heads that share one become its heads.
    query = query.view(key.shape[1], num_groups, total, head_dim)
    key = key.transpose(0, 1).expand(-1, num_groups, -1, -1)
    value = value.transpose(0, 1).expand(-1, num_groups, -1, -1)
    bounds = _read(cu_seqlens)
    if bounds[-1] != total:
        raise ValueError(f"packed_sdpa: cu_seqlens ends at {bounds[-1]}, but the pack has {total} tokens.")
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    outputs = []
    # split() instead of slices: the gradient of each slice would be as large as the pack.
    for q, k, v in zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2)):
        if softcap is not None:
            output = _capped_attention(q, k, v, softcap, sliding_window, scaling)
        elif sliding_window is not None and q.shape[2] > sliding_window:
            output = _windowed_attention(q, k, v, sliding_window, scaling)
        else:
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        outputs.append(output.permute(2, 0, 1, 3))  # (L, K, H / K, d)
    return torch.cat(outputs).reshape(1, total, num_heads, value.shape[-1])


def _read(cu_seqlens: torch.Tensor) -> list[int]:
    """The values of a tensor that nothing changes; all layers of a forward pass share one wait for the device."""
    bounds: list[int] | None = _bounds.get(cu_seqlens)
    if bounds is None:
        bounds = _bounds[cu_seqlens] = cu_seqlens.tolist()
    return bounds


def _packed_forward(
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Adapt our attention to the signature of transformers; unsupported arguments raise ValueError."""
    unknown = sorted(key for key, value in others.items() if value is not None and key not in PLAIN_ARGUMENTS)
    if unknown or is_causal is False:
        raise ValueError(
            f"{name}: {type(module).__name__} passes {', '.join(unknown) or 'is_causal=False'}, which attention "
            "over packs does not support. Set batch.packing=false, or use another model."
        )
    if dropout:
        raise ValueError(f"{name}: attention_dropout is {dropout}; expected 0. Set it in model.config_overrides.")
    if attention_mask is not None:
        raise ValueError(f"{name}: attention_mask is set; expected None, as a pack needs no mask.")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"{name}: queries and keys differ in length; a key-value cache is not supported.")
    if cu_seq_lens_q is None or max_length_q is None:
        max_length_q = query.shape[2]
        cu_seq_lens_q = torch.tensor([0, max_length_q], dtype=torch.int32, device=query.device)
    problem = None if name == PACKED_SDPA else kernel_problem(query, value, softcap)
    if _watched is not None:
        _watched.number += 1
        if problem is not None:
            _watched.fallbacks.add(problem)
    options: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window}
    if name == PACKED_SDPA or problem is not None:
        return packed_sdpa(query, key, value, cu_seq_lens_q, softcap=softcap, **options), None
    dtype = _computed_in(value)  # weights of norms may have made queries and keys float32
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return packed_varlen(query, key, value, cu_seq_lens_q, max_length_q, **options), None


def _packed_sdpa_forward(module: torch.nn.Module, *inputs: Any, **arguments: Any) -> tuple[torch.Tensor, None]:
    return _packed_forward(PACKED_SDPA, module, *inputs, **arguments)


def _packed_varlen_forward(module: torch.nn.Module, *inputs: Any, **arguments: Any) -> tuple[torch.Tensor, None]:
    return _packed_forward(PACKED_VARLEN, module, *inputs, **arguments)


def choose_attention(name: str, device: str) -> str:
    """Return the attention for a packed forward pass, and register ours with transformers.

    Args:
        name: "packed_varlen", "packed_sdpa", "flash_attention_2", or "auto" = packed_varlen on a GPU that has the
            kernel, else packed_sdpa.
        device: "gpu" or "cpu".
    Raises:
        ValueError: the attention cannot run here, or the name is unknown.
    """
    AttentionInterface.register(PACKED_SDPA, _packed_sdpa_forward)
    AttentionInterface.register(PACKED_VARLEN, _packed_varlen_forward)
    if name not in ATTENTION_NAMES:
        raise ValueError(f"model.attention is {name!r}; expected one of {', '.join(ATTENTION_NAMES)}.")
    reason = f"the device is {device}" if device != "gpu" else _missing_kernel()
    if name == "auto":
        return PACKED_VARLEN if reason is None else PACKED_SDPA
    if name == PACKED_VARLEN and reason is not None:
        raise ValueError(
            f"model.attention: packed_varlen needs a CUDA device with torch's kernel, but {reason}. Use auto or "
            "packed_sdpa."
        )
    if name == FLASH_ATTENTION and device == "gpu" and importlib.util.find_spec("flash_attn") is None:
        reason = "flash-attn is not installed"
    if name == FLASH_ATTENTION and reason is not None:
        raise ValueError(
            f"model.attention: flash_attention_2 needs flash-attn and a CUDA device, but {reason}. "
            "Use auto, which needs no package."
        )
    return name


def slower_because(attention: str, device: str, *, precision: str, packing: bool) -> str | None:
    """Why a run does not compute attention with a kernel for all lists of a pack at once; None if it does.

    Args:
        attention: what the model was built with, see `choose_attention`.
        device: "gpu" or "cpu".
        precision: `parallelism.precision` of the recipe.
        packing: whether several lists are in one forward pass.
    """
    if not packing:
        return "batch.packing is false, or the model cannot be packed"
    if attention == PACKED_VARLEN:
        return "attention is computed in float32 (parallelism.precision)" if precision == "fp32" else None
    if attention == FLASH_ATTENTION:
        return None
    missing = f"the device is {device}, and the kernel needs CUDA" if device != "gpu" else _missing_kernel()
    return missing or f"model.attention is {attention}"


def _missing_kernel() -> str | None:
    """Why the GPU of this machine cannot run torch's kernel; None if it can, or if there is none, as in a plan."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the GPU has compute capability {'.'.join(map(str, capability))}, below 8.0"
    return None if torch.backends.cuda.is_flash_attention_available() else "this build of torch leaves it out"
