"""The same teacher-ranked list shown otherwise: passages in another order, candidates named in another style."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from rankllm_composer.permutations import (
    IdentifierStyle,
    PermutationError,
    format_permutation,
    parse_permutation,
    ranks_from_permutation,
)
from rankllm_composer.prompts import PromptError, Record, parse_user_turn, render_user_turn


class AugmentationError(ValueError):
    """A list whose prompt cannot be read back, so that it cannot be laid out anew."""


def record_key(record_id: str) -> int:
    """63-bit hash of a record's id, the same on every machine: the first bits of its BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest(), "big") >> 1


def lay_out_anew(
    record: Record, *, seed: int, epoch: int, shuffle_passages: bool, identifiers: IdentifierStyle | None
) -> Record:
    """The same list with its passages in another order, or its candidates named in another style.

    Args:
        record: its user turn is of the client's layout, in one reading.
        seed, epoch: with the record's id they decide the order, and nothing else does.
        shuffle_passages: permute the passages; response, docids and grades go with them.
        identifiers: "letters" or "numbers"; None = the record's own.
    Returns:
        A new record with the same id.
    Raises:
        AugmentationError: the user turn cannot be read back, the response is no permutation of it, or the style has too
            few identifiers.
    """
    try:
        turn = parse_user_turn(record.user)
        permutation = parse_permutation(record.response, len(turn.passages), turn.style)
        order = list(range(len(turn.passages)))
        if shuffle_passages:
            order = np.random.default_rng((seed, epoch, record_key(record.id))).permutation(len(order)).tolist()
        place_of = ranks_from_permutation(order)
        style = identifiers or turn.style
        return dataclasses.replace(
            record,
            user=render_user_turn(turn.query, [turn.passages[i] for i in order], style),
            response=format_permutation([place_of[i] for i in permutation], style),
            docids=None if record.docids is None else tuple(record.docids[i] for i in order),
            grades=None if record.grades is None else tuple(record.grades[i] for i in order),
        )
    except (PromptError, PermutationError) as error:
        raise AugmentationError(
            f"record {record.id!r}: its passages cannot be shuffled or named anew: {error}; leave "
            "data.train.shuffle_passages and data.train.identifiers at their defaults for these shards, or build them "
            "without this record"
        ) from error
