"""Training objectives: language modeling of the permutation, a ranking loss on the identifier scores, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from rankllm_composer.model.losses import LOSSES
from rankllm_composer.options import OBJECTIVES


@dataclass(frozen=True)
class Objective:
    """The loss of a global batch of lists.

        generation: language_modelling_weight * mean over target tokens of -log p(token)
        ranking:    ranking_weight * mean over lists of ranking_loss(identifier scores, teacher's ranks)
        combined:   the sum of the two

    Identifier scores are the logits of the identifier tokens at the score position of a list.

    Args:
        name: "generation", "ranking" or "combined".
        language_modelling_weight, ranking_weight: factors of the two parts.
        ranking_loss: a key of `losses.LOSSES`.
        ranking_loss_options: keyword arguments of that loss, e.g. {"weighted": True}.
    Raises:
        ValueError: the name or the loss is unknown.
    """

    name: str
    language_modelling_weight: float = 1.0
    ranking_weight: float = 1.0
    ranking_loss: str = "ranknet"
    ranking_loss_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(f"objective.name is {self.name!r}; expected one of {', '.join(OBJECTIVES)}.")
        if self.ranking_loss not in LOSSES:
            raise ValueError(f"objective.ranking_loss is {self.ranking_loss!r}; expected one of {', '.join(LOSSES)}.")

    @property
    def trains_language_modelling(self) -> bool:
        return self.name != "ranking"

    @property
    def trains_ranking(self) -> bool:
        return self.name != "generation"

    def __call__(self, logits: torch.Tensor, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the losses of a packed microbatch, scaled so that Composer's average is the mean of the global batch.

        Args:
            logits: (R, V) at the batch's logit positions; for `ranking`, (R, C) of `batch["scored_token_ids"]`.
            batch: a microbatch of `packing.split_batch`.
        Returns:
            "total", which is minimized, and the unweighted parts of the objective: "language_modelling" (nats per
            token) and "ranking" (unit of the loss, per list). Scalars in float32.
        """
        parts: dict[str, torch.Tensor] = {}
        total = logits.new_zeros((), dtype=torch.float32)
        if self.trains_language_modelling:
            nats = F.cross_entropy(logits.float(), batch["target_ids"], reduction="sum")
            parts["language_modelling"] = nats * batch["language_modelling_scale"]
            total = total + self.language_modelling_weight * parts["language_modelling"]
        if self.trains_ranking:
            loss = partial(LOSSES[self.ranking_loss], **self.ranking_loss_options)
            scores = identifier_scores(logits, batch)
            per_list = loss(scores, batch["ranks"], mask=batch["candidate_mask"], reduction="none")
            parts["ranking"] = per_list.sum() * batch["ranking_scale"]
            total = total + self.ranking_weight * parts["ranking"]
        if not batch["record_ids"]:
            total = total + 0.0 * logits.float().sum()  # every rank needs a backward pass, even without lists
        return {"total": total, **parts}


def identifier_scores(logits: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the scores of the candidates: logits of their identifiers at the score position of each list.

    (R, V) logits, or (R, C) of `batch["scored_token_ids"]`, give (S, N) float32 scores; padding candidates have the
    score of token 0, to be masked by `batch["candidate_mask"]`.
    """
    are_scored = logits.shape[-1] == len(batch["scored_token_ids"])
    columns = batch["identifier_columns" if are_scored else "identifier_token_ids"]  # (S, N)
    return logits[batch["score_rows"]].gather(1, columns).float()
