"""Ranking losses: the published values, slow loops, and properties of every entry of LOSSES."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from rankllm_composer.model.loss_table import RANKING_LOSSES
from rankllm_composer.model.losses import (
    LOSSES,
    adr_mse_loss,
    lambdarank_loss,
    listmle_loss,
    listnet_loss,
    ranknet_loss,
)

# Measured with the training code of the published FIRST and RankZephyr models; the file describes each key.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ranking_losses.json").read_text())["cases"]

OPTION_VALUES = {"weighted": (True, False), "target": ("ranks", "self_sorted"), "detach_target": (False, True)}


class WithScores(partial):
    """A loss that needs a teacher's scores, which follow the ranks here."""

    def __call__(self, scores, ranks, **keywords):
        if "teacher_scores" in inspect.signature(self.func).parameters:
            keywords = {"teacher_scores": -ranks.double(), **keywords}
        return super().__call__(scores, ranks, **keywords)


def variants() -> dict[str, partial]:
    """Every loss of the table with every combination of its options that has an effect."""
    found = {}
    for name, loss in LOSSES.items():
        options = [key for key in inspect.signature(loss).parameters if key in OPTION_VALUES]
        for values in itertools.product(*(OPTION_VALUES[key] for key in options)):
            chosen = dict(zip(options, values))
            if chosen.get("target") == "ranks" and chosen["detach_target"]:
                continue
            label = ", ".join([name, *(f"{key}={value}" for key, value in chosen.items())])
            found[label] = WithScores(loss, **chosen)
    return found


VARIANTS = variants()
each_loss = pytest.mark.parametrize("loss", VARIANTS.values(), ids=VARIANTS.keys())


# --- slow, independent definitions: one list, Python floats -----------------------------------------------------------


def slow_ranknet(scores, ranks, weighted):
    values = []
    for i, j in itertools.permutations(range(len(scores)), 2):
        if ranks[i] < ranks[j]:
            weight = 1 / ((ranks[i] + 1) + (ranks[j] + 1)) if weighted else 1
            values.append(weight * math.log(1 + math.exp(scores[j] - scores[i])))
    return sum(values) / len(values)


def slow_relevance(scores, ranks):
    from_high_to_low = sorted(scores, reverse=True)
    return [from_high_to_low[rank] for rank in ranks]


def slow_lambdarank(scores, ranks, target, detach_target):
    if target == "ranks":
        gains = relevance = [1 / (rank + 1) for rank in ranks]
    else:
        relevance = slow_relevance(scores, ranks)
        gains = [2 ** max(value, 0) - 1 for value in relevance]
    max_dcg = sum(gain / math.log2(place + 2) for place, gain in enumerate(sorted(gains, reverse=True)))
    place_of = {
        candidate: place for place, candidate in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]))
    }
    values = []
    for i, j in itertools.permutations(range(len(scores)), 2):
        if relevance[i] > relevance[j]:
            distance = abs(place_of[i] - place_of[j])
            worth = (gains[i] - gains[j]) / max_dcg if max_dcg else 0
            weight = (1 / math.log2(1 + distance) - 1 / math.log2(2 + distance)) * worth
            values.append(weight * math.log2(1 + math.exp(scores[j] - scores[i])))
    return sum(values) / len(values)


def slow_softmax(values):
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def slow_listnet(scores, ranks, target, detach_target):
    if target == "ranks":
        total = sum(1 / (rank + 1) for rank in ranks)
        wanted = [1 / (rank + 1) / total for rank in ranks]
    else:
        wanted = slow_softmax(slow_relevance(scores, ranks))
    return -sum(p * math.log(q) for p, q in zip(wanted, slow_softmax(scores)))


def slow_listmle(scores, ranks):
    in_order = [score for _, score in sorted(zip(ranks, scores))]
    likelihood = 1.0
    for place, score in enumerate(in_order):
        likelihood *= math.exp(score) / sum(math.exp(left) for left in in_order[place:])
    return -math.log(likelihood)


def slow_smooth_ranks(scores):
    return [
        1 + sum(1 / (1 + math.exp(s - other)) for j, other in enumerate(scores) if j != i) for i, s in enumerate(scores)
    ]


def slow_adr_mse(scores, ranks):
    total = 0.0
    for rank, smooth_rank in zip(ranks, slow_smooth_ranks(scores)):
        total += (rank + 1 - smooth_rank) ** 2 / math.log2(rank + 2)
    return total / len(scores)


def slow_kl_divergence(scores, ranks):
    teacher = slow_softmax([-rank for rank in ranks])
    return sum(p * math.log(p / q) for p, q in zip(teacher, slow_softmax(scores)))


def slow_margin_mse(scores, ranks):
    pairs = itertools.permutations(range(len(scores)), 2)
    errors = [((scores[i] - scores[j]) - (ranks[j] - ranks[i])) ** 2 for i, j in pairs]
    return sum(errors) / len(errors)


def slow_max_dcg(num):
    return sum(1 / rank / math.log2(1 + rank) for rank in range(1, num + 1))


def slow_ndcg_loss2pp(scores, ranks):
    place_of = {i: place for place, i in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]), start=1)}
    values = []
    for i, j in itertools.permutations(range(len(scores)), 2):
        if ranks[i] < ranks[j]:
            d = abs(place_of[i] - place_of[j])
            rho = 1 / math.log2(1 + d) - 1 / math.log2(2 + d)
            delta = abs(1 / math.log2(1 + place_of[i]) - 1 / math.log2(1 + place_of[j]))
            gain = (1 / (ranks[i] + 1) - 1 / (ranks[j] + 1)) / slow_max_dcg(len(scores))
            values.append((10 * rho + delta) * gain * math.log2(1 + math.exp(scores[j] - scores[i])))
    return sum(values) / len(values)


def slow_approx_ndcg(scores, ranks):
    gained = (1 / (rank + 1) / math.log2(1 + place) for rank, place in zip(ranks, slow_smooth_ranks(scores)))
    return 1 - sum(gained) / slow_max_dcg(len(scores))


def slow_p_listmle(scores, ranks):
    in_order = [score for _, score in sorted(zip(ranks, scores))]
    weights = [2 ** (len(scores) - place) - 1 for place in range(1, len(scores) + 1)]
    nats = [math.log(sum(math.exp(left - score) for left in in_order[i:])) for i, score in enumerate(in_order)]
    return sum(weight * value for weight, value in zip(weights, nats)) / sum(weights)


def slow_info_nce(scores, ranks):
    return -math.log(slow_softmax(scores)[ranks.index(0)])


# --- inputs -----------------------------------------------------------------------------------------------------------


def random_lists(num_candidates, width=None, dtype=torch.float64, seed=0, scale=2.0):
    """A batch of lists of the given lengths, padded to one width with garbage: NaN, inf and impossible ranks."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(num_candidates)
    scores = torch.full((len(num_candidates), width), math.nan, dtype=dtype)
    scores[:, 1::2] = math.inf
    ranks = torch.full((len(num_candidates), width), -7)
    mask = torch.zeros(len(num_candidates), width, dtype=torch.bool)
    for row, num in enumerate(num_candidates):
        scores[row, :num] = torch.randn(num, generator=generator, dtype=torch.float64).mul(scale).to(dtype)
        ranks[row, :num] = torch.randperm(num, generator=generator)
        mask[row, :num] = True
    return scores, ranks, mask


def loss_and_gradient(loss, scores, ranks, **kwargs):
    scores = scores.clone().requires_grad_()
    value = loss(scores, ranks, **kwargs)
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    return value.detach(), gradient


# --- values -----------------------------------------------------------------------------------------------------------

GOLDEN_LOSSES = {
    "ranknet": partial(ranknet_loss, weighted=False),
    "ranknet_weighted": ranknet_loss,
    "lambdarank_self_sorted_target": partial(lambdarank_loss, target="self_sorted"),
    "lambdarank_self_sorted_target_detached": partial(lambdarank_loss, target="self_sorted", detach_target=True),
    "listnet_self_sorted_target": partial(listnet_loss, target="self_sorted"),
    "listnet_self_sorted_target_detached": partial(listnet_loss, target="self_sorted", detach_target=True),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("key", GOLDEN_LOSSES)
def test_published_losses_and_gradients_are_reproduced(key, dtype):
    assert len(GOLDEN) == 10
    for case in GOLDEN:
        assert set(case) == {"scores", "ranks", *GOLDEN_LOSSES}
        scores, ranks = torch.tensor([case["scores"]], dtype=dtype), torch.tensor([case["ranks"]])
        value, gradient = loss_and_gradient(GOLDEN_LOSSES[key], scores, ranks)
        assert value.item() == pytest.approx(case[key]["loss"], abs=1e-5)
        assert gradient[0].tolist() == pytest.approx(case[key]["grad"], abs=1e-5)


@pytest.mark.parametrize("key", GOLDEN_LOSSES)
def test_published_losses_hold_in_one_batch_of_lists_of_different_length(key):
    width = max(len(case["scores"]) for case in GOLDEN)
    scores, ranks, mask = random_lists([len(case["scores"]) for case in GOLDEN], width)
    for row, case in enumerate(GOLDEN):
        scores[row, : len(case["scores"])] = torch.tensor(case["scores"], dtype=torch.float64)
        ranks[row, : len(case["ranks"])] = torch.tensor(case["ranks"])
    values, gradient = loss_and_gradient(GOLDEN_LOSSES[key], scores, ranks, mask=mask, reduction="none")
    assert values.tolist() == pytest.approx([case[key]["loss"] for case in GOLDEN], abs=1e-5)
    for row, case in enumerate(GOLDEN):
        assert gradient[row, : len(case["scores"])].tolist() == pytest.approx(case[key]["grad"], abs=1e-5)
        assert (gradient[row, len(case["scores"]) :] == 0).all()


def test_ranknet_by_hand():
    # Ranks of three candidates 2, 0, 1: the teacher orders (1, 0), (1, 2), (2, 0).
    scores, ranks = torch.tensor([[0.5, 0.2, -1.0]]), torch.tensor([[2, 0, 1]])
    pair_losses = [math.log(1 + math.exp(0.3)), math.log(1 + math.exp(-1.2)), math.log(1 + math.exp(1.5))]
    assert ranknet_loss(scores, ranks, weighted=False).item() == pytest.approx(sum(pair_losses) / 3)
    # 1-based ranks of the pairs: 1 + 3, 1 + 2, 2 + 3.
    weighted = (pair_losses[0] / 4 + pair_losses[1] / 3 + pair_losses[2] / 5) / 3
    assert ranknet_loss(scores, ranks).item() == pytest.approx(weighted)


def test_lambdarank_by_hand():
    # The better candidate scores lower; gains 1 and 1/2; maxDCG = 1 + 0.5 / log2(3); the places differ by 1.
    scores, ranks = torch.tensor([[-0.25, 0.5]]), torch.tensor([[0, 1]])
    weight = (1 - 1 / math.log2(3)) * 0.5 / (1 + 0.5 / math.log2(3))
    assert lambdarank_loss(scores, ranks).item() == pytest.approx(weight * math.log2(1 + math.exp(0.75)))


def test_listnet_by_hand():
    # Gains 1, 1/2, 1/3 sum to 11/6, so the wanted probabilities are 6/11, 3/11, 2/11; softmax of log(1, 2, 5).
    scores, ranks = torch.tensor([[math.log(1), math.log(2), math.log(5)]]), torch.tensor([[2, 1, 0]])
    expected = -(2 / 11 * math.log(1 / 8) + 3 / 11 * math.log(2 / 8) + 6 / 11 * math.log(5 / 8))
    assert listnet_loss(scores, ranks).item() == pytest.approx(expected)


def test_listmle_by_hand():
    # Best first: 5 of 5 + 1 + 2, then 2 of 1 + 2, then 1 of 1.
    scores, ranks = torch.tensor([[math.log(1), math.log(2), math.log(5)]]), torch.tensor([[2, 1, 0]])
    assert listmle_loss(scores, ranks).item() == pytest.approx(-math.log(5 / 8 * 2 / 3))


def test_adr_mse_by_hand():
    # sigmoid(log 3) = 3/4: the smooth ranks are 1.25 and 1.75, the teacher's 2 and 1.
    scores, ranks = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[1, 0]])
    assert adr_mse_loss(scores, ranks).item() == pytest.approx((0.75**2 / math.log2(3) + 0.75**2 / 1) / 2)


@each_loss
def test_slow_loops_agree(loss):
    scores, ranks, mask = random_lists([2, 3, 7, 20, 5], width=22, seed=1)
    values = loss(scores, ranks, mask=mask, reduction="none")
    slow_loss = globals()[f"slow_{loss.func.__name__.removesuffix('_loss')}"]
    for row, num in enumerate([2, 3, 7, 20, 5]):
        slow = slow_loss(scores[row, :num].tolist(), ranks[row, :num].tolist(), **loss.keywords)
        assert values[row].item() == pytest.approx(slow, rel=1e-12)


# --- properties -------------------------------------------------------------------------------------------------------


@each_loss
def test_order_of_presentation_does_not_matter(loss):
    scores, ranks, mask = random_lists([6, 4, 9, 1], seed=2)
    shuffle = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    value, gradient = loss_and_gradient(loss, scores, ranks, mask=mask, reduction="none")
    shuffled, shuffled_gradient = loss_and_gradient(
        loss, scores[:, shuffle], ranks[:, shuffle], mask=mask[:, shuffle], reduction="none"
    )
    torch.testing.assert_close(shuffled, value)
    torch.testing.assert_close(shuffled_gradient, gradient[:, shuffle])


@each_loss
def test_only_differences_of_scores_count(loss):
    if loss.func is lambdarank_loss and loss.keywords["target"] == "self_sorted":
        scores = torch.tensor([[0.3, 0.1, 0.2]])
        assert loss(scores, torch.tensor([[2, 0, 1]])) > 0  # gains depend on the absolute scores …
        assert loss(scores - 1, torch.tensor([[2, 0, 1]])) == 0  # … and are cut off at zero
        return
    scores, ranks, mask = random_lists([6, 4, 9], seed=4)
    shift = torch.tensor([[5.0], [-3.0], [0.25]], dtype=torch.float64)
    torch.testing.assert_close(
        loss_and_gradient(loss, scores + shift, ranks, mask=mask), loss_and_gradient(loss, scores, ranks, mask=mask)
    )


@each_loss
def test_masked_candidates_equal_a_shorter_list(loss):
    scores, ranks, mask = random_lists([5, 3], width=8, seed=5)
    values, gradient = loss_and_gradient(loss, scores, ranks, mask=mask, reduction="none")
    for row, num in enumerate([5, 3]):
        value, short_gradient = loss_and_gradient(loss, scores[row : row + 1, :num], ranks[row : row + 1, :num])
        assert values[row].item() == pytest.approx(value.item(), rel=1e-12)
        torch.testing.assert_close(gradient[row, :num], short_gradient[0])
        assert (gradient[row, num:] == 0).all()


@pytest.mark.parametrize(
    "loss",
    [loss for loss in VARIANTS.values() if not loss.keywords.get("detach_target")],
    ids=[label for label, loss in VARIANTS.items() if not loss.keywords.get("detach_target")],
)
def test_gradients_are_those_of_finite_differences(loss):
    scores, ranks, mask = random_lists([6, 4, 1, 0], seed=6)
    scores = torch.where(mask, scores, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, ranks, mask=mask, reduction="none"), scores)


def test_detached_target_is_a_constant():
    scores, ranks, _ = random_lists([6], seed=6)
    target = torch.tensor([slow_relevance(scores[0].tolist(), ranks[0].tolist())], dtype=torch.float64)
    _, gradient = loss_and_gradient(partial(listnet_loss, target="self_sorted", detach_target=True), scores, ranks)
    torch.testing.assert_close(gradient, scores.softmax(dim=1) - target.softmax(dim=1))


@each_loss
def test_teacher_order_is_better_than_its_reverse(loss):
    ranks = torch.tensor([[1, 3, 0, 2], [0, 1, 2, 3]])
    best, worst = 4.0 - ranks, 1.0 + ranks  # all positive, so that a self-sorted target has gains
    assert (loss(best, ranks, reduction="none") < loss(worst, ranks, reduction="none")).all()


def descend(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of one list after 150 steps down a loss's gradient, and the teacher's ranks."""
    scores, ranks, _ = random_lists([8], seed=7, scale=1.0)
    scores.requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        WithScores(LOSSES[name])(scores, ranks).backward()
        optimizer.step()
    return scores.detach(), ranks


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_descent_finds_the_teachers_first_candidate(name):
    scores, ranks = descend(name)
    assert scores.argmax() == ranks.argmin()


@pytest.mark.parametrize("name", ["ranknet", "lambdarank", "listnet", "listmle", "adr_mse"])
def test_gradient_descent_finds_the_whole_teacher_order(name):
    scores, ranks = descend(name)
    assert scores.argsort(descending=True).argsort().tolist() == ranks.tolist()


# --- extreme values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_loss
def test_huge_scores_stay_finite(loss, dtype):
    patterns = [
        [1e4, -1e4, 0.0, 1e4, -1e4, 1.0],
        [1e4, 1e4, 1e4, 1e4, 1e4, 1e4],
        [-1e4, -1e4, -1e4, -1e4, -1e4, -1e4],
        [-1e4, -5e3, -1.0, -130.0, -2e3, -1e-3],
        [130.0, 129.0, 140.0, 1e3, 1e-6, 200.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]):
        ranks = torch.tensor([order] * len(patterns))
        values, gradient = loss_and_gradient(loss, torch.tensor(patterns, dtype=dtype), ranks, reduction="none")
        assert values.isfinite().all()
        assert gradient.isfinite().all()


@each_loss
def test_half_precision_is_computed_in_float32(loss):
    for dtype in (torch.bfloat16, torch.float16):
        scores, ranks, mask = random_lists([6, 4, 9], dtype=dtype, seed=8)
        value, gradient = loss_and_gradient(loss, scores, ranks, mask=mask)
        exact, exact_gradient = loss_and_gradient(loss, scores.double(), ranks, mask=mask)
        assert value.dtype == torch.float32
        assert gradient.dtype == dtype
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-2, atol=1e-4)


@each_loss
def test_lists_with_nothing_to_rank_give_zero(loss):
    scores, ranks, mask = random_lists([0, 1, 5, 1], width=6, seed=9)
    ranks[3, 0] = 4  # even if the one candidate left has a rank from a longer list
    values, gradient = loss_and_gradient(loss, scores, ranks, mask=mask, reduction="none")
    assert values[[0, 1, 3]].tolist() == [0, 0, 0]
    assert values[2] > 0
    assert (gradient[[0, 1, 3]] == 0).all()
    assert gradient.isfinite().all()
    for kwargs in ({"mask": torch.zeros(2, 3, dtype=torch.bool)}, {}):
        width = 3 if kwargs else 1
        scores = torch.randn(2, width).requires_grad_()
        value = loss(scores, torch.zeros(2, width, dtype=torch.int64), **kwargs)
        value.backward()
        assert value.item() == 0
        assert (scores.grad == 0).all()


@each_loss
def test_gradients_have_no_intermediate_nan(loss):
    scores, ranks, mask = random_lists([0, 1, 5], width=6, seed=9)
    with torch.autograd.set_detect_anomaly(True):  # raises even for a NaN that is masked later
        loss(scores.requires_grad_(), ranks, mask=mask).backward()


@each_loss
def test_reductions(loss):
    scores, ranks, mask = random_lists([6, 0, 9, 1], seed=10)
    values = loss(scores, ranks, mask=mask, reduction="none")
    assert values.shape == (4,)
    # Lists with nothing to rank count in the mean.
    assert loss(scores, ranks, mask=mask).item() == pytest.approx((values[0] + values[2]).item() / 4)
    assert loss(scores, ranks, mask=mask, reduction="sum").item() == pytest.approx((values[0] + values[2]).item())
    assert loss(scores[:0], ranks[:0], mask=mask[:0]).item() == 0


@each_loss
def test_arguments_are_not_modified(loss):
    scores, ranks, mask = random_lists([6, 4], seed=11)
    before = scores.clone(), ranks.clone(), mask.clone()
    loss(scores, ranks, mask=mask)
    torch.testing.assert_close((scores, ranks, mask), before, equal_nan=True)


# --- errors -----------------------------------------------------------------------------------------------------------

SCORES, RANKS = torch.zeros(2, 3), torch.tensor([[0, 1, 2], [2, 1, 0]])


@each_loss
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SCORES[0], RANKS[0], {}), r"scores are torch.float32 of shape \(3,\); expected floats \(B, N\)"),
        ((SCORES.long(), RANKS, {}), r"scores are torch.int64 of shape \(2, 3\)"),
        ((SCORES[:, :0], RANKS[:, :0], {}), r"scores are torch.float32 of shape \(2, 0\)"),
        ((SCORES, RANKS[:, :2], {}), r"ranks are torch.int64 of shape \(2, 2\); .* of shape \(2, 3\), as the scores"),
        ((SCORES, RANKS.float(), {}), r"ranks are torch.float32"),
        ((SCORES, RANKS, {"mask": RANKS}), r"mask is torch.int64"),
        ((SCORES, RANKS, {"mask": RANKS[:1] > 0}), r"mask is torch.bool of shape \(1, 3\)"),
        ((SCORES, RANKS, {"reduction": "average"}), r"reduction is 'average'; expected one of none, mean, sum"),
    ],
)
def test_wrong_arguments_are_errors(loss, arguments, message):
    scores, ranks, kwargs = arguments
    with pytest.raises(ValueError, match=rf"^{loss.func.__name__}: {message}"):
        loss(scores, ranks, **kwargs)


@pytest.mark.parametrize("loss", [lambdarank_loss, listnet_loss])
def test_wrong_targets_are_errors(loss):
    with pytest.raises(ValueError, match=rf"^{loss.__name__}: target is 'scores'; expected one of ranks, self_sorted"):
        loss(SCORES, RANKS, target="scores")
    with pytest.warns(UserWarning, match="detach_target has no effect with target='ranks'"), warnings.catch_warnings():
        warnings.simplefilter("always")
        loss(SCORES, RANKS, detach_target=True)


def test_names_in_the_table_are_function_names_without_the_suffix():
    assert {name: loss.__name__ for name, loss in LOSSES.items()} == {name: f"{name}_loss" for name in LOSSES}
    for loss in LOSSES.values():
        parameters = list(inspect.signature(loss).parameters.values())
        assert [parameter.name for parameter in parameters[:3]] == ["scores", "ranks", "mask"]
        assert parameters[-1].name == "reduction"
        assert parameters[-1].default == "mean"


def test_options_in_the_table_are_what_the_losses_accept():
    for name, options in RANKING_LOSSES.items():
        defaults = {key: parameter.default for key, parameter in inspect.signature(LOSSES[name]).parameters.items()}
        for option, allowed in options.items():
            if isinstance(allowed, type):  # a number, or true or false
                assert isinstance(defaults[option], allowed)
                continue
            assert defaults[option] in allowed
            for value in allowed:
                LOSSES[name](SCORES, RANKS, **{option: value})
