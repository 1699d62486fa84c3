"""Attention over packed sequences, for devices without flash-attn.

Registered with transformers as `packed_sdpa`. It accepts the variable-length arguments that transformers passes to
flash-attn (`cu_seq_lens_q`, `max_length_q`, …), so the forward call of the model is the same on every device. No (T, T)
mask is allocated: each sequence is one call of PyTorch's scaled-dot-product attention.
"""

from __future__ import annotations

import importlib.util
import itertools

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

PACKED_SDPA = "packed_sdpa"
FLASH_ATTENTION = "flash_attention_2"
ATTENTION_NAMES = ("auto", FLASH_ATTENTION, PACKED_SDPA)
OWN_ATTENTION = ("sdpa", "eager")
"""A model's own attention, under which the tokens of all lists in a forward pass see each other."""
PLAIN_ARGUMENTS = {"cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "cache_position", "use_cache"}
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


_num_calls = 0


def calls_of_packed_sdpa() -> int:
    """Number of calls of `packed_sdpa` in this process so far."""
    return _num_calls


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
    global _num_calls
    _num_calls += 1
    if query.shape[0] != 1:
        raise ValueError(f"packed_sdpa: the first dimension of a pack is {query.shape[0]}; expected 1.")
    num_heads, total, head_dim = query.shape[1:]
    num_groups = num_heads // key.shape[1]
    # The CPU flash kernel lacks grouped-query attention (enable_gqa falls back to the (L, L) math path), but accepts
    # stride-0 heads: key-value heads become the batch, and the query heads that share one become its heads.
    query = query.view(key.shape[1], num_groups, total, head_dim)
    key = key.transpose(0, 1).expand(-1, num_groups, -1, -1)
    value = value.transpose(0, 1).expand(-1, num_groups, -1, -1)
    bounds = cu_seqlens.tolist()
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


def _packed_sdpa_forward(
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
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Adapt `packed_sdpa` to the attention signature of transformers; unsupported arguments raise ValueError."""
    unknown = sorted(name for name, value in others.items() if value is not None and name not in PLAIN_ARGUMENTS)
    if unknown or is_causal is False:
        raise ValueError(
            f"packed_sdpa: {type(module).__name__} passes {', '.join(unknown) or 'is_causal=False'}, which attention "
            "over packs does not support. Set batch.packing=false, or use another model."
        )
    if dropout:
        raise ValueError(f"packed_sdpa: attention_dropout is {dropout}; expected 0. Set it in model.config_overrides.")
    if attention_mask is not None:
        raise ValueError("packed_sdpa: attention_mask is set; expected None, as a pack needs no mask.")
    if query.shape[2] != key.shape[2]:
        raise ValueError("packed_sdpa: queries and keys differ in length; a key-value cache is not supported.")
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.tensor([0, query.shape[2]], dtype=torch.int32)
    options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
    return packed_sdpa(query, key, value, cu_seq_lens_q, **options), None


def choose_attention(name: str, device: str) -> str:
    """Return the attention for a packed forward pass, and register packed_sdpa with transformers.

    Args:
        name: "flash_attention_2", "packed_sdpa", or "auto" = flash-attn if it is installed and the device is a GPU.
        device: "gpu" or "cpu".
    Raises:
        ValueError: flash_attention_2 is requested and cannot run here, or the name is unknown.
    """
    AttentionInterface.register(PACKED_SDPA, _packed_sdpa_forward)
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if name == "auto":
        return FLASH_ATTENTION if has_flash and device == "gpu" else PACKED_SDPA
    if name == FLASH_ATTENTION and not (has_flash and device == "gpu"):
        reason = "flash-attn is not installed" if not has_flash else f"the device is {device}"
        raise ValueError(
            f"model.attention: flash_attention_2 needs flash-attn and a CUDA device, but {reason}. "
            "Install the `gpu` extra, or use auto or packed_sdpa."
        )
    if name not in ATTENTION_NAMES:
        raise ValueError(f"model.attention is {name!r}; expected one of {', '.join(ATTENTION_NAMES)}.")
    return name
