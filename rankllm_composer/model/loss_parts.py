"""What ranking losses share: checks of their arguments, pairs, places, gains and reductions."""

from __future__ import annotations

import math

import torch

from rankllm_composer.screen import warn

REDUCTIONS = ("none", "mean", "sum")
TARGETS = ("ranks", "self_sorted")


def prepare(
    name: str, scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor | None, reduction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check the shared arguments; return scores in the computing dtype, ranks and mask, with 0 at masked positions."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}.")
    shape = tuple(scores.shape)
    if scores.dim() != 2 or shape[1] == 0 or not scores.is_floating_point():
        raise ValueError(f"{name}: scores are {scores.dtype} of shape {shape}; expected floats (B, N), N >= 1.")
    if ranks.shape != scores.shape or ranks.dtype != torch.int64:
        found = f"{ranks.dtype} of shape {tuple(ranks.shape)}"
        raise ValueError(f"{name}: ranks are {found}; expected int64 of shape {shape}, as the scores.")
    mask = torch.ones_like(ranks, dtype=torch.bool) if mask is None else mask
    if mask.shape != scores.shape or mask.dtype != torch.bool:
        found = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ValueError(f"{name}: mask is {found}; expected bool of shape {shape}, as the scores.")
    if scores.dtype != torch.float64:
        scores = scores.float()
    # where() instead of a product: 0 * NaN is NaN, and so would be the gradient.
    return torch.where(mask, scores, 0.0), torch.where(mask, ranks, 0), mask


def check_target(name: str, target: str, detach_target: bool) -> None:
    if target not in TARGETS:
        raise ValueError(f"{name}: target is {target!r}; expected one of {', '.join(TARGETS)}.")
    if detach_target and target == "ranks":
        warn(f"{name}: detach_target has no effect with target='ranks', which carries no gradient", stacklevel=3)


def reduce(losses: torch.Tensor, mask: torch.Tensor, reduction: str) -> torch.Tensor:
    losses = torch.where(mask.sum(dim=1) >= 2, losses, 0.0)  # (B,)
    if reduction == "mean":
        return losses.sum() / max(losses.shape[0], 1)
    return losses.sum() if reduction == "sum" else losses


def log_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return (B, N) log-probabilities of the real candidates, 0 at masked positions."""
    # The lowest finite number instead of -inf: a list without candidates must not become 0 / 0.
    lowest = torch.finfo(scores.dtype).min
    return torch.where(mask, torch.where(mask, scores, lowest).log_softmax(dim=1), 0.0)


def ordered_pairs(relevance: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return (B, N, N) bool: [b, i, j] is True if both are real and i is more relevant than j."""
    real = mask.unsqueeze(2) & mask.unsqueeze(1)
    return real & (relevance.unsqueeze(2) > relevance.unsqueeze(1))


def mean_over_pairs(values: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Return the (B,) means of (B, N, N) values over the selected pairs; 0 for lists without pairs."""
    return torch.where(pairs, values, 0.0).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


def descending(scores: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores of each list in descending order, masked ones last, and their candidates; both (B, N)."""
    order = scores.detach().masked_fill(~mask, -math.inf).argsort(dim=1, descending=True, stable=True)
    return scores.gather(1, order), order


def tied_pairs(ranks: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return (B, N, N) bool: [b, i, j] is True if both are real and equally good, as each candidate is with itself."""
    return mask.unsqueeze(2) & mask.unsqueeze(1) & (ranks.unsqueeze(2) == ranks.unsqueeze(1))


def strict_places(ranks: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the (B, N) int64 places of an order by rank, 0 = best, in which tied candidates stand as presented."""
    behind = torch.where(mask, ranks, torch.iinfo(torch.int64).max)
    return behind.argsort(dim=1, stable=True).argsort(dim=1)


def mean_places(ranks: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the (B, N) places of the candidates, 0 = best; tied ones have the mean of those that they share."""
    better = ordered_pairs(-ranks, mask).sum(dim=1)  # (B, N), number of candidates before each
    others = tied_pairs(ranks, mask).sum(dim=1) - mask.long()
    return torch.where(mask, better.to(dtype) + others.to(dtype) / 2, 0.0)


def self_sorted_relevance(
    scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor, detach_target: bool
) -> torch.Tensor:
    """Return (B, N): the value at the place of each candidate among the scores of its list, sorted descending.

    Tied candidates have the mean of the values at their places.
    """
    relevance = descending(scores, mask)[0].gather(1, strict_places(ranks, mask))
    tied = tied_pairs(ranks, mask)
    relevance = torch.where(tied, relevance.unsqueeze(1), 0.0).sum(dim=2) / tied.sum(dim=2).clamp(min=1)
    return relevance.detach() if detach_target else relevance


def known_values(name: str, what: str, values: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
    """Return grades or a teacher's scores in the dtype of the scores; all NaN if there are none."""
    if values is None:
        return torch.full_like(scores, math.nan, requires_grad=False)
    if values.shape != scores.shape or not values.is_floating_point():
        found, shape = f"{values.dtype} of shape {tuple(values.shape)}", tuple(scores.shape)
        raise ValueError(f"{name}: {what} are {found}; expected floats of shape {shape}, as the scores.")
    return values.to(scores.dtype)


def exponential_gains(relevance: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return (B, N) gains 2^max(y, 0) - 1, all of a list divided by 2^max(y), as 2^y alone overflows."""
    positive = torch.where(mask, relevance, 0.0).clamp(min=0.0)
    top = positive.amax(dim=1, keepdim=True).detach()
    return torch.exp2(positive - top) * -torch.expm1(-positive * math.log(2.0))


def list_gains(
    name: str, ranks: torch.Tensor, grades: torch.Tensor | None, mask: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """Return (B, N) gains up to a factor per list: 2^grade - 1 in lists with grades, otherwise 1 / (place + 1)."""
    known = known_values(name, "grades", grades, like)
    has_grades = (known.isfinite() | ~mask).all(dim=1, keepdim=True)
    by_grade = exponential_gains(torch.where(has_grades, known, 0.0), mask)
    by_place = 1.0 / (mean_places(ranks, mask, like.dtype) + 1.0)
    return torch.where(mask, torch.where(has_grades, by_grade, by_place), 0.0)


def before_worse(scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return (B, N): negative log-likelihood that a candidate is chosen before all worse ones; 0 where masked."""
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    worse = ranks.unsqueeze(1) > ranks.unsqueeze(2)  # (B, N, N), [b, i, j]: j is worse than i
    remaining = mask.unsqueeze(1) & (worse | itself)
    totals = torch.where(remaining, scores.unsqueeze(1), torch.finfo(scores.dtype).min).logsumexp(dim=2)
    return torch.where(mask, totals - scores, 0.0)


def smooth_places(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the (B, N) smooth ranks 1 + sum over j != i of sigmoid(s_j - s_i) of Qin et al. 2010."""
    is_ahead = torch.sigmoid(scores.unsqueeze(1) - scores.unsqueeze(2))  # (B, N, N), [b, i, j] = sigmoid(s_j - s_i)
    # The sum includes the candidate itself: sigmoid(0) = 0.5.
    return 0.5 + torch.where(mask.unsqueeze(1), is_ahead, 0.0).sum(dim=2)
