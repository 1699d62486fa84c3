"""Forwards of a model that is being read, not trained: packed, or cached, in lockstep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed
from transformers import DynamicCache

from rankllm_composer.distributed import largest_of_ranks
from rankllm_composer.model.attention import choose_attention

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

CACHED_ATTENTION = "sdpa"


@contextmanager
def inference(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """While open the model is in eval mode, computes no gradients and uses this attention; then it is as it was."""
    was_training, before = model.training, model.config._attn_implementation
    if attention != CACHED_ATTENTION:
        attention = choose_attention(attention, "gpu" if model.device.type == "cuda" else "cpu")
    model.eval()
    model.config._attn_implementation = attention
    try:
        with torch.no_grad():
            yield
    finally:
        model.config._attn_implementation = before
        model.train(was_training)


def packed_forwards(
    model: PreTrainedModel,
    sequences: Mapping[int, NDArray[np.int32]],
    num_positions: int,
    batch_tokens: int,
    lockstep: bool,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Sequences through the model, as many at once as fit a token budget.

    Args:
        model: under `inference`.
        sequences: token sequences, each of at least `num_positions`, by a key.
        num_positions: R, see `packed_logits`.
        batch_tokens: tokens in one forward, at most, unless a sequence alone has more.
        lockstep: see `rounds`.
    Yields:
        The S keys of a forward, and logits (S, R, V).
    """
    batches: list[list[int]] = []
    room = 0
    for key, sequence in sequences.items():
        if len(sequence) > room or not batches:
            batches.append([])
            room = batch_tokens
        batches[-1].append(key)
        room -= len(sequence)
    for members in rounds(batches, lockstep):
        chosen = [sequences[key] for key in members] or [np.zeros(num_positions, np.int32)]
        logits = packed_logits(model, chosen, num_positions)
        yield members, logits[: len(members)]


def packed_logits(model: PreTrainedModel, sequences: Sequence[NDArray[np.int32]], num_positions: int) -> torch.Tensor:
    """Next-token logits at the last positions of sequences packed end to end, none of which sees another.

    Args:
        model: under `inference`.
        sequences: S token sequences, each of at least `num_positions`.
        num_positions: R, positions read of each.
    Returns:
        (S, R, V) float32.
    """
    lengths = [len(sequence) for sequence in sequences]
    ends = np.cumsum(lengths)
    positions = ends[:, None] - np.arange(num_positions, 0, -1)  # (S, R)

    def on_device(values: NDArray[np.integer], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.from_numpy(values).to(model.device, dtype)

    cu_seqlens = on_device(np.concatenate([[0], ends]), torch.int32)
    logits = model(
        input_ids=on_device(np.concatenate(sequences))[None],
        position_ids=on_device(np.concatenate([np.arange(length) for length in lengths]))[None],
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        logits_to_keep=on_device(positions.reshape(-1)),
        use_cache=False,
    ).logits
    return logits.float().view(len(sequences), num_positions, -1)


class CachedBatch:
    """Prompts padded on the left to one length, continued together through a key-value cache.

    Args:
        model: under `inference` with `CACHED_ATTENTION`.
        prompts: B token sequences; none at all makes a batch of one that means nothing.
    Attributes:
        logits: (B, V) float32, next-token logits after what was fed so far.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[NDArray[np.int32]]) -> None:
        prompts = prompts or [np.zeros(1, np.int32)]
        longest = max(map(len, prompts))
        tokens = np.stack([np.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])  # (B, L)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = torch.arange(longest) >= longest - lengths[:, None]  # (B, L)
        self._model = model
        self._mask = mask.long().to(model.device)
        self._cache = DynamicCache()
        self.logits = self._forward(torch.from_numpy(tokens).long().to(model.device))

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Go on by these (B, M) tokens; the new `logits`."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(tokens.shape)], dim=1)
        self.logits = self._forward(tokens)
        return self.logits

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        num_new = tokens.shape[1]
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -num_new:]
        output = self._model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


def rounds(batches: Sequence[list[int]], lockstep: bool) -> Iterator[list[int]]:
    """The batches and, in lockstep, empty ones until the busiest rank is done.

    A sharded model gathers its weights in every forward, so every rank has to make as many. In lockstep this is a
    collective.
    """
    for number in range(largest_of_ranks(len(batches), lockstep)):
        yield batches[number] if number < len(batches) else []
