"""A teacher-ranked list: read from the published layout, validated, and augmented."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rankllm_composer.errors import PromptError, RecordError
from rankllm_composer.prompts.permutations import (
    IdentifierStyle,
    format_permutation,
    parse_permutation,
    ranks_from_permutation,
)
from rankllm_composer.prompts.user_turn import UserTurn, parse_user_turn, read_user_turn, render_user_turn


@dataclass(frozen=True, slots=True)
class Record:
    """One teacher-ranked list: the three turns of a training conversation, and what is known about its candidates.

    Attributes:
        id: names the record in errors and logs.
        system, user, response: the turns; `response` is the teacher's permutation as text.
        qid: query id, None if not known.
        docids: document id of each candidate in presentation order.
        grades: relevance grade of each candidate in presentation order.
    """

    id: str
    system: str
    user: str
    response: str
    qid: str | None = None
    docids: tuple[str, ...] | None = None
    grades: tuple[int, ...] | None = None
    _turn: UserTurn | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def turn(self) -> UserTurn:
        """The parsed user turn; parsed on first use and kept.

        Raises:
            PromptError: see `read_user_turn`.
        """
        turn = self._turn
        if turn is None:
            turn = read_user_turn(self.user)
            object.__setattr__(self, "_turn", turn)
        return turn

    @property
    def has_standard_prompt(self) -> bool:
        """True if the user turn is exactly what the inference client writes for this list."""
        try:
            return self.turn.is_standard
        except PromptError:
            return False

    @classmethod
    def from_conversations(cls, mapping: Mapping[str, Any]) -> Record:
        """Record from the published layout: `{"id": …, "conversations": [system, human, gpt]}`.

        The order of the turns is the contract, of each only `value` counts. `qid`, `docids` and `grades` are taken
        where they are given.

        Raises:
            PromptError: no id, not exactly three turns, a turn without text, docids or grades that are no lists.
        """
        if not isinstance(mapping, Mapping):
            raise PromptError(f"record: found {type(mapping).__name__}, allowed is a mapping with id and conversations")
        name = mapping.get("id")
        if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
            raise PromptError(f"record: id is {name!r}, allowed is a text or a whole number; give every record its own")
        where = f"record {name!r}"
        turns = mapping.get("conversations")
        if not isinstance(turns, Sequence) or isinstance(turns, str) or len(turns) != 3:
            found = f"{len(turns)} turns" if isinstance(turns, Sequence) and not isinstance(turns, str) else repr(turns)
            raise PromptError(
                f"{where}: conversations: found {found}, allowed is exactly three: system, human, gpt; "
                "write an empty system text as an empty value"
            )
        for place, turn in zip(("system", "human", "gpt"), turns):
            if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
                raise PromptError(
                    f"{where}: conversations: the {place} turn has no text under 'value'; write each turn as "
                    "{'from': …, 'value': text}"
                )
        docids, grades = mapping.get("docids"), mapping.get("grades")
        if docids is not None and not _is_list_of(docids, (str, int)):
            raise PromptError(f"{where}: docids: found {docids!r}, allowed is a list of texts, one a passage")
        if grades is not None and not _is_list_of(grades, (int,)):
            raise PromptError(f"{where}: grades: found {grades!r}, allowed is a list of whole numbers, one a passage")
        return cls(
            id=str(name),
            system=turns[0]["value"],
            user=turns[1]["value"],
            response=turns[2]["value"],
            qid=None if mapping.get("qid") is None else str(mapping["qid"]),
            docids=None if docids is None else tuple(str(docid) for docid in docids),
            grades=None if grades is None else tuple(grades),
        )


def validate_record(record: Record, place: str = "record") -> UserTurn:
    """Check that a record is one list of 2 or more passages under one query, with a complete order of them.

    The user turn may be worded otherwise than the client's: it is trained as it stands (see `read_user_turn`).

    Args:
        record: the record.
        place: where it comes from, for the error.
    Returns:
        The user turn taken apart: query, passages, identifier style.
    Raises:
        RecordError: what is wrong and what to do.
    """

    def bad(reason: str) -> RecordError:
        return RecordError(place, record.id if isinstance(record.id, str) else None, reason)

    texts = {"id": record.id, "system turn": record.system, "user turn": record.user, "response": record.response}
    if record.qid is not None:
        texts["qid"] = record.qid
    for what, text in texts.items():
        if not isinstance(text, str):
            raise bad(f"{what}: found {type(text).__name__}, allowed is text; correct the record")
        if not text.strip() and what not in ("system turn", "qid"):
            raise bad(f"{what}: found nothing, allowed is text; correct the record or leave it out")
        if not is_unicode(text):
            raise bad(f"{what}: found half of a surrogate pair, allowed is Unicode; write the text again")
    try:
        turn = record.turn
    except PromptError as error:
        raise bad(str(error)) from error
    num_candidates = len(turn.passages)
    if num_candidates < 2:
        raise bad(f"user turn: found {num_candidates} passage, allowed are 2 or more; leave the record out")
    if not turn.query.strip():
        raise bad("user turn: the query is empty; correct the record or leave it out")
    try:
        parse_permutation(record.response, num_candidates, turn.style)
    except PromptError as error:
        raise bad(str(error)) from error
    for what, values, kind in (("docids", record.docids, str), ("grades", record.grades, int)):
        if values is None:
            continue
        if len(values) != num_candidates:
            raise bad(f"{what}: found {len(values)} for {num_candidates} passages, allowed is one each; correct them")
        strange = [value for value in values if not isinstance(value, kind) or isinstance(value, bool)]
        if strange:
            raise bad(f"{what}: found {strange[0]!r}, allowed is {'text' if kind is str else 'whole numbers'}")
    for docid in record.docids or ():
        if not is_unicode(docid):
            raise bad("docids: found half of a surrogate pair, allowed is valid Unicode; correct them")
    return turn


def augment_record(
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
        PromptError: the user turn cannot be read back, the response is no permutation of it, or the style has too
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
    except PromptError as error:
        raise PromptError(
            f"record {record.id!r}: its passages cannot be shuffled or named anew: {error}; leave "
            "data.train.shuffle_passages and data.train.identifiers at their defaults for these shards, or build them "
            "without this record"
        ) from error


def record_key(record_id: str) -> int:
    """63-bit hash of a record's id, the same on every machine: the first bits of its `id_digest`."""
    return int.from_bytes(id_digest(record_id), "big") >> 1


def id_digest(record_id: str) -> bytes:
    """8 bytes of BLAKE2b of a record's id."""
    return hashlib.blake2b(record_id.encode(), digest_size=8).digest()


def is_unicode(text: str) -> bool:
    """True if the text can be written as UTF-8; JSON can hold half of a surrogate pair, which cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_list_of(values: object, kinds: tuple[type, ...]) -> bool:
    return (
        isinstance(values, Sequence)
        and not isinstance(values, (str, bytes))
        and all(isinstance(value, kinds) and not isinstance(value, bool) for value in values)
    )
