"""Forward passes for inference: packed or with a key-value cache, optionally in lockstep across ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed
from transformers import DynamicCache, PretrainedConfig

from rankllm_composer.distributed import largest_of_ranks, note_progress
from rankllm_composer.model.attention import OWN_ATTENTION, choose_attention
from rankllm_composer.model.forward import list_logits
from rankllm_composer.model.self_check import attention_for_inference

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

CACHED_ATTENTION = "sdpa"


@contextmanager
def inference(model: PreTrainedModel, attention: str, longest: int) -> Iterator[None]:
    """Put the model into eval mode without gradients and with this attention; restore its state afterwards.

    A model that mixes the lists of a pack keeps its own attention, and `packed_forwards` gives it one list at a time.

    Args:
        longest: tokens of the longest sequence.
    """
    was_training, before = model.training, model.config._attn_implementation
    if attention != CACHED_ATTENTION:
        attention = choose_attention(attention, "gpu" if model.device.type == "cuda" else "cpu")
    if isinstance(model.config, PretrainedConfig):
        attention = attention_for_inference(model.config, longest, attention, attention == CACHED_ATTENTION)
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
    """Run sequences through the model, as many at a time as fit a token budget.

    Args:
        model: a model under `inference`.
        sequences: token sequences by key, each of at least `num_positions` tokens.
        num_positions: R, number of last positions to read per sequence.
        batch_tokens: maximum number of tokens in one forward pass, unless a single sequence has more.
        lockstep: see `rounds`.
    Yields:
        The S keys of a forward pass, and float32 logits (S, R, V).
    """
    batches: list[list[int]] = []
    free_tokens = 0
    if model.config._attn_implementation in OWN_ATTENTION:
        batch_tokens = 0
    for key, sequence in sequences.items():
        if len(sequence) > free_tokens or not batches:
            batches.append([])
            free_tokens = batch_tokens
        batches[-1].append(key)
        free_tokens -= len(sequence)
    for members in rounds(batches, lockstep):
        chosen = [sequences[key] for key in members] or [np.zeros(num_positions, np.int32)]
        logits = packed_logits(model, chosen, num_positions)
        yield members, logits[: len(members)]


def packed_logits(model: PreTrainedModel, sequences: Sequence[NDArray[np.int32]], num_positions: int) -> torch.Tensor:
    """(S, R, V) next-token logits at the last R positions of S sequences packed end to end without mixing."""
    lengths = [len(sequence) for sequence in sequences]
    ends = np.cumsum(lengths)
    positions = ends[:, None] - np.arange(num_positions, 0, -1)  # (S, R)

    def on_device(values: NDArray[np.integer[Any]], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.from_numpy(values).to(model.device, dtype)

    logits = list_logits(
        model,
        on_device(np.concatenate(sequences))[None],
        on_device(np.concatenate([np.arange(length) for length in lengths]))[None],
        on_device(np.concatenate([[0], ends]), torch.int32),
        on_device(positions.reshape(-1)),
        max(lengths),
    )
    result: torch.Tensor = logits.float().view(len(sequences), num_positions, -1)
    return result


class CachedBatch:
    """Prompts padded on the left to one length and continued together with a key-value cache.

    Args:
        model: a model under `inference` with `CACHED_ATTENTION`.
        prompts: B token sequences; if empty, a placeholder batch of one, for lockstep.
    Attributes:
        logits: (B, V) float32 next-token logits after the tokens fed so far.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[NDArray[np.int32]]) -> None:
        prompts = prompts or [np.zeros(1, np.int32)]
        longest = max(map(len, prompts))
        tokens = np.stack([np.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])  # (B, L)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = torch.arange(longest) >= longest - lengths[:, None]  # (B, L)
        self._model = model
        self._mask = mask.long().to(model.device)
        self._cache = DynamicCache()  # type: ignore[no-untyped-call]
        self.logits = self._forward(torch.from_numpy(tokens).long().to(model.device))

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append (B, M) tokens and return the new `logits`."""
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
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits


def rounds(batches: Sequence[list[int]], lockstep: bool) -> Iterator[list[int]]:
    """Yield the batches and, in lockstep, empty ones until the busiest rank is done.

    A sharded model gathers its weights in every forward pass, so all ranks must run the same number. In lockstep this
    is a collective.
    """
    for number in range(largest_of_ranks(len(batches), lockstep)):
        note_progress()
        yield batches[number] if number < len(batches) else []
