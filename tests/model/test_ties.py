"""Ranking losses of lists with ties: values of allRank and rax, by hand, and what no loss may learn."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from rankllm_composer.model.losses import (
    LOSSES,
    adr_mse_loss,
    approx_ndcg_loss,
    lambdarank_loss,
    listmle_loss,
    listnet_loss,
    ranknet_loss,
)

# By allRank and rax; tests/support/loss_values.py wrote the file.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tied_losses.json").read_text())["cases"]

GOLDEN_LOSSES = {
    "allrank ranknet": partial(ranknet_loss, weighted=False),
    "rax pairwise_logistic_loss": partial(ranknet_loss, weighted=False),
    "allrank ndcg_loss2": lambdarank_loss,
    "rax softmax_loss of 2^g - 1": listnet_loss,
    "allrank ndcg_loss2++": LOSSES["ndcg_loss2pp"],
    "allrank approx_ndcg": lambda scores, ranks, grades: approx_ndcg_loss(scores, ranks, grades=grades) - 1,
}


def ranks_of(grades):
    """Number of better candidates of each."""
    return torch.tensor([[sum(other > grade for other in grades) for grade in grades]])


def arguments(loss, grades):
    """Ranks, and the grades if the loss uses them."""
    known = {"grades": torch.tensor([grades], dtype=torch.float64)}
    return (ranks_of(grades),), known if "grades" in inspect.signature(loss).parameters else {}


def gradient_of(loss, scores, *args, **kwargs):
    scores = torch.as_tensor(scores, dtype=torch.float64).requires_grad_()
    value = loss(scores, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value.sum(), scores)[0]


@pytest.mark.parametrize("key", GOLDEN_LOSSES)
def test_values_of_other_libraries_are_reproduced(key):
    loss = GOLDEN_LOSSES[key]
    for case in GOLDEN:
        args, known = arguments(loss, case["grades"])
        value, gradient = gradient_of(loss, [case["scores"]], *args, **known)
        assert value.item() == pytest.approx(case[key]["loss"], abs=2e-6)  # rax adds eps to its softmax
        assert gradient[0].tolist() == pytest.approx(case[key]["grad"], abs=2e-6)


def test_a_list_of_two_grades_has_four_pairs_and_not_six():
    assert GOLDEN[1]["num_pairs"] == 4
    scores, ranks = torch.tensor([[0.2, 0.5, 0.1, -0.3]]), torch.tensor([[0, 0, 2, 2]])
    pairs = [math.log(1 + math.exp(-difference)) for difference in (0.1, 0.5, 0.4, 0.8)]
    assert ranknet_loss(scores, ranks, weighted=False).item() == pytest.approx(sum(pairs) / 4)
    # Places 1.5 and 3.5, counted from 1: every pair has the weight 1 / 5.
    assert ranknet_loss(scores, ranks).item() == pytest.approx(sum(pairs) / 4 / 5)


def test_listmle_and_adr_mse_by_hand():
    scores, ranks = torch.tensor([[math.log(2), math.log(5), 0.0, math.log(3)]]), torch.tensor([[0, 0, 2, 2]])
    # The good ones, 2 and 5, each before 1 + 3; nothing is behind the others.
    assert listmle_loss(scores, ranks).item() == pytest.approx(-math.log(2 / 6) - math.log(5 / 9))
    # Equal scores have the smooth rank 1.5, which is the mean place of two tied candidates.
    assert adr_mse_loss(torch.tensor([[1.0, 1.0]]), torch.tensor([[0, 0]])).item() == 0


HAVE_TARGETS = {"listnet", "approx_ndcg", "adr_mse", "kl_divergence", "margin_mse"}
"""Losses with a target for each candidate, which tied candidates share; all others only compare."""


def relevant(name, grades):
    """Arguments of a loss of the table for a list with these grades, which are the teacher's scores, too."""
    values = torch.tensor([grades], dtype=torch.float64)
    parameters = inspect.signature(LOSSES[name]).parameters
    known = {what: values for what in ("grades", "teacher_scores") if what in parameters}
    return (ranks_of(grades),), known


@pytest.mark.parametrize("name", LOSSES)
def test_a_list_that_is_all_tied_teaches_no_order(name):
    for grades in ([0.0] * 3, [2.0] * 3):
        args, known = relevant(name, grades)
        scores = [[0.7, 0.7, 0.7]] if name in HAVE_TARGETS else [[0.3, -1.0, 2.0]]
        value, gradient = gradient_of(LOSSES[name], scores, *args, **known)
        assert gradient[0].tolist() == pytest.approx([0, 0, 0], abs=1e-12)
        assert value.item() == 0 or name in HAVE_TARGETS


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_prefers_one_of_two_tied_candidates(name):
    args, known = relevant(name, [2.0, 1.0, 1.0, 0.0, 0.0])
    one, other = [[0.4, 0.9, -0.3, 0.1, 1.2]], [[0.4, -0.3, 0.9, 1.2, 0.1]]  # the scores of both ties are exchanged
    values = [gradient_of(LOSSES[name], scores, *args, **known) for scores in (one, other)]
    assert values[0][0].item() == pytest.approx(values[1][0].item(), rel=1e-12)
    torch.testing.assert_close(values[0][1][:, [0, 2, 1, 4, 3]], values[1][1])


ORDERED = list(itertools.combinations(range(4), 2))


@pytest.mark.parametrize("grades", [[3.0, 1.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]], ids=["ties", "strict"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_grades_is_the_best_of_all_orders(name, grades):
    (ranks,), known = relevant(name, grades)
    orders = list(itertools.permutations([1.5, 0.5, 0.0, -1.0]))
    scores = torch.tensor(orders, dtype=torch.float64)
    known = {what: values.expand(len(orders), -1) for what, values in known.items()}
    values = LOSSES[name](scores, ranks.expand(len(orders), -1), reduction="none", **known)
    best = {order for order, value in zip(orders, values.tolist()) if value == pytest.approx(values.min().item())}
    agree = {order for order in orders if all(order[i] > order[j] for i, j in ORDERED if grades[i] > grades[j])}
    # InfoNCE orders only the best before the rest.
    assert best == ({order for order in orders if order[0] == 1.5} if name == "info_nce" else agree)


@pytest.mark.parametrize("name", ["ranknet", "listmle"])
def test_there_is_no_gradient_between_tied_candidates(name):
    # Pushing one of two tied candidates away from all others leaves the gradient of the other as it is.
    ranks, near, far = torch.tensor([[0, 1, 1]]), [[0.0, 0.5, 0.2]], [[0.0, 0.5, -9.0]]
    gradients = [gradient_of(LOSSES[name], scores, ranks)[1][0, 1].item() for scores in (near, far)]
    if name == "ranknet":
        assert gradients[0] == pytest.approx(gradients[1], rel=1e-12)
    only = gradient_of(LOSSES[name], [[0.5, 0.2]], torch.tensor([[1, 1]]))[1]
    assert only.tolist() == [[0, 0]]


def test_gains_come_from_grades_where_every_candidate_has_one():
    scores, ranks = torch.tensor([[0.1, 0.3, 0.2]] * 3), torch.tensor([[0, 1, 2]] * 3)
    grades = torch.tensor([[3.0, 1.0, 0.0], [math.nan] * 3, [3.0, 1.0, math.nan]])
    for loss in (lambdarank_loss, listnet_loss):
        known = loss(scores, ranks, grades=grades, reduction="none")
        plain = loss(scores, ranks, reduction="none")
        assert known[0] != plain[0] and known[1:].tolist() == plain[1:].tolist()
        mask = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])
        cut = loss(scores, ranks, mask=mask, grades=grades, reduction="none")
        assert cut[2].item() == pytest.approx(loss(scores[:1, :2], ranks[:1, :2], grades=grades[:1, :2]).item())
    with pytest.raises(ValueError, match=r"^listnet_loss: grades are torch.int64 of shape \(3, 3\); expected floats"):
        listnet_loss(scores, ranks, grades=ranks)


@pytest.mark.parametrize("name", LOSSES)
def test_ties_at_masked_places_and_gaps_between_ranks_do_not_matter(name):
    loss = LOSSES[name]
    scores, mask = torch.tensor([[0.3, -0.2, 0.9, 0.1, 5.0]], dtype=torch.float64), torch.tensor([[True] * 4 + [False]])
    dense, gaps = torch.tensor([[0, 1, 1, 2, 1]]), torch.tensor([[4, 7, 7, 9, 4]])
    known = {"teacher_scores": -dense.double()} if "teacher_scores" in inspect.signature(loss).parameters else {}
    one, other = (gradient_of(loss, scores, ranks, mask=mask, **known) for ranks in (dense, gaps))
    torch.testing.assert_close(one, other)
    assert one[1].isfinite().all() and one[1][0, 4] == 0
    swapped = [0, 2, 1, 3, 4]
    known = {what: values[:, swapped] for what, values in known.items()}
    again, gradient = gradient_of(loss, scores[:, swapped], dense[:, swapped], mask=mask, **known)
    torch.testing.assert_close((again, gradient[:, swapped]), one)


@pytest.mark.parametrize("name", ["lambdarank", "listnet"])
def test_a_self_sorted_target_gives_tied_candidates_the_mean_of_their_values(name):
    loss = partial(LOSSES[name], target="self_sorted", detach_target=True)
    scores = torch.tensor([[2.0, 1.0, 3.0]], dtype=torch.float64)
    _, gradient = gradient_of(loss, scores, torch.tensor([[0, 1, 1]]))
    assert gradient.isfinite().all()
    if name == "listnet":
        target = torch.tensor([[3.0, 1.5, 1.5]], dtype=torch.float64).softmax(dim=1)
        torch.testing.assert_close(gradient, scores.softmax(dim=1) - target)
