"""Training objectives: language modeling of the permutation, a ranking loss on the identifier scores, or both."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from rankllm_composer.errors import ModelError
from rankllm_composer.model.loss_table import RELEVANCE, import_loss
from rankllm_composer.model.losses import LOSSES
from rankllm_composer.options import OBJECTIVES, TokenWeights
from rankllm_composer.prompts.relevance import LEFT_OUT


@functools.cache
def find_loss(name: str) -> Callable[..., torch.Tensor]:
    """Return a ranking loss of `LOSSES`, or import one of the user's own.

    Args:
        name: a key of `LOSSES`, or `package.module:function`. The function is called as those of `losses` are, with
            `reduction="none"`, and with grades and teacher_scores if it has such arguments.
    Raises:
        ModelError: there is no such function.
    """
    return LOSSES[name] if name in LOSSES else import_loss(name)


@dataclass(frozen=True)
class Objective:
    """The loss of a global batch of lists.

        generation: language_modelling_weight * mean over target tokens of -w * log p(token, or one tied with it)
        ranking:    ranking_weight * mean over lists of ranking_loss(identifier scores, ranks, grades, teacher's scores)
        combined:   the sum of the two

    Identifier scores are the logits of the identifier tokens at the score position of a list. The weight w of a token
    is 1, or with token_weights "by_rank" 1 + 1 / log2(r + 1) for the identifier at the 1-based place r of the answer
    (the importance of Liu et al. 2024, arXiv:2412.14574).

    Args:
        name: "generation", "ranking" or "combined".
        language_modelling_weight, ranking_weight: factors of the two parts.
        token_weights: "equal" or "by_rank".
        ranking_loss: a key of `losses.LOSSES`, or `package.module:function`, see `find_loss`.
        ranking_loss_options: keyword arguments of that loss, e.g. {"weighted": True}.
    Raises:
        ValueError: the name is unknown, or the loss cannot be imported.
    """

    name: str
    language_modelling_weight: float = 1.0
    ranking_weight: float = 1.0
    ranking_loss: str = "ranknet"
    ranking_loss_options: Mapping[str, Any] = field(default_factory=dict)
    token_weights: TokenWeights = "equal"

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(f"objective.name is {self.name!r}; expected one of {', '.join(OBJECTIVES)}.")
        find_loss(self.ranking_loss)
        if self.ranking_loss not in LOSSES:
            import_loss(self.ranking_loss, self.ranking_loss_options)

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
            nats = F.cross_entropy(logits.float(), batch["target_ids"], reduction="none")  # (R,)
            if batch["record_ids"]:
                named = find_named(batch)
                nats = nats - tie_allowance(logits, batch, named)
                if self.token_weights == "by_rank":
                    nats = nats * weights_by_rank(named)
            parts["language_modelling"] = nats.sum() * batch["language_modelling_scale"]
            total = total + self.language_modelling_weight * parts["language_modelling"]
        if self.trains_ranking:
            loss = partial(find_loss(self.ranking_loss), **self.ranking_loss_options)
            mask = batch["candidate_mask"] & (batch["ranks"] > LEFT_OUT)
            known = {name: batch[name] for name in RELEVANCE if name in inspect.signature(loss).parameters}
            per_list = loss(identifier_scores(logits, batch), batch["ranks"], mask=mask, reduction="none", **known)
            if per_list.shape != mask.shape[:1]:
                raise ModelError(
                    f"objective.ranking_loss is {self.ranking_loss}, which returned shape {tuple(per_list.shape)} with "
                    f"reduction='none'; expected one value for each of {len(mask)} lists. Correct the function."
                )
            parts["ranking"] = per_list.sum() * batch["ranking_scale"]
            total = total + self.ranking_weight * parts["ranking"]
        if not batch["record_ids"]:
            total = total + 0.0 * logits.float().sum()  # every rank needs a backward pass, even without lists
        return {"total": total, **parts}


@dataclass(frozen=True)
class Named:
    """The candidates that answers name, token by token.

    Attributes:
        candidates: (R, N) bool, True for the candidate whose identifier the target token is.
        earlier: (R, N) bool, True for candidates that the answer has named before.
    """

    candidates: torch.Tensor
    earlier: torch.Tensor


def find_named(batch: Mapping[str, Any]) -> Named:
    """Find the single-token identifiers among the target tokens of a microbatch with at least one list."""
    targets, lists = batch["target_ids"], batch["target_lists"]  # (R,)
    first = batch["score_rows"]  # (S,), rows of the lists' first identifiers
    rows = torch.arange(len(targets), device=targets.device)
    candidates = (targets.unsqueeze(1) == batch["identifier_token_ids"][lists]) & batch["candidate_mask"][lists]
    candidates = candidates & (rows >= first[lists]).unsqueeze(1)
    before = candidates.long().cumsum(dim=0) - candidates.long()  # (R, N)
    return Named(candidates, before > before[first][lists])


def tie_allowance(logits: torch.Tensor, batch: Mapping[str, Any], named: Named) -> torch.Tensor:
    """Return the nats to subtract from the cross-entropy of each target token, as an answer may name ties in any order.

    At an identifier, any tied candidate that the answer has not named yet is equally right, so the loss is -log of the
    sum of their probabilities: the cross-entropy minus log(sum / probability of the target). Without ties, this is
    exactly 0.

    Args:
        logits: (R, V) at the batch's logit positions.
        batch: a microbatch of `packing.split_batch` with at least one list.
        named: its identifiers, of `find_named`.
    Returns:
        (R,) float32, 0 or more.
    """
    lists, ranks = batch["target_lists"], batch["ranks"]  # (R,), (S, N)
    grades = batch["grades"]  # (S, N), NaN in lists that they do not order
    tied = grades.unsqueeze(2) == grades.unsqueeze(1)  # (S, N, N)
    tied |= grades.isnan().unsqueeze(2) & (ranks.unsqueeze(2) == ranks.unsqueeze(1))
    tied &= batch["candidate_mask"].unsqueeze(1)
    equals = (named.candidates.unsqueeze(2) & tied[lists]).any(dim=1)  # (R, N)
    right = named.candidates | (equals & ~named.earlier)
    scores = logits.gather(1, batch["identifier_token_ids"][lists]).float()  # (R, N)
    # The lowest finite number instead of -inf, which has no gradient where a token is no identifier.
    total = torch.where(right, scores, torch.finfo(scores.dtype).min).logsumexp(dim=1)
    own = torch.where(named.candidates, scores, 0.0).sum(dim=1)
    return torch.where(named.candidates.any(dim=1), total - own, 0.0)


def weights_by_rank(named: Named) -> torch.Tensor:
    """Return the (R,) weights of the target tokens: 1 + 1 / log2(r + 1) for the identifier at place r, otherwise 1."""
    places = named.earlier.sum(dim=1) + 1
    return torch.where(named.candidates.any(dim=1), 1.0 + 1.0 / torch.log2(places + 1.0), 1.0)


def identifier_scores(logits: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the scores of the candidates: logits of their identifiers at the score position of each list.

    (R, V) logits, or (R, C) of `batch["scored_token_ids"]`, give (S, N) float32 scores; padding candidates have the
    score of token 0, to be masked by `batch["candidate_mask"]`.
    """
    are_scored = logits.shape[-1] == len(batch["scored_token_ids"])
    columns = batch["identifier_columns" if are_scored else "identifier_token_ids"]  # (S, N)
    return logits[batch["score_rows"]].gather(1, columns).float()
