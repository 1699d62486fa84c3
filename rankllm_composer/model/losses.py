"""Ranking losses over batches of candidate lists.

Every loss has the arguments scores (B, N), ranks (B, N) and a mask (B, N), and computes all lists and pairs at once.
Shared conventions:

- Arithmetic and result are float32 (float64 for float64 scores), whatever the type of the scores.
- Of the ranks only their order counts: a lower rank is better, equal ranks are tied. Strict orders are 0 … n-1. Where a
  formula has a rank, tied candidates have the mean of the places that they share, counted from 0.
- A loss with the argument grades (B, N) uses those of lists in which every real candidate has one; NaN = none. Grades
  agree with the ranks; a grade below 0 counts as 0.
- Values at masked positions, including NaN and inf, affect neither the loss nor the gradient.
- The loss and gradient of a list with fewer than two candidates are 0.
- `reduction="mean"` is the mean over all B lists, including those zeros; "sum" is their sum; "none" gives (B,).
- Losses with a relevance target derive it from grades, with the gain 2^grade - 1, and otherwise from the ranks, with
  the gain 1 / (rank + 1), 0-based. With `target="self_sorted"`, as in the published training code, the relevance of a
  candidate is the value at its rank among the model's own scores sorted descending; gradient flows through it unless
  `detach_target` is set.
- Other shapes or types, and unknown values of target and reduction, raise ValueError.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from rankllm_composer.model.loss_parts import (
    before_worse,
    check_target,
    descending,
    exponential_gains,
    list_gains,
    log_softmax,
    mean_over_pairs,
    mean_places,
    ordered_pairs,
    prepare,
    reduce,
    self_sorted_relevance,
    smooth_places,
    strict_places,
)
from rankllm_composer.model.loss_table import RANKING_LOSSES, RELEVANCE
from rankllm_composer.model.teacher_losses import (
    approx_ndcg_loss,
    info_nce_loss,
    kl_divergence_loss,
    margin_mse_loss,
    ndcg_loss2pp_loss,
    p_listmle_loss,
)

__all__ = [
    "LOSSES",
    "adr_mse_loss",
    "approx_ndcg_loss",
    "info_nce_loss",
    "kl_divergence_loss",
    "lambdarank_loss",
    "listmle_loss",
    "listnet_loss",
    "margin_mse_loss",
    "ndcg_loss2pp_loss",
    "p_listmle_loss",
    "ranknet_loss",
]


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

    with 1-based ranks r in the weight, the mean places of tied candidates. The mean divides by the number of pairs,
    n(n-1)/2 without ties, not by the sum of weights. Tied candidates are in no pair.

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
    scores, ranks, mask = prepare("ranknet_loss", scores, ranks, mask, reduction)
    losses = F.softplus(scores.unsqueeze(1) - scores.unsqueeze(2))  # (B, N, N), [b, i, j] = softplus(-(s_i - s_j))
    if weighted:
        places = mean_places(ranks, mask, scores.dtype)
        losses = losses / (places.unsqueeze(2) + places.unsqueeze(1) + 2)
    return reduce(mean_over_pairs(losses, ordered_pairs(-ranks, mask)), mask, reduction)


def lambdarank_loss(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    grades: torch.Tensor | None = None,
    target: str = "ranks",
    detach_target: bool = False,
    reduction: str = "mean",
) -> torch.Tensor:
    """LambdaRank: the pair loss of RankNet, each pair weighted by the effect of its order on nDCG.

        loss = mean over pairs (i more relevant than j) of w_ij * log2(1 + exp(-(s_i - s_j)))
        w_ij = |1 / log2(1 + d) - 1 / log2(2 + d)| * |g_i - g_j| / maxDCG

    d is the distance between i and j in the order of the scores, maxDCG the DCG of the teacher's order. With
    target="ranks" the gain is g = 2^grade - 1, or 1 / (rank + 1) in lists without grades; with "self_sorted" it is g =
    2^max(y, 0) - 1 of the relevance y in the model's own sorted scores, so a list of negative scores has no gain and
    loss 0. The published code gives NaN for scores above about 130 and clamps probabilities at 1e-10; this code does
    neither.

    Args:
        scores: (B, N) float logits, higher is better.
        ranks: (B, N) int64, 0 = best.
        mask: (B, N) bool, True = real candidate; None = all are real.
        grades: (B, N) float, NaN = none; used with target="ranks".
        reduction: "mean", "sum" or "none".
        target: "ranks" or "self_sorted" (published).
        detach_target: stop the gradient through a self-sorted target. The published code does not.
    Returns:
        Scalar in bits; (B,) if reduction="none".
    Source:
        Burges et al. 2006; weights are NDCG-Loss2 of the LambdaLoss framework, Wang et al. 2018.
    """
    check_target("lambdarank_loss", target, detach_target)
    scores, ranks, mask = prepare("lambdarank_loss", scores, ranks, mask, reduction)
    if target == "ranks":
        relevance = gains = list_gains("lambdarank_loss", ranks, grades, mask, scores)
    else:
        relevance = self_sorted_relevance(scores, ranks, mask, detach_target)
        gains = torch.where(mask, exponential_gains(relevance, mask), 0.0)
    ideal = strict_places(ranks, mask).to(scores.dtype)
    max_dcg = (gains / torch.log2(ideal + 2.0)).sum(dim=1, keepdim=True)  # (B, 1)
    gains = gains / max_dcg.clamp(min=1e-10)

    places = descending(scores, mask)[1].argsort(dim=1).to(scores.dtype)  # (B, N), 0 = highest score
    # At least 1: on the diagonal, which no pair uses, the discount would be 1 / log2(1).
    distance = (places.unsqueeze(2) - places.unsqueeze(1)).abs().clamp(min=1.0)  # (B, N, N)
    discounts = 1.0 / torch.log2(1.0 + distance) - 1.0 / torch.log2(2.0 + distance)
    weights = discounts * (gains.unsqueeze(2) - gains.unsqueeze(1)).abs()
    losses = weights * F.softplus(scores.unsqueeze(1) - scores.unsqueeze(2)) / math.log(2.0)
    return reduce(mean_over_pairs(losses, ordered_pairs(relevance, mask)), mask, reduction)


def listnet_loss(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    grades: torch.Tensor | None = None,
    target: str = "ranks",
    detach_target: bool = False,
    reduction: str = "mean",
) -> torch.Tensor:
    """ListNet: cross-entropy between the top-one probabilities of the target and of the scores.

        loss = -sum over i of p_i * log softmax(s)_i

    With target="ranks" p_i is proportional to the gain, 2^grade - 1, or 1 / (rank + 1) in lists without grades; with
    "self_sorted" p = softmax(y) of the relevance y in the model's own sorted scores. A list without a grade above 0 has
    loss 0. The softmax of grades, as in the source, would leave most of the probability on candidates of grade 0.

    Args:
        scores: (B, N) float logits, higher is better.
        ranks: (B, N) int64, 0 = best.
        mask: (B, N) bool, True = real candidate; None = all are real.
        grades: (B, N) float, NaN = none; used with target="ranks".
        reduction: "mean", "sum" or "none".
        target: "ranks" or "self_sorted" (published).
        detach_target: stop the gradient through a self-sorted target. The published code does not.
    Returns:
        Scalar in nats; (B,) if reduction="none".
    Source:
        Cao et al. 2007.
    """
    check_target("listnet_loss", target, detach_target)
    scores, ranks, mask = prepare("listnet_loss", scores, ranks, mask, reduction)
    if target == "ranks":
        gains = list_gains("listnet_loss", ranks, grades, mask, scores)
        probabilities = gains / gains.sum(dim=1, keepdim=True).clamp(min=1e-10)
    else:
        relevance = self_sorted_relevance(scores, ranks, mask, detach_target)
        probabilities = torch.where(mask, relevance, torch.finfo(scores.dtype).min).softmax(dim=1)
    return reduce(-(probabilities * log_softmax(scores, mask)).sum(dim=1), mask, reduction)


def listmle_loss(
    scores: torch.Tensor, ranks: torch.Tensor, *, mask: torch.Tensor | None = None, reduction: str = "mean"
) -> torch.Tensor:
    """ListMLE: negative log-likelihood of the teacher's permutation under Plackett-Luce.

        loss = sum over i of [log(exp(s_i) + sum over {j: r_j > r_i} of exp(s_j))  -  s_i]

    As a log-likelihood it is a sum over positions, which grows with the length of the list. A tied candidate is
    compared with all worse ones and with none of its equals: the likelihood that it is chosen before all worse ones. So
    there is no gradient between tied candidates. The usual remedy, an order drawn among them, teaches in each list an
    order that the teacher did not give, and on average pulls tied candidates to equal scores.

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
    scores, ranks, mask = prepare("listmle_loss", scores, ranks, mask, reduction)
    return reduce(before_worse(scores, ranks, mask).sum(dim=1), mask, reduction)


def adr_mse_loss(
    scores: torch.Tensor, ranks: torch.Tensor, *, mask: torch.Tensor | None = None, reduction: str = "mean"
) -> torch.Tensor:
    """Approximate discounted rank MSE: distance of each candidate's smooth rank from the teacher's rank.

        loss = mean over i of (r_i - a_i)^2 / log2(r_i + 1),  a_i = 1 + sum over j != i of sigmoid(s_j - s_i)

    with 1-based ranks r, the mean places of tied candidates, which are pulled to equal scores. Scores far apart
    saturate the sigmoid, so the gradient of a confidently wrong order is tiny.

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
    scores, ranks, mask = prepare("adr_mse_loss", scores, ranks, mask, reduction)
    smooth_ranks = smooth_places(scores, mask)  # (B, N)
    teacher_ranks = mean_places(ranks, mask, scores.dtype) + 1.0
    errors = (teacher_ranks - smooth_ranks).square() / torch.log2(teacher_ranks + 1.0)
    losses = torch.where(mask, errors, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return reduce(losses, mask, reduction)


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    name.removesuffix("_loss"): value for name, value in list(globals().items()) if name.endswith("_loss")
}
"""Name in a recipe → loss: every function here, imported ones too, whose name ends in `_loss`."""


def _check_table() -> None:
    shared = {"scores", "ranks", "mask", "reduction", *RELEVANCE}
    functions = {name: sorted(set(inspect.signature(loss).parameters) - shared) for name, loss in LOSSES.items()}
    table = {name: sorted(options) for name, options in RANKING_LOSSES.items()}
    if functions != table:
        raise ImportError(
            f"model/losses.py defines {functions} (loss: options); model/loss_table.py lists {table}. Make them agree."
        )


_check_table()
