"""Which results of a recomputed layer are kept: those of attention, on request."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

ATTENTION_OPERATIONS = {
    "aten::_flash_attention_forward",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flash_attn::_flash_attn_varlen_forward",
}
"""The kernels of attention over packs: torch's, those of its scaled-dot-product attention, and flash-attn's. Each
returns its output and, for the backward pass, one number for each token and head."""


def keep_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a layer's forward pass and of its recomputation, which repeats all but `ATTENTION_OPERATIONS`."""
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] = create_selective_checkpoint_contexts(
        _policy
    )
    return contexts


def _policy(_: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    del arguments, keywords
    is_kept = operation._schema.name in ATTENTION_OPERATIONS
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
