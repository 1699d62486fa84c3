"""One forward pass over lists packed end to end, with logits only where they are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from rankllm_composer.model.attention import OWN_ATTENTION


def num_layers(config: Any) -> int:
    """Number of decoder layers."""
    number: int = config.get_text_config().num_hidden_layers
    return number


def list_logits(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rows: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """Logits of a causal LM at some positions of lists packed end to end.

    A model under its own attention gets one list, and only the arguments that its forward pass has.

    Args:
        model: a HF causal LM, with or without PEFT.
        input_ids, position_ids: (1, T) int64; positions restart with each list.
        cu_seqlens: (S + 1,) int32, cumulative lengths 0 … T.
        rows: (R,) int64 positions in T.
        longest: tokens of the longest list.
    Returns:
        (R, V).
    Raises:
        ValueError: several lists for a model under its own attention.
    """
    attention: str = model.config._attn_implementation
    arguments: dict[str, Any] = {"input_ids": input_ids, "logits_to_keep": rows, "use_cache": False}
    if attention not in OWN_ATTENTION:
        lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        longest_list = {"max_length_q": longest, "max_length_k": longest}
        arguments |= {"position_ids": position_ids, **lengths, **longest_list}
    elif len(cu_seqlens) != 2:
        raise ValueError(f"attention {attention} got {len(cu_seqlens) - 1} lists in one forward pass; expected 1.")
    else:
        arguments = {name: value for name, value in arguments.items() if _accepts(model, name)}
    logits: torch.Tensor = model(**arguments).logits[0]
    return logits if len(logits) == len(rows) else logits[rows]  # a model that ignores logits_to_keep returns all


def _accepts(model: Any, argument: str) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(inner.forward).parameters


@contextmanager
def head_rows(model: Any, token_ids: torch.Tensor) -> Iterator[None]:
    """In this context the LM head computes only the rows of these (C,) tokens: (…, D) → (…, C)."""
    head: torch.nn.Module = model.get_output_embeddings()

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        # Read here: under FSDP2 weight and bias are unsharded only during the forward pass.
        weight: torch.Tensor = head.weight  # type: ignore[assignment]
        bias: torch.Tensor | None = getattr(head, "bias", None)
        return F.linear(hidden, weight[token_ids], None if bias is None else bias[token_ids])

    head.forward = forward
    try:
        yield
    finally:
        del head.forward
