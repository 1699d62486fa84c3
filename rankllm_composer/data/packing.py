"""Encoded lists to packed microbatches: no padding, nearly equal token counts, exact normalizers.

A device batch is `{"sequences": [TokenizedList, …]}`: the rows of one rank in one optimizer step. `split_batch` turns
it into microbatches of tensors. Composer weights the loss of a microbatch by its size over the mean size per rank and
averages over ranks. No single size fits both a mean over target tokens and a mean over lists, so every microbatch has
the same size for Composer (`loss_generating` = 1) and carries the factors that make the sum of all microbatch losses
the mean over the global batch, however it was split.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rankllm_composer.distributed import gather_numbers
from rankllm_composer.prompts.encoding import EncodedRecord
from rankllm_composer.prompts.relevance import Relevance

IGNORED_TARGET = -100


@dataclass(frozen=True, slots=True)
class TokenizedList:
    """A tokenized list: one row of the dataset.

    Args:
        encoded: token ids and targets; None = a row that is counted but not trained (too long, or padding).
        record_id: the record's id, for messages.
        record_key: 63-bit hash of the id, a seed that does not depend on how a batch is split.
        relevance: what a ranking loss learns; None = the ranks of `encoded`, without grades and scores.
        docids: (N,) document ids in presentation order; None = the shards have none.
    """

    encoded: EncodedRecord | None
    record_id: str
    record_key: int
    relevance: Relevance | None = None
    docids: tuple[str, ...] | None = None


def balance(lengths: list[int], num_bins: int, *, max_lists: int | None = None) -> list[list[int]]:
    """Distribute sequences over bins of nearly equal token counts: longest first, each to the emptiest bin.

    Returns ascending indices into `lengths` per bin; some bins stay empty if there are fewer sequences. A bin holds at
    most `max_lists` sequences; raises ValueError if that is too few for all of them.
    """
    if max_lists is not None and len(lengths) > num_bins * max_lists:
        raise ValueError(f"{len(lengths)} sequences do not fit into {num_bins} microbatches of {max_lists} lists")
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, index) for index in range(num_bins)]
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, index = heapq.heappop(emptiest)
        bins[index].append(item)
        if max_lists is None or len(bins[index]) < max_lists:
            heapq.heappush(emptiest, (tokens + lengths[item], index))
    return [sorted(members) for members in bins]


def _largest(lengths: list[int], bins: list[list[int]]) -> int:
    """Return the tokens of the fullest bin."""
    return max((sum(lengths[i] for i in members) for members in bins), default=0)


def count_microbatches(lengths: list[int], *, max_lists: int | None, max_tokens: int | None) -> int:
    """Return the smallest number of microbatches that respects the limit; at least 1.

    Raises:
        ValueError: neither or both limits are set, or a single sequence exceeds `max_tokens`.
    """
    if (max_lists is None) == (max_tokens is None):
        state = "neither is" if max_lists is None else "both are"
        raise ValueError(f"batch: set exactly one of microbatch_lists and microbatch_tokens ({state} set)")
    if max_lists is not None:
        return max(1, math.ceil(len(lengths) / max_lists))
    assert max_tokens is not None
    if lengths and max(lengths) > max_tokens:
        raise ValueError(
            f"batch.microbatch_tokens is {max_tokens}, but a list has {max(lengths)} tokens. "
            "Raise batch.microbatch_tokens or lower data.max_length_tokens."
        )
    num_bins = max(1, math.ceil(sum(lengths) / max_tokens))
    while _largest(lengths, balance(lengths, num_bins)) > max_tokens:
        num_bins += 1
    return num_bins


def pack(sequences: list[TokenizedList]) -> dict[str, Any]:
    """Concatenate sequences into one microbatch.

    Args:
        sequences: the sequences to train, each with `encoded`. An empty list gives one token without a target.
    Returns:
        input_ids, position_ids: (1, T) int64; positions restart with each sequence.
        cu_seqlens: (S + 1,) int32.
        logit_positions: (R,) int64, positions in T whose logits the loss needs.
        target_ids: (R,) int64, the token to predict there; -100 = none.
        target_lists: (R,) int64, the sequence that it belongs to.
        score_rows: (S,) int64, which of the R rows holds the identifier scores of a list.
        identifier_token_ids, ranks: (S, N) int64; candidate_mask: (S, N) bool.
        grades, teacher_scores: (S, N) float32, NaN = none; see `Relevance`.
        scored_token_ids: (C,) int64, the distinct tokens of identifier_token_ids, ascending; identifier_columns: (S, N)
            int64, their places in it.
        lengths, record_keys, record_ids: lists with one entry per sequence.
        longest: tokens of the longest sequence.
        num_tokens: T, or 0 without sequences.
    """
    return _as_tensors(_pack(sequences))


def _pack(sequences: list[TokenizedList]) -> dict[str, Any]:
    """Return a microbatch with arrays in place of tensors, which go from process to process without a file each."""
    empty = not sequences
    encoded = [s.encoded for s in sequences if s.encoded is not None]
    lengths = [1] if empty else [len(item.input_ids) for item in encoded]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shape = (len(sequences), max((len(item.ranks) for item in encoded), default=1))  # (S, N)
    identifier_token_ids, ranks = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    candidate_mask, grades = np.zeros(shape, bool), np.full(shape, np.nan, np.float32)
    teacher_scores = grades.copy()
    positions, targets, target_lists, score_rows, num_rows = [], [], [], [], 0
    for index, (sequence, item) in enumerate(zip(sequences, encoded)):
        length, count = lengths[index], len(item.ranks)
        if item.response_start < length:
            rows = np.arange(item.response_start - 1, length - 1)
            targets.append(item.input_ids[item.response_start :])
        else:
            rows = np.array([item.score_position])
            targets.append(np.array([IGNORED_TARGET]))
        positions.append(starts[index] + rows)
        target_lists.append(np.full(len(rows), index))
        score_rows.append(num_rows + item.score_position - rows[0])
        num_rows += len(rows)
        ranks[index, :count] = item.ranks
        if item.identifier_token_ids is not None:
            identifier_token_ids[index, :count] = item.identifier_token_ids
            candidate_mask[index, :count] = True
        if (relevance := sequence.relevance) is not None:
            ranks[index, :count] = relevance.ranks
            grades[index, :count] = relevance.grades
            teacher_scores[index, :count] = relevance.teacher_scores
    token_ids = [np.zeros(1, np.int64)] if empty else [item.input_ids for item in encoded]
    scored_token_ids, columns = np.unique(identifier_token_ids, return_inverse=True)

    def joined(parts: list[NDArray[Any]]) -> NDArray[np.int64]:
        return np.concatenate(parts, dtype=np.int64)

    return {
        "input_ids": joined(token_ids)[None],
        "position_ids": joined([np.arange(length) for length in lengths])[None],
        "cu_seqlens": starts.astype(np.int32),
        "logit_positions": np.zeros(1, np.int64) if empty else joined(positions),
        "target_ids": np.array([IGNORED_TARGET]) if empty else joined(targets),
        "target_lists": np.zeros(1, np.int64) if empty else joined(target_lists),
        "score_rows": np.array(score_rows, np.int64),
        "identifier_token_ids": identifier_token_ids,
        "scored_token_ids": scored_token_ids,
        "identifier_columns": columns.reshape(shape),  # flat before numpy 2
        "ranks": ranks,
        "candidate_mask": candidate_mask,
        "grades": grades,
        "teacher_scores": teacher_scores,
        "lengths": lengths,
        "longest": max(lengths),
        "record_keys": [s.record_key for s in sequences] or [0],
        "record_ids": [s.record_id for s in sequences],
        "num_tokens": 0 if empty else sum(lengths),
    }


def _as_tensors(packed: Mapping[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in packed.items()}


def pack_rows(
    rows: list[TokenizedList], *, max_lists: int | None = None, max_tokens: int | None = None
) -> dict[str, Any]:
    """Return the batch of a rank with its microbatches packed, for `split_batch`; workers of the loader call it ahead.

    Args:
        rows: the rows of a rank in one optimizer step.
        max_lists, max_tokens: most lists or tokens per microbatch; set exactly one.
    Returns:
        {"sequences": rows, "packed": the microbatches of this rank, as arrays}.
    Raises:
        ValueError: see `count_microbatches`.
    """
    trained = [s for s in rows if s.encoded is not None]
    lengths = [len(s.encoded.input_ids) for s in trained if s.encoded is not None]
    bins = balance(
        lengths, count_microbatches(lengths, max_lists=max_lists, max_tokens=max_tokens), max_lists=max_lists
    )
    return {"sequences": rows, "packed": [_pack([trained[i] for i in members]) for members in bins]}


def split_batch(
    batch: Mapping[str, Any], *, max_lists: int | None = None, max_tokens: int | None = None
) -> list[dict[str, Any]]:
    """Split the batch of a rank into packed microbatches. A collective: every rank calls it for the same step.

    Every rank gets the same number of microbatches, so that the collectives of a sharded forward pass match; a rank
    with too few sequences runs microbatches without targets.

    Args:
        batch: {"sequences": [TokenizedList, …]} of this rank, packed ahead by `pack_rows` or not.
        max_lists, max_tokens: most lists or tokens per microbatch; set exactly one.
    Returns:
        Microbatches of `pack`, with `language_modelling_scale` and `ranking_scale`: the factors of the sums over the
        target tokens and over the lists of a microbatch with which Composer's average over microbatches and ranks is
        the mean over the global batch; and `num_rows`: rows of the global batch by what became of them.
    Raises:
        ValueError: see `count_microbatches`.
    """
    if "packed" not in batch:
        batch = pack_rows(list(batch["sequences"]), max_lists=max_lists, max_tokens=max_tokens)
    packed, rows = batch["packed"], batch["sequences"]
    numbers = {
        "targets": sum(int((part["target_ids"] != IGNORED_TARGET).sum()) for part in packed),
        "trained": sum(len(part["record_ids"]) for part in packed),
        "padding": sum(not row.record_id for row in rows),
    }
    numbers["too_long"] = len(rows) - numbers["trained"] - numbers["padding"]
    of_ranks = gather_numbers([len(packed), *numbers.values()])
    num_microbatches = max(row[0] for row in of_ranks)
    totals = {name: sum(row[place] for row in of_ranks) for place, name in enumerate(numbers, start=1)}
    num_parts, num_targets = len(of_ranks) * num_microbatches, totals.pop("targets")
    shared = {
        "language_modelling_scale": num_parts / num_targets if num_targets else 0.0,
        "ranking_scale": num_parts / totals["trained"] if totals["trained"] else 0.0,
        "num_rows": totals,
    }
    packed = [*packed, *(_pack([]) for _ in range(num_microbatches - len(packed)))]
    return [_as_tensors(part) | shared for part in packed]


def num_samples_in_batch(batch: Mapping[str, Any]) -> int:
    """Return the lists of a microbatch, or the rows of a device batch, untrained ones included."""
    return len(batch["sequences"]) if "sequences" in batch else len(batch["record_ids"])


def num_tokens_in_batch(batch: Mapping[str, Any]) -> dict[str, int]:
    """Return the computed tokens (`total`) and the weight of a microbatch for Composer, 1 (see the module)."""
    if "sequences" in batch:
        total = sum(len(s.encoded.input_ids) for s in batch["sequences"] if s.encoded is not None)
    else:
        total = batch["num_tokens"]
    return {"total": total, "loss_generating": 1}
