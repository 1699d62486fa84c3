"""Losses that learn a teacher's scores, or measures of a ranking; conventions as in `losses`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from rankllm_composer.model.loss_parts import (
    before_worse,
    descending,
    known_values,
    list_gains,
    log_softmax,
    mean_over_pairs,
    mean_places,
    ordered_pairs,
    prepare,
    reduce,
    smooth_places,
    strict_places,
)


def kl_divergence_loss(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    teacher_scores: torch.Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """KL divergence from the teacher's distribution over the candidates to that of the scores.

        loss = T^2 * sum over i of p_i * (log p_i - log q_i),  p = softmax(t / T),  q = softmax(s / T)

    with the teacher's scores t. T^2 keeps the size of the gradient for any temperature. Candidates without a teacher's
    score are left out of both distributions. Ranks and grades are not used.

    Args:
        scores: (B, N) float logits, higher is better.
        ranks: (B, N) int64, 0 = best.
        mask: (B, N) bool, True = real candidate; None = all are real.
        teacher_scores: (B, N) float, NaN = none.
        temperature: T; above 1 it softens both distributions.
        reduction: "mean", "sum" or "none".
    Returns:
        Scalar in nats; (B,) if reduction="none".
    Source:
        Hinton et al. 2015.
    """
    scores, ranks, mask = prepare("kl_divergence_loss", scores, ranks, mask, reduction)
    teacher, mask = _scored("kl_divergence_loss", teacher_scores, scores, mask)
    log_p, log_q = log_softmax(teacher / temperature, mask), log_softmax(scores / temperature, mask)
    divergence = torch.where(mask, log_p.exp() * (log_p - log_q), 0.0).sum(dim=1)
    return reduce(temperature**2 * divergence, mask, reduction)


def margin_mse_loss(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    teacher_scores: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """MarginMSE: squared difference between the model's and the teacher's margin, over all pairs of candidates.

        loss = mean over pairs (i, j) of ((s_i - s_j) - (t_i - t_j))^2

    with the teacher's scores t. Unlike in the source, which pairs one relevant passage with one that is not, all pairs
    of a list count, those of equal teacher's scores too. Candidates without a teacher's score are left out.

    Args:
        scores: (B, N) float logits, higher is better.
        ranks: (B, N) int64, 0 = best.
        mask: (B, N) bool, True = real candidate; None = all are real.
        teacher_scores: (B, N) float, NaN = none; on the scale that the logits should have.
        reduction: "mean", "sum" or "none".
    Returns:
        Scalar in squared logits; (B,) if reduction="none".
    Source:
        Hofstätter et al. 2020 (arXiv:2010.02666).
    """
    scores, ranks, mask = prepare("margin_mse_loss", scores, ranks, mask, reduction)
    teacher, mask = _scored("margin_mse_loss", teacher_scores, scores, mask)
    errors = torch.where(mask, scores - teacher, 0.0)
    pairs = mask.unsqueeze(2) & mask.unsqueeze(1) & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return reduce(mean_over_pairs((errors.unsqueeze(2) - errors.unsqueeze(1)).square(), pairs), mask, reduction)


def _scored(
    name: str, teacher_scores: torch.Tensor | None, scores: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the teacher's scores, 0 where there are none, and the mask of the candidates that have one."""
    if teacher_scores is None:
        raise ValueError(f"{name}: teacher_scores is None; expected the teacher's scores. Pass them, (B, N).")
    known = known_values(name, "teacher_scores", teacher_scores, scores)
    mask = mask & known.isfinite()
    return torch.where(mask, known, 0.0), mask


def ndcg_loss2pp_loss(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    grades: torch.Tensor | None = None,
    mu: float = 10.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """NDCG-Loss2++ of the LambdaLoss framework: the pair loss with the weights of NDCG-Loss2 and of LambdaRank.

        loss = mean over pairs (i more relevant than j) of (mu * rho_ij + delta_ij) * |g_i - g_j| / maxDCG
               * log2(1 + exp(-(s_i - s_j)))
        rho_ij = |1 / log2(1 + d) - 1 / log2(2 + d)|,  delta_ij = |1 / log2(1 + p_i) - 1 / log2(1 + p_j)|

    p are the 1-based places by score, d = |p_i - p_j|. The gain is g = 2^grade - 1, or 1 / (rank + 1) in lists without
    grades.

    Args:
        scores: (B, N) float logits, higher is better.
        ranks: (B, N) int64, 0 = best.
        mask: (B, N) bool, True = real candidate; None = all are real.
        grades: (B, N) float, NaN = none.
        mu: weight of NDCG-Loss2 beside LambdaRank.
        reduction: "mean", "sum" or "none".
    Returns:
        Scalar in bits; (B,) if reduction="none".
    Source:
        Wang et al. 2018.
    """
    scores, ranks, mask = prepare("ndcg_loss2pp_loss", scores, ranks, mask, reduction)
    relevance = list_gains("ndcg_loss2pp_loss", ranks, grades, mask, scores)
    gains = _normalized(relevance, ranks, mask)
    places = descending(scores, mask)[1].argsort(dim=1).to(scores.dtype)  # (B, N), 0 = highest score
    distance = (places.unsqueeze(2) - places.unsqueeze(1)).abs().clamp(min=1.0)
    rho = 1.0 / torch.log2(1.0 + distance) - 1.0 / torch.log2(2.0 + distance)
    discounts = 1.0 / torch.log2(places + 2.0)
    delta = (discounts.unsqueeze(2) - discounts.unsqueeze(1)).abs()
    weights = (mu * rho + delta) * (gains.unsqueeze(2) - gains.unsqueeze(1)).abs()
    losses = weights * F.softplus(scores.unsqueeze(1) - scores.unsqueeze(2)) / math.log(2.0)
    return reduce(mean_over_pairs(losses, ordered_pairs(relevance, mask)), mask, reduction)


def approx_ndcg_loss(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    grades: torch.Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """ApproxNDCG: one minus the nDCG of smooth ranks.

        loss = 1 - sum over i of g_i / log2(1 + a_i) / maxDCG,  a_i = 1 + sum over j != i of sigmoid((s_j - s_i) / T)

    The gain is g = 2^grade - 1, or 1 / (rank + 1) in lists without grades. A list without a gain has loss 0.

    Args:
        scores: (B, N) float logits, higher is better.
        ranks: (B, N) int64, 0 = best.
        mask: (B, N) bool, True = real candidate; None = all are real.
        grades: (B, N) float, NaN = none.
        temperature: T; lower is closer to nDCG and has a smaller gradient for scores far apart.
        reduction: "mean", "sum" or "none".
    Returns:
        Scalar without unit, 0 to 1; (B,) if reduction="none".
    Source:
        Qin et al. 2010.
    """
    scores, ranks, mask = prepare("approx_ndcg_loss", scores, ranks, mask, reduction)
    gains = _normalized(list_gains("approx_ndcg_loss", ranks, grades, mask, scores), ranks, mask)
    ndcg = (gains / torch.log2(1.0 + smooth_places(scores / temperature, mask))).sum(dim=1)
    return reduce(torch.where(gains.sum(dim=1) > 0, 1.0 - ndcg, 0.0), mask, reduction)


def _normalized(gains: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return (B, N) gains over the DCG of the teacher's order."""
    ideal = strict_places(ranks, mask).to(gains.dtype)
    return gains / (gains / torch.log2(ideal + 2.0)).sum(dim=1, keepdim=True).clamp(min=1e-10)


def p_listmle_loss(
    scores: torch.Tensor, ranks: torch.Tensor, *, mask: torch.Tensor | None = None, reduction: str = "mean"
) -> torch.Tensor:
    """Position-aware ListMLE: ListMLE in which the first places weigh most.

        loss = sum over i of w_i * [log(exp(s_i) + sum over {j: r_j > r_i} of exp(s_j))  -  s_i]
        w_i = (2^(n - r_i) - 1) / sum over places r of (2^(n - r) - 1)

    with 1-based ranks r, the mean places of tied candidates, which are not compared with each other. The weights of the
    source, up to 2^n, are divided by their sum, so that the loss does not grow with the length of the list.

    Args:
        scores: (B, N) float logits, higher is better.
        ranks: (B, N) int64, 0 = best.
        mask: (B, N) bool, True = real candidate; None = all are real.
        reduction: "mean", "sum" or "none".
    Returns:
        Scalar in nats; (B,) if reduction="none".
    Source:
        Lan et al. 2014.
    """
    scores, ranks, mask = prepare("p_listmle_loss", scores, ranks, mask, reduction)
    places, num = mean_places(ranks, mask, scores.dtype) + 1.0, mask.sum(dim=1, keepdim=True).to(scores.dtype)
    # Both weight and sum are divided by 2^n, as 2^n alone overflows.
    weights = torch.where(mask, torch.exp2(-places) - torch.exp2(-num), 0.0)
    total = 1.0 - torch.exp2(-num) - num * torch.exp2(-num)
    losses = before_worse(scores, ranks, mask) * weights / total.clamp(min=1e-10)
    return reduce(losses.sum(dim=1), mask, reduction)


def info_nce_loss(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """InfoNCE: cross-entropy of the best candidate among all that are worse.

        loss = mean over the best i of log(exp(s_i / T) + sum over {j: worse than the best} of exp(s_j / T)) - s_i / T

    Several best candidates, tied, are each compared with all worse ones and not with each other.

    Args:
        scores: (B, N) float logits, higher is better.
        ranks: (B, N) int64, 0 = best.
        mask: (B, N) bool, True = real candidate; None = all are real.
        temperature: T; below 1 the highest of the worse candidates count more.
        reduction: "mean", "sum" or "none".
    Returns:
        Scalar in nats; (B,) if reduction="none".
    Source:
        van den Oord et al. 2018; for rerankers the localized contrastive loss of Gao et al. 2021 (arXiv:2101.08751).
    """
    scores, ranks, mask = prepare("info_nce_loss", scores, ranks, mask, reduction)
    first = torch.where(mask, ranks, torch.iinfo(ranks.dtype).max).amin(dim=1, keepdim=True)
    best = mask & (ranks == first)
    losses = torch.where(best, before_worse(scores / temperature, ranks, mask), 0.0)
    return reduce(losses.sum(dim=1) / best.sum(dim=1).clamp(min=1), mask, reduction)
