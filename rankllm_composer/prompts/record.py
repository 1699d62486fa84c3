"""A teacher-ranked list: read from the published layout, validated, and augmented."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from rankllm_composer.errors import PromptError, RecordError, counted
from rankllm_composer.prompts.permutations import (
    IdentifierStyle,
    format_permutation,
    normalize_white_space,
    parse_answer,
    parse_permutation,
    ranks_from_permutation,
)
from rankllm_composer.prompts.prompt_template import Prompt, PromptTemplate
from rankllm_composer.prompts.user_turn import UserTurn, parse_user_turn, read_user_turn, render_user_turn

OrderedBy = Literal["answer", "grades", "scores"]
MAX_VALUE = 1e38  # grades and scores fit 32 bits


@dataclass(frozen=True, slots=True)
class Record:
    """One teacher-ranked list: the three turns of a training conversation, and what is known about its candidates.

    Attributes:
        id: names the record in errors and logs.
        system, user, response: the turns; `response` is the teacher's permutation as text.
        qid: query id, None if not known.
        docids: document id of each candidate in presentation order.
        grades: relevance grade of each candidate in presentation order, None = not judged.
        scores: the teacher's score of each candidate in presentation order, None = not scored.
        ordered_by: what the order of the response follows: "grades" or "scores", where equal candidates are tied, or
            "answer", the response itself, whatever grades and scores are known beside it.
        template: what is written instead of the system and user turn, from the query and the passages of the user turn;
            None = the two turns, unchanged.
    """

    id: str
    system: str
    user: str
    response: str
    qid: str | None = None
    docids: tuple[str, ...] | None = None
    grades: tuple[int | None, ...] | None = None
    scores: tuple[float | None, ...] | None = None
    ordered_by: OrderedBy = "answer"
    template: PromptTemplate | None = None
    _turn: UserTurn | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def turn(self) -> UserTurn:
        """The user turn, parsed by `read_user_turn` on first use and kept."""
        turn = self._turn
        if turn is None:
            turn = read_user_turn(self.user)
            object.__setattr__(self, "_turn", turn)
        return turn

    @property
    def prompt_turns(self) -> tuple[str, str]:
        """System and user turn of the prompt; PromptError if the user turn cannot be read for another template."""
        if self.template is None:
            return self.system, self.user
        turn = self.turn
        if turn.has_several_readings:
            raise PromptError(
                f"record {self.id!r}: a line in a passage opens like the next passage, so that its passages cannot be "
                "told apart for data.prompt_template. Build the shards without this record, or set "
                "data.prompt_template=null."
            )
        prompt = Prompt(turn.style, self.template)
        return prompt.system, prompt.user_turn(turn.query, turn.passages)

    @property
    def known_grades(self) -> tuple[int, ...] | None:
        """The grades as measures count them: 0 where a candidate is not judged or its grade is negative."""
        return None if self.grades is None else tuple(max(0, grade or 0) for grade in self.grades)

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

        The turns are identified by their order; only their `value` is read. `qid`, `docids`, `grades`, `scores`
        and `ordered_by` are optional.

        Raises:
            PromptError: no id, not exactly three turns, a turn without text, docids, grades or scores that are not
                lists, or another `ordered_by` than "answer", "grades" or "scores".
        """
        if not isinstance(mapping, Mapping):
            raise PromptError(f"record is {type(mapping).__name__}; expected a mapping with id and conversations")
        name = mapping.get("id")
        if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
            raise PromptError(f"record: id is {name!r}; expected a text or an integer. Give every record a unique id.")
        where = f"record {name!r}"
        turns = mapping.get("conversations")
        if not isinstance(turns, Sequence) or isinstance(turns, str) or len(turns) != 3:
            found = repr(turns)
            if isinstance(turns, Sequence) and not isinstance(turns, str):
                found = counted(len(turns), "turn")
            raise PromptError(
                f"{where}: conversations: {found}; expected exactly three turns: system, human, gpt. Write an empty "
                "system text as an empty value."
            )
        for place, turn in zip(("system", "human", "gpt"), turns):
            if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
                raise PromptError(
                    f"{where}: conversations: the {place} turn has no text under 'value'. Write each turn as "
                    "{'from': …, 'value': text}."
                )
        docids, grades = mapping.get("docids"), mapping.get("grades")
        if docids is not None and not _is_list_of(docids, (str, int)):
            raise PromptError(f"{where}: docids is {docids!r}; expected a list of texts, one per passage")
        if grades is not None and not _is_list_of(grades, (int, type(None))):
            raise PromptError(f"{where}: grades is {grades!r}; expected a list of integers or nulls, one per passage")
        scores = mapping.get("scores")
        ordered_by: OrderedBy = mapping.get("ordered_by") or "answer"
        if scores is not None and not _is_list_of(scores, (int, float, type(None))):
            raise PromptError(f"{where}: scores is {scores!r}; expected a list of numbers or nulls, one per passage")
        if ordered_by not in get_args(OrderedBy):
            expected = "answer, grades or scores, which made the order of the response"
            raise PromptError(f"{where}: ordered_by is {ordered_by!r}; expected {expected}")
        return cls(
            id=str(name),
            system=turns[0]["value"],
            user=turns[1]["value"],
            response=turns[2]["value"],
            qid=None if mapping.get("qid") is None else str(mapping["qid"]),
            docids=None if docids is None else tuple(str(docid) for docid in docids),
            grades=None if grades is None else tuple(grades),
            scores=None if scores is None else tuple(scores),
            ordered_by=ordered_by,
        )


def repair_answer(record: Record, *, lenient: bool = False) -> tuple[Record, tuple[str, ...]]:
    """Write the response of a record as `[B] > [A]`, and name what was changed, if anything.

    Args:
        record: a record as it was read; one that cannot be repaired is returned unchanged, for `validate_record`.
        lenient: read any text as the inference client does (`parse_answer`), unless it names no candidate; otherwise
            only white space may differ.
    """
    if not isinstance(record.response, str):
        return record, ()
    try:
        num_candidates, style = len(record.turn.passages), record.turn.style
        answer = normalize_white_space(record.response)
        repairs: tuple[str, ...] = ("answers with other white space, which is normalized",)
        try:
            parse_permutation(answer, num_candidates, style)
            if answer == record.response:
                return record, ()
        except PromptError:
            parsed = parse_answer(record.response, num_candidates, style)
            if not lenient or parsed.num_missing == num_candidates:
                return record, ()
            answer = format_permutation(parsed.permutation, style)
            found = {
                "answers with a thought before them, which is left out": "</think>" in record.response,
                "answers with a repeated identifier, of which the first counts": parsed.num_repeated,
                "answers that omit candidates, which follow in their order": parsed.num_missing,
            }
            others = "answers with other text, of which the identifiers are read as the client does"
            repairs = tuple(what for what, is_found in found.items() if is_found) or (others,)
    except PromptError:
        return record, ()
    repaired = dataclasses.replace(record, response=answer)
    object.__setattr__(repaired, "_turn", record.turn)
    return repaired, repairs


def validate_record(record: Record, place: str = "record") -> UserTurn:
    """Check that a record is one list of 2 or more passages for one query, with a complete order of them.

    The user turn may differ from the client's prompt; it is trained unchanged (see `read_user_turn`).

    Args:
        record: the record.
        place: file and index of the record, for the error.
    Returns:
        The parsed user turn.
    Raises:
        RecordError: the record cannot be trained on.
    """

    def bad(reason: str) -> RecordError:
        return RecordError(place, record.id if isinstance(record.id, str) else None, reason)

    texts = {"id": record.id, "system turn": record.system, "user turn": record.user, "response": record.response}
    if record.qid is not None:
        texts["qid"] = record.qid
    for what, text in texts.items():
        if not isinstance(text, str):
            raise bad(f"{what} is {type(text).__name__}; expected text. Correct the record.")
        if not text.strip() and what not in ("system turn", "qid"):
            raise bad(f"{what} is empty. Correct the record or remove it.")
        if not is_unicode(text):
            raise bad(f"{what} contains half of a surrogate pair; expected valid Unicode. Write the text again.")
    try:
        turn = record.turn
    except PromptError as error:
        raise bad(str(error)) from error
    num_candidates = len(turn.passages)
    if num_candidates < 2:
        raise bad(f"user turn: {num_candidates} passage; expected 2 or more. Remove the record.")
    if not turn.query.strip():
        raise bad("user turn: the query is empty. Correct the record or remove it.")
    try:
        permutation = parse_permutation(record.response, num_candidates, turn.style)
    except PromptError as error:
        raise bad(str(error)) from error
    known: tuple[tuple[str, tuple[Any, ...] | None, tuple[type, ...], str], ...] = (
        ("docids", record.docids, (str,), "text"),
        ("grades", record.grades, (int, type(None)), "integers or nulls"),
        ("scores", record.scores, (int, float, type(None)), "numbers below 1e38 or nulls"),
    )
    for what, values, kinds, expected in known:
        if values is None:
            continue
        if len(values) != num_candidates:
            found = f"{counted(len(values), 'entry')} for {counted(num_candidates, 'passage')}"
            raise bad(f"{what} has {found}; expected one per passage")
        for value in values:
            is_too_large = isinstance(value, int | float) and not abs(value) < MAX_VALUE
            if not isinstance(value, kinds) or isinstance(value, bool) or is_too_large:
                raise bad(f"{what} contains {value!r}; expected {expected}")
    if record.ordered_by != "answer":
        _check_order(record.ordered_by, getattr(record, record.ordered_by), permutation, bad)
    for docid in record.docids or ():
        if not is_unicode(docid):
            raise bad("docids contains half of a surrogate pair; expected valid Unicode")
    return turn


def _check_order(
    by: str, values: Sequence[float | None] | None, permutation: Sequence[int], bad: Callable[[str], RecordError]
) -> None:
    """Check that the order of a response follows the grades or scores; raise the error that `bad` makes."""
    if values is None:
        raise bad(f"ordered_by is {by}, but there are no {by}. Add them, or set ordered_by to answer.")
    missing = 0.0 if by == "grades" else -math.inf
    in_order = [missing if values[i] is None else values[i] for i in permutation]
    for place, (value, other) in enumerate(pairwise(in_order), start=1):
        if value < other:  # type: ignore[operator]
            found = f"the response has {value} at place {place} before {other}"
            raise bad(f"ordered_by is {by}, but {found}. Order it from the highest down, or set ordered_by to answer.")


def augment_record(
    record: Record, *, seed: int, epoch: int, shuffle_passages: bool, identifiers: IdentifierStyle | None
) -> Record:
    """Shuffle the passages of a list, or rename its candidates; returns a new record with the same id.

    Args:
        record: its user turn is exactly the client's prompt.
        seed, epoch: determine the order, together with the record's id.
        shuffle_passages: permute the passages, and response, docids, grades and scores with them.
        identifiers: "letters" or "numbers"; None = keep them.
    Raises:
        PromptError: the user turn cannot be parsed, the response is not a permutation of it, or the style has too few
            identifiers.
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
            scores=None if record.scores is None else tuple(record.scores[i] for i in order),
        )
    except PromptError as error:
        raise PromptError(
            f"record {record.id!r}: its passages cannot be shuffled or renamed: {error} Keep "
            "data.train.shuffle_passages and data.train.identifiers at their defaults for these shards, or build them "
            "without this record."
        ) from error


def record_key(record_id: str) -> int:
    """63-bit hash of a record's id, the same on every machine: the first bits of its `id_digest`."""
    return int.from_bytes(id_digest(record_id), "big") >> 1


def id_digest(record_id: str) -> bytes:
    """8 bytes of BLAKE2b of a record's id."""
    return hashlib.blake2b(record_id.encode(), digest_size=8).digest()


def is_unicode(text: str) -> bool:
    """True if the text can be written as UTF-8; half of a surrogate pair, which JSON allows, cannot."""
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
