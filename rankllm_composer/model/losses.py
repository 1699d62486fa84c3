"""Ranking losses over batches of candidate lists.

Every loss has the arguments scores (B, N), the teacher's ranks (B, N) and a mask (B, N), and computes all lists and
pairs at once. Shared conventions:

- Arithmetic and result are float32 (float64 for float64 scores), whatever the type of the scores.
- The real candidates of a list have the ranks 0 … n-1. Values at masked positions, including NaN and inf, affect
  neither the loss nor the gradient.
- The loss and gradient of a list with fewer than two candidates are 0.
- `reduction="mean"` is the mean over all B lists, including those zeros; "sum" is their sum; "none" gives (B,).
- Losses with a relevance target derive it from the ranks: the gain of a candidate is 1 / (rank + 1), 0-based. With
  `target="self_sorted"`, as in the published training code, the relevance of a candidate is the value at its rank among
  the model's own scores sorted descending; gradient flows through it unless `detach_target` is set.
- Other shapes or types, and unknown values of target and reduction, raise ValueError.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from rankllm_composer.model.loss_table import RANKING_LOSSES
from rankllm_composer.screen import warn

REDUCTIONS = ("none", "mean", "sum")
TARGETS = ("ranks", "self_sorted")


def _prepare(
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


def _check_target(name: str, target: str, detach_target: bool) -> None:
    if target not in TARGETS:
        raise ValueError(f"{name}: target is {target!r}; expected one of {', '.join(TARGETS)}.")
    if detach_target and target == "ranks":
        warn(f"{name}: detach_target has no effect with target='ranks', which carries no gradient", stacklevel=3)


def _reduce(losses: torch.Tensor, mask: torch.Tensor, reduction: str) -> torch.Tensor:
    losses = torch.where(mask.sum(dim=1) >= 2, losses, 0.0)  # (B,)
    if reduction == "mean":
        return losses.sum() / max(losses.shape[0], 1)
    return losses.sum() if reduction == "sum" else losses


def _ordered_pairs(relevance: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return (B, N, N) bool: [b, i, j] is True if both are real and i is more relevant than j."""
    real = mask.unsqueeze(2) & mask.unsqueeze(1)
    return real & (relevance.unsqueeze(2) > relevance.unsqueeze(1))


def _mean_over_pairs(values: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Return the (B,) means of (B, N, N) values over the selected pairs; 0 for lists without pairs."""
    return torch.where(pairs, values, 0.0).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


def _descending(scores: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores of each list in descending order, masked ones last, and their candidates; both (B, N)."""
    order = scores.detach().masked_fill(~mask, -math.inf).argsort(dim=1, descending=True, stable=True)
    return scores.gather(1, order), order


def _self_sorted_relevance(
    scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor, detach_target: bool
) -> torch.Tensor:
    """Return (B, N): the value at the rank of each candidate among the scores of its list, sorted descending."""
    relevance = _descending(scores, mask)[0].gather(1, ranks)
    return relevance.detach() if detach_target else relevance


def ranknet_loss(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    weighted: bool = True,
    reduction: str = "mean",
) -> torch.Tensor:
    """RankNet: logistic loss on every pair of candidates that the teacher orders.

        loss = mean over pairs (i better than j) of w_ij * softplus(-(s_i - s_j)),  w_ij = 1 / (r_i + r_j)

    with 1-based ranks r in the weight. The mean divides by the number of pairs, n(n-1)/2, not by the sum of weights.

    Args:
        scores: (B, N) float logits, higher is better.
        ranks: (B, N) int64, 0 = best.
        mask: (B, N) bool, True = real candidate. None = all real.
        weighted: False sets every w_ij to 1.
        reduction: "none", "mean" (over all B lists) or "sum".
    Returns:
        Scalar in nats; (B,) if reduction="none". Lists with fewer than two candidates give 0.
    Source:
        Burges et al. 2005; the 1 / (r_i + r_j) weight is FIRST's (arXiv:2406.15657).
    """
    scores, ranks, mask = _prepare("ranknet_loss", scores, ranks, mask, reduction)
    losses = F.softplus(scores.unsqueeze(1) - scores.unsqueeze(2))  # (B, N, N), [b, i, j] = softplus(-(s_i - s_j))
    if weighted:
        losses = losses / (ranks.unsqueeze(2) + ranks.unsqueeze(1) + 2)
    return _reduce(_mean_over_pairs(losses, _ordered_pairs(-ranks, mask)), mask, reduction)


def lambdarank_loss(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    target: str = "ranks",
    detach_target: bool = False,
    reduction: str = "mean",
) -> torch.Tensor:
    """LambdaRank: the pair loss of RankNet, each pair weighted by the effect of its order on nDCG.

        loss = mean over pairs (i more relevant than j) of w_ij * log2(1 + exp(-(s_i - s_j)))
        w_ij = |1 / log2(1 + d) - 1 / log2(2 + d)| * |g_i - g_j| / maxDCG

    d is the distance between i and j in the order of the scores, maxDCG the DCG of the teacher's order. With
    target="ranks" the gain is g = 1 / (rank + 1); with "self_sorted" it is g = 2^max(y, 0) - 1 of the relevance y in
    the model's own sorted scores, so a list of negative scores has no gain and loss 0. The published code gives NaN for
    scores above about 130 and clamps probabilities at 1e-10; this code does neither.

    Args:
        scores: (B, N) float logits, higher is better.
        ranks: (B, N) int64, 0 = best.
        mask: (B, N) bool, True = real candidate; None = all are real.
        reduction: "mean", "sum" or "none".
        target: "ranks" or "self_sorted" (published).
        detach_target: stop the gradient through a self-sorted target. The published code does not.
    Returns:
        Scalar in bits; (B,) if reduction="none".
    Source:
        Burges et al. 2006; weights are NDCG-Loss2 of the LambdaLoss framework, Wang et al. 2018.
    """
    _check_target("lambdarank_loss", target, detach_target)
    scores, ranks, mask = _prepare("lambdarank_loss", scores, ranks, mask, reduction)
    if target == "ranks":
        relevance = gains = 1.0 / (ranks + 1).to(scores.dtype)
    else:
        relevance = _self_sorted_relevance(scores, ranks, mask, detach_target)
        positive = relevance.clamp(min=0.0)
        # All gains are divided by 2^top, which cancels in gain / maxDCG: 2^y alone overflows.
        top = torch.where(mask, positive, 0.0).amax(dim=1, keepdim=True).detach()
        gains = torch.exp2(positive - top) * -torch.expm1(-positive * math.log(2.0))
    gains = torch.where(mask, gains, 0.0)
    max_dcg = (gains / torch.log2(ranks.to(scores.dtype) + 2.0)).sum(dim=1, keepdim=True)  # (B, 1)
    gains = gains / max_dcg.clamp(min=1e-10)

    places = _descending(scores, mask)[1].argsort(dim=1).to(scores.dtype)  # (B, N), 0 = highest score
    # At least 1: on the diagonal, which no pair uses, the discount would be 1 / log2(1).
    distance = (places.unsqueeze(2) - places.unsqueeze(1)).abs().clamp(min=1.0)  # (B, N, N)
    discounts = 1.0 / torch.log2(1.0 + distance) - 1.0 / torch.log2(2.0 + distance)
    weights = discounts * (gains.unsqueeze(2) - gains.unsqueeze(1)).abs()
    losses = weights * F.softplus(scores.unsqueeze(1) - scores.unsqueeze(2)) / math.log(2.0)
    return _reduce(_mean_over_pairs(losses, _ordered_pairs(relevance, mask)), mask, reduction)


def listnet_loss(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    target: str = "ranks",
    detach_target: bool = False,
    reduction: str = "mean",
) -> torch.Tensor:
    """ListNet: cross-entropy between the top-one probabilities of the target and of the scores.

        loss = -sum over i of p_i * log softmax(s)_i

    With target="ranks" p_i is proportional to the gain 1 / (rank + 1); with "self_sorted" p = softmax(y) of the
    relevance y in the model's own sorted scores.

    Args:
        scores: (B, N) float logits, higher is better.
        ranks: (B, N) int64, 0 = best.
        mask: (B, N) bool, True = real candidate; None = all are real.
        reduction: "mean", "sum" or "none".
        target: "ranks" or "self_sorted" (published).
        detach_target: stop the gradient through a self-sorted target. The published code does not.
    Returns:
        Scalar in nats; (B,) if reduction="none".
    Source:
        Cao et al. 2007.
    """
    _check_target("listnet_loss", target, detach_target)
    scores, ranks, mask = _prepare("listnet_loss", scores, ranks, mask, reduction)
    if target == "ranks":
        # The softmax of this is proportional to 1 / (rank + 1).
        relevance = -torch.log((ranks + 1).to(scores.dtype))
    else:
        relevance = _self_sorted_relevance(scores, ranks, mask, detach_target)
    # The lowest finite number instead of -inf: a list without candidates must not become 0 / 0.
    lowest = torch.finfo(scores.dtype).min
    probabilities = torch.where(mask, relevance, lowest).softmax(dim=1)
    log_probabilities = torch.where(mask, torch.where(mask, scores, lowest).log_softmax(dim=1), 0.0)
    return _reduce(-(probabilities * log_probabilities).sum(dim=1), mask, reduction)


def listmle_loss(
    scores: torch.Tensor, ranks: torch.Tensor, *, mask: torch.Tensor | None = None, reduction: str = "mean"
) -> torch.Tensor:
    """ListMLE: negative log-likelihood of the teacher's permutation under Plackett-Luce.

        loss = sum over i of [log sum over {j: r_j >= r_i} of exp(s_j)  -  s_i]

    As a log-likelihood it is a sum over positions, which grows with the length of the list.

    Args:
        scores: (B, N) float logits, higher is better.
        ranks: (B, N) int64, 0 = best.
        mask: (B, N) bool, True = real candidate; None = all are real.
        reduction: "mean", "sum" or "none".
    Returns:
        Scalar in nats; (B,) if reduction="none".
    Source:
        Xia et al. 2008.
    """
    scores, ranks, mask = _prepare("listmle_loss", scores, ranks, mask, reduction)
    remaining = mask.unsqueeze(1) & (ranks.unsqueeze(1) >= ranks.unsqueeze(2))  # (B, N, N), [b, i, j]: j not before i
    lowest = torch.finfo(scores.dtype).min
    totals = torch.where(remaining, scores.unsqueeze(1), lowest).logsumexp(dim=2)  # (B, N)
    return _reduce(torch.where(mask, totals - scores, 0.0).sum(dim=1), mask, reduction)


def adr_mse_loss(
    scores: torch.Tensor, ranks: torch.Tensor, *, mask: torch.Tensor | None = None, reduction: str = "mean"
) -> torch.Tensor:
    """Approximate discounted rank MSE: distance of each candidate's smooth rank from the teacher's rank.

        loss = mean over i of (r_i - a_i)^2 / log2(r_i + 1),  a_i = 1 + sum over j != i of sigmoid(s_j - s_i)

    with 1-based ranks r. Scores far apart saturate the sigmoid, so the gradient of a confidently wrong order is tiny.

    Args:
        scores: (B, N) float logits, higher is better.
        ranks: (B, N) int64, 0 = best.
        mask: (B, N) bool, True = real candidate; None = all are real.
        reduction: "mean", "sum" or "none".
    Returns:
        Scalar in squared ranks; (B,) if reduction="none".
    Source:
        Rank-DistiLLM, Schlatt et al. 2025 (arXiv:2405.07920); the smooth rank is Qin et al.'s, 2010.
    """
    scores, ranks, mask = _prepare("adr_mse_loss", scores, ranks, mask, reduction)
    is_ahead = torch.sigmoid(scores.unsqueeze(1) - scores.unsqueeze(2))  # (B, N, N), [b, i, j] = sigmoid(s_j - s_i)
    # The sum includes the candidate itself: sigmoid(0) = 0.5.
    smooth_ranks = 0.5 + torch.where(mask.unsqueeze(1), is_ahead, 0.0).sum(dim=2)  # (B, N)
    teacher_ranks = (ranks + 1).to(scores.dtype)
    errors = (teacher_ranks - smooth_ranks).square() / torch.log2(teacher_ranks + 1.0)
    losses = torch.where(mask, errors, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return _reduce(losses, mask, reduction)


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    name.removesuffix("_loss"): value for name, value in list(globals().items()) if name.endswith("_loss")
}
"""Name in a recipe → loss: every function of this module whose name ends in `_loss`."""


def _check_table() -> None:
    shared = {"scores", "ranks", "mask", "reduction"}
    functions = {name: sorted(set(inspect.signature(loss).parameters) - shared) for name, loss in LOSSES.items()}
    table = {name: sorted(options) for name, options in RANKING_LOSSES.items()}
    if functions != table:
        raise ImportError(
            f"model/losses.py defines {functions} (loss: options); model/loss_table.py lists {table}. Make them agree."
        )


_check_table()
