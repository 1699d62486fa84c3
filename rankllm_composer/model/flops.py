"""Floating-point operations of a packed step, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def layer_matmul_parameters(config: PretrainedConfig) -> int:
    """Number of weights in the matrix products of all layers of a Llama-like decoder (Llama, Mistral, Qwen).

    Per layer: D·H·d (query) + 2·D·K·d (key, value) + H·d·D (output) + 3·D·F (gate, up, down)
    """
    hidden: int = config.hidden_size
    heads: int = config.num_attention_heads
    head_dim: int = getattr(config, "head_dim", None) or hidden // heads
    key_value_heads: int = getattr(config, "num_key_value_heads", None) or heads
    attention = 2 * hidden * (heads + key_value_heads) * head_dim
    result: int = config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)
    return result


def forward_flops(config: PretrainedConfig, lengths: Sequence[int], num_logits: int) -> int:
    """Floating-point operations of one forward pass over sequences of these lengths.

        2 · P per token in the layers + 4 · H·d · Σ min(i, window) for causal attention + 2 · D · V per logits row

    Multiplications and additions count as one each.

    Args:
        config: a Llama-like decoder's configuration.
        lengths: tokens of each sequence.
        num_logits: rows of the LM head that are computed.
    """
    heads: int = config.num_attention_heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    window: int | None = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    pairs = 0
    for length in lengths:
        seen = length if window is None else min(length, window)
        pairs += seen * (seen + 1) // 2 + (length - seen) * seen
    matmuls = 2 * layer_matmul_parameters(config) * sum(lengths)
    attention: int = 4 * config.num_hidden_layers * heads * head_dim * pairs
    head: int = 2 * config.hidden_size * config.vocab_size * num_logits
    return matmuls + attention + head


def training_flops(config: PretrainedConfig, lengths: Sequence[int], num_logits: int) -> int:
    """Floating-point operations of forward and backward (twice the forward), without recomputed activations."""
    return 3 * forward_flops(config, lengths, num_logits)
