"""Ranking metrics against hand arithmetic, ir-measures (trec_eval) and SciPy."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import ir_measures
import numpy as np
import pytest
import scipy.stats

from rankllm_composer.ranking.comparison import compare, paired_permutation_test
from rankllm_composer.ranking.metrics import kendall_tau, ndcg, reciprocal_rank


def test_ndcg_by_hand():
    ideal = 3 / 1 + 2 / math.log2(3) + 0
    assert ndcg([0, 3, 2]) == pytest.approx((3 / math.log2(3) + 2 / 2) / ideal)
    assert ndcg([3, 2, 0]) == 1
    # Judged candidates that the ranking lacks lower it.
    assert ndcg([2, 0], ideal_grades=[0, 1, 2, 3]) == pytest.approx(2 / (3 + 2 / math.log2(3) + 1 / 2))
    # Only the first k of either count.
    assert ndcg([0, 3, 2], k=1) == 0
    assert ndcg([2, 3, 3], k=1) == pytest.approx(2 / 3)
    assert ndcg([1] + [0] * 11 + [1], k=None) == pytest.approx((1 + 1 / math.log2(14)) / (1 + 1 / math.log2(3)))


def test_nothing_relevant_or_negative_grades_give_no_gain():
    assert ndcg([0, 0, 0]) == 0
    assert ndcg([]) == 0
    assert ndcg([-2, 1]) == pytest.approx(1 / math.log2(3))


def test_reciprocal_rank_by_hand():
    assert reciprocal_rank([0, 0, 2, 1]) == pytest.approx(1 / 3)
    assert reciprocal_rank([0, 0, 1, 2], min_grade=2) == pytest.approx(1 / 4)
    assert reciprocal_rank([0, 0, 1], k=2) == 0
    assert reciprocal_rank([0] * 10 + [1]) == 0
    assert reciprocal_rank([0] * 10 + [1], k=None) == pytest.approx(1 / 11)
    assert reciprocal_rank([]) == 0


@pytest.mark.parametrize("k", [1, 5, 10, 100])
def test_ir_measures_agree(k):
    generator = np.random.default_rng(0)
    qrels, run, ours = [], [], {}
    for query in map(str, range(30)):
        # 25 judged documents of which some are retrieved, and retrieved ones that nobody judged.
        judged = {f"d{i}": int(generator.choice([-1, 0, 0, 1, 2, 3])) for i in range(25)}
        retrieved = [f"d{i}" for i in generator.permutation(40)[: int(generator.integers(1, 30))]]
        qrels += [ir_measures.Qrel(query, doc, grade) for doc, grade in judged.items()]
        run += [ir_measures.ScoredDoc(query, doc, -float(place)) for place, doc in enumerate(retrieved)]
        grades = [judged.get(doc, 0) for doc in retrieved]
        ours[query] = (
            ndcg(grades, list(judged.values()), k=k),
            reciprocal_rank(grades, k=k),
            reciprocal_rank(grades, k=k, min_grade=2),
        )
    measures = [ir_measures.nDCG @ k, ir_measures.RR @ k, ir_measures.RR(rel=2) @ k]
    theirs = {(result.query_id, result.measure): result.value for result in ir_measures.iter_calc(measures, qrels, run)}
    assert len(theirs) == 90
    for query, values in ours.items():
        assert values == pytest.approx([theirs[query, measure] for measure in measures], abs=1e-12)


def test_kendall_tau_by_hand():
    assert kendall_tau([0, 1, 2, 3], [0, 1, 2, 3]) == 1
    assert kendall_tau([0, 1, 2, 3], [3, 2, 1, 0]) == -1
    # One of six pairs is swapped.
    assert kendall_tau([0, 1, 2, 3], [1, 0, 2, 3]) == pytest.approx((5 - 1) / 6)


@pytest.mark.parametrize("num_values", [3, 6, 1000], ids=["many ties", "some ties", "few ties"])
def test_scipy_agrees_on_kendall_tau(num_values):
    generator = np.random.default_rng(1)
    for num in (2, 5, 20, 60):
        one, other = generator.integers(0, num_values, (2, num)).tolist()
        expected = scipy.stats.kendalltau(one, other).statistic
        assert kendall_tau(one, other) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_kendall_tau_of_all_tied_candidates_is_undefined():
    assert math.isnan(kendall_tau([1, 1, 1], [0, 1, 2]))
    assert math.isnan(kendall_tau([0], [0]))
    assert math.isnan(kendall_tau([], []))


def slow_permutation_test(a, b):
    differences = [x - y for x, y in zip(a, b)]
    sums = [sum(s * d for s, d in zip(signs, differences)) for signs in itertools.product((1, -1), repeat=len(a))]
    return sum(abs(value) >= abs(sum(differences)) - 1e-9 for value in sums) / len(sums)


def test_permutation_test_enumerates_all_signs_of_few_queries():
    # Differences 3, 1, 1: of the eight sums ±3 ±1 ±1 two are as far from 0 as 5.
    assert paired_permutation_test([4, 2, 3], [1, 1, 2]) == 2 / 8
    # The observed sum is 0 but for rounding, so every sum is at least as far from 0.
    assert paired_permutation_test([0.1, 0.2, 0.0], [0.0, 0.0, 0.3]) == 1
    generator = np.random.default_rng(2)
    for num in (1, 4, 9):
        # Tenths repeat often, so that many sums are equal but for rounding.
        a, b = generator.integers(0, 5, (2, num)) / 10
        assert paired_permutation_test(a, b) == slow_permutation_test(a.tolist(), b.tolist())
        assert paired_permutation_test(b, a) == paired_permutation_test(a, b)


def test_permutation_test_draws_signs_of_many_queries():
    generator = np.random.default_rng(3)
    a = generator.normal(size=12)
    b = a + generator.normal(0.3, 0.5, size=12)
    exact = paired_permutation_test(a, b, num_permutations=2**12)
    assert exact == slow_permutation_test(a.tolist(), b.tolist())
    drawn = paired_permutation_test(a, b, num_permutations=4000, seed=1)
    assert drawn != exact
    assert abs(drawn - exact) < 4 * math.sqrt(exact * (1 - exact) / 4000)
    assert paired_permutation_test(a, b, num_permutations=4000, seed=1) == drawn
    assert paired_permutation_test(a, b, num_permutations=4000, seed=2) != drawn


# Values of the test before it used SciPy, with 10,000 draws of seed 0: queries, shift → p.
EARLIER_P_VALUES = {(20, 0.0): 0.1430, (50, 0.1): 0.0241, (200, 0.1): 0.0010, (1000, 0.03): 0.0044}


@pytest.mark.parametrize(("num_queries", "shift"), EARLIER_P_VALUES)
def test_drawn_p_values_equal_earlier_ones_within_their_noise(num_queries, shift):
    generator = np.random.default_rng(num_queries)
    a = generator.uniform(size=num_queries)
    b = a + generator.normal(shift, 0.4, size=num_queries)
    expected = EARLIER_P_VALUES[num_queries, shift]
    noise = math.sqrt(2 * expected * (1 - expected) / 10_000)  # of the difference of two draws
    assert paired_permutation_test(a, b) == pytest.approx(expected, abs=4 * noise)


def test_permutation_test_at_the_ends():
    many = np.random.default_rng(4).uniform(size=300)
    assert paired_permutation_test(many, many) == 1
    assert paired_permutation_test(many, many + 0.1, num_permutations=999) == 1 / 1000
    # Under the null hypothesis p-values are uniform: about a tenth is below 0.1.
    generator = np.random.default_rng(5)
    below = sum(
        paired_permutation_test(*generator.normal(size=(2, 20)), num_permutations=300) < 0.1 for _ in range(400)
    )
    assert abs(below / 400 - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 400)


def test_drawing_in_pieces_needs_little_memory_and_changes_nothing(monkeypatch):
    a, b = np.random.default_rng(6).normal(size=(2, 40))
    whole = paired_permutation_test(a, b, num_permutations=500)
    small = paired_permutation_test(a[:8], b[:8])
    monkeypatch.setattr("rankllm_composer.ranking.comparison.NUM_SIGNS_AT_ONCE", 70)
    assert paired_permutation_test(a[:8], b[:8]) == small
    assert paired_permutation_test(a, b, num_permutations=500) == whole


def test_compare_counts_by_query():
    before = {"q1": 0.2, "q2": 0.5, "q3": 0.9, "q4": 0.4}
    after = {"q4": 0.8, "q3": 0.8, "q2": 0.5, "q1": 0.6}
    result = compare(before, after)
    assert (result.wins, result.ties, result.losses) == (2, 1, 1)
    assert result.first_mean == pytest.approx(2.0 / 4)
    assert result.second_mean == pytest.approx(2.7 / 4)
    assert result.difference == pytest.approx(0.7 / 4)
    # Differences 0.4, 0, -0.1, 0.4: sums as far from 0 as 0.7 are ±0.7 and ±0.9, each with either sign of the 0.
    assert result.p_value == 8 / 16
    assert compare({"q": 0.5}, {"q": 0.5 + 1e-9}).ties == 1
    assert compare({"q": 0.5}, {"q": 0.5 + 1e-5}).wins == 1


def test_compare_does_not_depend_on_the_order_of_queries():
    generator = np.random.default_rng(7)
    before, after = ({f"q{i}": value for i, value in enumerate(generator.uniform(size=30))} for _ in range(2))
    reversed_before = dict(reversed(before.items()))
    assert compare(reversed_before, after) == compare(before, after)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ndcg([1, 0], k=0), "ndcg: k is 0; expected 1 or more"),
        (lambda: ndcg([[1, 0]]), "ndcg: grades are .*; expected one number per candidate"),
        (lambda: ndcg([1, None]), "ndcg: grades are .*Use 0 for unjudged ones"),
        (lambda: ndcg([1], [math.nan]), "ndcg: grades are"),
        (lambda: reciprocal_rank([1], k=-1), "reciprocal_rank: k is -1"),
        (lambda: kendall_tau([0, 1], [0]), r"kendall_tau: ranks have shapes \(2,\) and \(1,\)"),
        (lambda: paired_permutation_test([], []), "paired_permutation_test: the values have shapes"),
        (lambda: paired_permutation_test([1.0], [1.0, 2.0]), "paired_permutation_test: the values have shapes"),
        (lambda: paired_permutation_test([1.0], [math.nan]), "paired_permutation_test: .*finite values in both"),
        (lambda: paired_permutation_test([1], [2], num_permutations=0), "num_permutations is 0; expected 1 or more"),
        (lambda: compare({"q1": 1}, {"q1": 1, "q2": 0}), r"the systems have 1 and 2 queries, of which 1 .*\['q2'\]"),
        (lambda: compare({}, {}), "compare: the systems have 0 and 0 queries"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["metrics", "comparison"])
def test_measuring_loads_neither_torch_nor_scipy(name):
    check = f"import sys, rankllm_composer.ranking.{name}; print({{'torch', 'scipy.stats'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
