"""Balancing, packing and loss normalizers, without a model."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankllm_composer.data.packing import (
    TokenizedList,
    balance,
    count_microbatches,
    num_samples_in_batch,
    num_tokens_in_batch,
    pack,
    pack_rows,
    split_batch,
)
from rankllm_composer.prompts.encoding import EncodedRecord
from rankllm_composer.prompts.relevance import Relevance


def sequence(length, response_start, num_candidates, *, key=1, relevance=None):
    ranks = np.random.default_rng(length).permutation(num_candidates)
    encoded = EncodedRecord(
        input_ids=np.arange(length, dtype=np.int32) + 100 * key,
        response_start=response_start,
        score_position=min(response_start, length - 1),
        identifier_token_ids=np.arange(num_candidates, dtype=np.int32) + 7,
        ranks=ranks,
    )
    return TokenizedList(encoded, f"record-{key}", key, relevance=relevance)


@given(
    lengths=st.lists(st.integers(1, 500), max_size=40),
    limit=st.one_of(st.tuples(st.integers(1, 9), st.none()), st.tuples(st.none(), st.integers(500, 3000))),
)
def test_every_sequence_is_assigned_once_within_the_limit(lengths, limit):
    max_lists, max_tokens = limit
    count = count_microbatches(lengths, max_lists=max_lists, max_tokens=max_tokens)
    bins = balance(lengths, count, max_lists=max_lists)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    for members in bins:
        assert max_lists is None or len(members) <= max_lists
        assert max_tokens is None or sum(lengths[i] for i in members) <= max_tokens


def test_microbatches_are_balanced():
    lengths = np.random.default_rng(0).integers(500, 4000, 64).tolist()
    tokens = [sum(lengths[i] for i in members) for members in balance(lengths, 8, max_lists=8)]
    assert max(tokens) / (sum(lengths) / 8) < 1.05
    in_order = [sum(lengths[i : i + 8]) for i in range(0, 64, 8)]
    assert max(tokens) < max(in_order)


def test_a_sequence_over_the_token_budget_is_an_error():
    with pytest.raises(ValueError, match=r"batch\.microbatch_tokens is 800, but a list has 900 tokens\. Raise"):
        count_microbatches([10, 900], max_lists=None, max_tokens=800)
    with pytest.raises(ValueError, match="exactly one of microbatch_lists and microbatch_tokens"):
        count_microbatches([10], max_lists=1, max_tokens=100)


def test_pack_concatenates_sequences():
    grades, unknown = np.array([2, 0, 0], np.float32), np.full(3, np.nan, np.float32)
    tied = Relevance(np.array([0, 1, 1]), grades, unknown)
    packed = pack([sequence(6, 3, 3, key=1, relevance=tied), sequence(4, 4, 2, key=2)])
    assert packed["input_ids"].tolist() == [[100, 101, 102, 103, 104, 105, 200, 201, 202, 203]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    assert packed["cu_seqlens"].tolist() == [0, 6, 10] and packed["cu_seqlens"].dtype == torch.int32
    # the first predicts its response, tokens 3 to 5, from the places before; the second only has a score position
    assert packed["logit_positions"].tolist() == [2, 3, 4, 9]
    assert packed["target_ids"].tolist() == [103, 104, 105, -100]
    # the first's identifiers are scored at its response's first token, place 3 = row 1; the second's at place 9 = row 3
    assert packed["score_rows"].tolist() == [1, 3]
    assert packed["candidate_mask"].tolist() == [[True, True, True], [True, True, False]]
    assert packed["identifier_token_ids"].tolist() == [[7, 8, 9], [7, 8, 0]]
    assert packed["scored_token_ids"].tolist() == [0, 7, 8, 9]
    assert packed["identifier_columns"].tolist() == [[1, 2, 3], [1, 2, 0]]
    assert packed["ranks"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert packed["grades"][0].tolist() == [2.0, 0.0, 0.0] and packed["grades"][1].isnan().all()
    assert packed["teacher_scores"].isnan().all()
    assert packed["lengths"] == [6, 4] and packed["longest"] == 6 and packed["record_ids"] == ["record-1", "record-2"]
    assert num_tokens_in_batch(packed) == {"total": 10, "loss_generating": 1}
    assert num_samples_in_batch(packed) == 2


def test_an_empty_pack_has_no_targets():
    packed = pack([])
    assert packed["input_ids"].shape == (1, 1) and packed["target_ids"].tolist() == [-100]
    assert packed["score_rows"].shape == (0,) and packed["record_ids"] == [] and packed["lengths"] == [1]
    assert num_tokens_in_batch(packed)["total"] == 0 and num_samples_in_batch(packed) == 0


@pytest.mark.parametrize("limit", [{"max_lists": 1}, {"max_lists": 2}, {"max_lists": 9}, {"max_tokens": 40}])
def test_scales_give_means_over_the_global_batch(limit):
    rows = [sequence(10 + 3 * i, 6 + i, 2 + i, key=i + 1) for i in range(5)]
    dropped, padding = TokenizedList(None, "too-long", 99), TokenizedList(None, "", 0)
    batch = {"sequences": [rows[0], dropped, *rows[1:], padding]}
    microbatches = split_batch(batch, **limit)
    num_targets = sum((10 + 3 * i) - (6 + i) for i in range(5))
    for microbatch in microbatches:
        assert microbatch["language_modelling_scale"] == len(microbatches) / num_targets
        assert microbatch["ranking_scale"] == len(microbatches) / 5
        assert microbatch["num_rows"] == {"trained": 5, "too_long": 1, "padding": 1}
    assert sorted(i for m in microbatches for i in m["record_ids"]) == [f"record-{i + 1}" for i in range(5)]
    assert num_samples_in_batch(batch) == 7
    assert num_tokens_in_batch(batch)["total"] == sum(m["num_tokens"] for m in microbatches) == 80


@pytest.mark.parametrize("limit", [{"max_lists": 2}, {"max_tokens": 40}])
def test_packed_ahead_by_a_worker_is_the_same(limit):
    """What a worker packs, and its process sends as bytes, becomes the microbatches of rows packed at the step."""
    known = [np.arange(2 + i, dtype=np.float32) for i in range(5)]
    relevant = [Relevance(np.arange(2 + i)[::-1], known[i], known[i] / 2) for i in range(5)]
    rows = [sequence(10 + 3 * i, 6 + i, 2 + i, key=i + 1, relevance=relevant[i]) for i in range(5)]
    rows.append(TokenizedList(None, "too-long", 99))
    ahead = pickle.loads(pickle.dumps(pack_rows(rows, **limit)))
    assert not any(isinstance(value, torch.Tensor) for part in ahead["packed"] for value in part.values())
    pairs = list(zip(split_batch(ahead, **limit), split_batch({"sequences": rows}, **limit), strict=True))
    for ours, expected in pairs:
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert ours[name].dtype == value.dtype
                torch.testing.assert_close(ours[name], value, rtol=0, atol=0, equal_nan=True)
            else:
                assert ours[name] == value


def test_a_batch_with_nothing_to_train_still_runs():
    (microbatch,) = split_batch({"sequences": [TokenizedList(None, "a", 1)]}, max_lists=4)
    assert microbatch["record_ids"] == [] and microbatch["ranking_scale"] == 0.0
