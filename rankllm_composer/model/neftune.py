"""NEFTune: uniform noise on the token embeddings while training, as a function and as a Composer Algorithm."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger


def noise_seed(seed: int, batch: int, record_key: int) -> int:
    """The seed of one sequence's noise; it depends on nothing but its arguments.

    Args:
        seed: the run's seed.
        batch: optimizer steps taken before this one.
        record_key: what identifies the record.
    Returns:
        63 bits, well mixed: generators may use the low 32 only, and neighbouring seeds must not give related noise.
    """
    digest = hashlib.blake2b(f"{seed},{batch},{record_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def neftune_noise(embeddings: torch.Tensor, lengths: list[int], alpha: float, seeds: list[int]) -> torch.Tensor:
    """Add uniform noise to the token embeddings of each sequence of a pack.

        out = embeddings + u * alpha / sqrt(L * D),  u uniform in [-1, 1)

    L is the number of tokens of that sequence, so its noise is the same in whatever pack it stands. The noise is drawn
    in float32 on the embeddings' device, and the sum is rounded once to their type; the gradient passes unchanged.

    Args:
        embeddings: (1, T, D) or (T, D) float, S sequences end to end.
        lengths: tokens of each of the S sequences; they sum to T.
        alpha: scale of the noise. The expected length of a sequence's noise, as one vector, is alpha / sqrt(3).
        seeds: one a sequence; the same seed, length and kind of device give the same noise.
    Returns:
        Shaped and typed as the embeddings.
    Raises:
        ValueError: the embeddings are no pack, lengths do not sum to T or hold a zero, or seeds are not one a sequence.
    Source:
        Jain et al. 2023 (arXiv:2310.05914).
    """
    shape = tuple(embeddings.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
        raise ValueError(f"neftune_noise: embeddings have shape {shape}, allowed are (1, T, D) and (T, D)")
    if sum(lengths) != shape[-2] or min(lengths, default=1) < 1:
        raise ValueError(
            f"neftune_noise: lengths {lengths} sum to {sum(lengths)}, allowed are positive ones that sum to the pack's "
            f"{shape[-2]} tokens"
        )
    if len(seeds) != len(lengths):
        raise ValueError(
            f"neftune_noise: found {len(seeds)} seeds for {len(lengths)} sequences, allowed is one for each"
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
    """Noise on the input embeddings of every training microbatch, by `neftune_noise`.

    The noise of a sequence is seeded by (seed, batch, record) alone: it is the same however the batch is split into
    microbatches and over ranks, in the recomputation of activation checkpointing, and after a resume.

    Events:
        INIT: hooks the model's input embedding, before the model is wrapped for data parallelism or sharding.
        BEFORE_FORWARD: notes the microbatch's sequences; from here to
        AFTER_BACKWARD the hook adds noise, if the embedding is in training mode and gradients are on.
    Evaluation, generation and forwards outside the training loop are untouched, and so are the weights and state dicts;
    a copy of the model (deepcopy, pickle) carries no noise with it.

    The model is a ComposerModel whose `model` has `get_input_embeddings()`; its microbatch is a mapping with "lengths"
    (tokens of each packed sequence) and "record_keys" (an integer for each).

    Args:
        alpha: scale of the noise, above 0; the published runs use 5.
        seed: the run's seed.
    Raises:
        ValueError: alpha is not above 0.
    """

    def __init__(self, alpha: float, seed: int) -> None:
        if not 0 < alpha < math.inf:
            raise ValueError(
                f"neftune.alpha: found {alpha}, allowed is a finite number above 0; "
                "leave neftune out to train without noise"
            )
        self.alpha = alpha
        self.seed = seed
        self._lengths: list[int] = []
        self._seeds: list[int] = []
        self._is_in_microbatch = False

    def __repr__(self) -> str:
        return f"NEFTune(alpha={self.alpha}, seed={self.seed})"

    def match(self, event: Event, state: State) -> bool:
        """True at the three events named above."""
        return event in (Event.INIT, Event.BEFORE_FORWARD, Event.AFTER_BACKWARD)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Hook the embedding, or open or close the time in which the hook adds noise."""
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
        """The embedding's output as training sees it: with noise inside a training microbatch, else as it is."""
        if not (self._is_in_microbatch and embedding.training and torch.is_grad_enabled()):
            return output
        return neftune_noise(output, self._lengths, self.alpha, self._seeds)


class _EmbeddingHook:
    """The forward hook; where its module is copied or pickled, an idle hook takes its place."""

    def __init__(self, algorithm: NEFTune) -> None:
        self.algorithm = algorithm

    def __call__(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self.algorithm.noised(module, output)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_idle_hook, ()


def _idle_hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
    return None


def _make_idle_hook() -> Callable[..., None]:
    return _idle_hook
