"""NEFTune: uniform noise on the token embeddings during training, as a function and as a Composer Algorithm."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger


def noise_seed(seed: int, batch: int, record_key: int) -> int:
    """Return the seed of one sequence's noise from the run's seed, the optimizer steps taken, and the record's key.

    63 well-mixed bits: generators may use only the low 32, and adjacent seeds must not give related noise.
    """
    digest = hashlib.blake2b(f"{seed},{batch},{record_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def neftune_noise(embeddings: torch.Tensor, lengths: list[int], alpha: float, seeds: list[int]) -> torch.Tensor:
    """Add uniform noise to the token embeddings of each sequence of a pack.

        out = embeddings + u * alpha / sqrt(L * D),  u uniform in [-1, 1)

    L is the number of tokens of that sequence, so its noise does not depend on the rest of the pack. The noise is drawn
    in float32 on the device of the embeddings, and the sum is rounded once to their type; the gradient is unchanged.

    Args:
        embeddings: (1, T, D) or (T, D) float, S concatenated sequences.
        lengths: tokens of each of the S sequences; they sum to T.
        alpha: scale of the noise. The expected length of a sequence's noise, as one vector, is alpha / sqrt(3).
        seeds: one per sequence; the same seed, length and type of device give the same noise.
    Returns:
        A tensor with the shape and type of the embeddings.
    Raises:
        ValueError: wrong shape, lengths that do not sum to T or contain a zero, or not one seed per sequence.
    Source:
        Jain et al. 2023 (arXiv:2310.05914).
    """
    shape = tuple(embeddings.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
        raise ValueError(f"neftune_noise: embeddings have shape {shape}; expected (1, T, D) or (T, D).")
    if sum(lengths) != shape[-2] or min(lengths, default=1) < 1:
        raise ValueError(
            f"neftune_noise: lengths {lengths} sum to {sum(lengths)}; expected positive lengths that sum to the "
            f"{shape[-2]} tokens of the pack."
        )
    if len(seeds) != len(lengths):
        raise ValueError(
            f"neftune_noise: there are {len(seeds)} seeds for {len(lengths)} sequences; expected one per sequence."
        )
    generator = torch.Generator(device=embeddings.device)
    noised = []
    for sequence, length, seed in zip(torch.split(embeddings, lengths, dim=-2), lengths, seeds):
        bound = alpha / math.sqrt(length * shape[-1])
        noise = torch.empty(sequence.shape, dtype=torch.float32, device=embeddings.device)
        noise.uniform_(-bound, bound, generator=generator.manual_seed(seed))
        noised.append((sequence + noise).to(embeddings.dtype))
    return torch.cat(noised, dim=-2) if noised else embeddings


class NEFTune(Algorithm):
    """Add `neftune_noise` to the input embeddings of every training microbatch.

    The noise of a sequence is seeded by (seed, batch, record) only. It does not depend on how the batch is split into
    microbatches and over ranks, and is repeated in activation checkpointing and after a resume.

    Events:
        INIT: registers a hook on the input embedding, before the model is wrapped for DDP or FSDP2.
        BEFORE_FORWARD: records the sequences of the microbatch and enables the hook, which adds noise while the
            embedding is in training mode and gradients are enabled.
        AFTER_BACKWARD: disables the hook.
    Evaluation, generation and forward passes outside the training loop are unaffected, as are weights and state dicts;
    a copy of the model (deepcopy, pickle) adds no noise.

    The model is a ComposerModel whose `model` has `get_input_embeddings()`; its microbatch is a mapping with "lengths"
    (tokens of each packed sequence) and "record_keys" (one integer per sequence).

    Args:
        alpha: scale of the noise, above 0; the published runs use 5.
        seed: seed of the run.
    Raises:
        ValueError: alpha is not above 0.
    """

    def __init__(self, alpha: float, seed: int) -> None:
        if not 0 < alpha < math.inf:
            raise ValueError(
                f"neftune.alpha is {alpha}; expected a finite number above 0. Remove neftune to train without noise."
            )
        self.alpha = alpha
        self.seed = seed
        self._lengths: list[int] = []
        self._seeds: list[int] = []
        self._is_in_microbatch = False

    def __repr__(self) -> str:
        return f"NEFTune(alpha={self.alpha}, seed={self.seed})"

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BEFORE_FORWARD, Event.AFTER_BACKWARD)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            embedding: torch.nn.Module = state.model.model.get_input_embeddings()  # type: ignore[union-attr, operator]
            embedding.register_forward_hook(_EmbeddingHook(self))
        elif event == Event.BEFORE_FORWARD:
            batch = state.timestamp.batch.value
            self._lengths = list(state.batch["lengths"])
            self._seeds = [noise_seed(self.seed, batch, key) for key in state.batch["record_keys"]]
            self._is_in_microbatch = True
        else:
            self._is_in_microbatch = False

    def noised(self, embedding: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
        """Return the output of the embedding, with noise inside a training microbatch."""
        if not (self._is_in_microbatch and embedding.training and torch.is_grad_enabled()):
            return output
        return neftune_noise(output, self._lengths, self.alpha, self._seeds)


class _EmbeddingHook:
    """Forward hook that adds noise, unless it is a copy: copying or pickling its module drops the algorithm."""

    def __init__(self, algorithm: NEFTune | None = None) -> None:
        self.algorithm = algorithm

    def __call__(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if self.algorithm is None else self.algorithm.noised(module, output)

    def __reduce__(self) -> tuple[type[_EmbeddingHook], tuple[()]]:
        return _EmbeddingHook, ()
