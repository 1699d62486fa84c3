"""Layouts of training records: conversations under any of their usual names, and passages graded as relevant or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rankllm_composer.errors import PromptError
from rankllm_composer.prompts.record import MAX_VALUE, is_unicode
from rankllm_composer.prompts.user_turn import document_text
from rankllm_composer.sources.entries import DOCUMENT_IDS, QUERY_IDS, find_key, identifier, query_of
from rankllm_composer.sources.files import Row
from rankllm_composer.sources.json_layouts import numbered

HISTORY, FIRST = "invocations_history", "first_invocation"
_TURNS = ("conversations", "messages", "conversation")
_ROLES = {
    "system": ("system", "developer"),
    "human": ("human", "user"),
    "gpt": ("gpt", "assistant", "model", "chatgpt", "bot"),
}
_POSITIVES = ("pos", "positive", "positives", "positive_passages", "relevant_passages", "positive_messages", "response")
_NEGATIVES = (
    "neg",
    "negative",
    "negatives",
    "negative_passages",
    "hard_negatives",
    "negative_messages",
    "rejected_response",
)


class Conversation(NamedTuple):
    """A conversation in the published layout; `is_numbered` if its id is only its number."""

    fields: dict[str, Any]
    is_numbered: bool = False


class GradedList(NamedTuple):
    """A query and passages with grades, and scores of a teacher if all passages have one."""

    id: str
    qid: str | None
    query: str
    texts: tuple[str, ...]
    docids: tuple[str, ...] | None
    grades: tuple[int, ...]
    scores: tuple[float, ...] | None
    is_numbered: bool


def is_graded_list(value: Any) -> bool:
    """A query with positive and negative passages."""
    if not isinstance(value, Mapping) or not (_key(value, _POSITIVES) and _key(value, _NEGATIVES)):
        return False
    return isinstance(value.get("query"), str) or ("messages" in value and "negative_messages" in value)


def is_conversation(value: Any) -> bool:
    """Turns of a system, a user and an assistant."""
    return isinstance(value, Mapping) and _key(value, _TURNS) != ""


def is_instruction(value: Any) -> bool:
    """`instruction` and `output`, or `prompt` and its completion."""
    return isinstance(value, Mapping) and (
        {"instruction", "output"} <= value.keys()
        or ("prompt" in value and _key(value, ("completion", "response")) != "")
    )


def is_history(value: Any) -> bool:
    """A query with the prompts and answers of an inference client."""
    return isinstance(value, Mapping) and isinstance(value.get(HISTORY), Sequence) and bool(value[HISTORY])


def conversation(row: Row) -> Iterator[Conversation]:
    value = row.value
    turns = value[_key(value, _TURNS)]
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise row.error(f"conversations is text but no JSON: {error}. Correct or remove the record.") from error
    # A data set may store a list of turns as one list per field.
    if isinstance(turns, Mapping) and all(isinstance(turn, list) for turn in turns.values()):
        turns = [dict(zip(turns, turn)) for turn in zip(*turns.values())]
    if isinstance(turns, Sequence) and not isinstance(turns, str):
        turns = _three_turns(row, [_with_value(turn) for turn in turns], value.get("system"))
    yield _with_id(row, {**value, "conversations": turns})


def instruction(row: Row) -> Iterator[Conversation]:
    value = row.value
    if value.get("history"):
        raise row.error("the record has a history of further turns; expected one user turn. Remove it or the record.")
    if "instruction" in value:
        asked = "\n".join(str(value[key]) for key in ("instruction", "input") if value.get(key))
        answer = value["output"]
    else:
        asked, answer = value["prompt"], value[_key(value, ("completion", "response"))]
    turns = [*_turns_of(asked, "user"), *_turns_of(answer, "assistant")]
    yield _with_id(row, {**value, "conversations": _three_turns(row, turns, value.get("system"))})


def history(row: Row) -> Iterator[Conversation]:
    """The invocations of a query, each as a conversation."""
    query = row.value.get("query")
    known = query if isinstance(query, Mapping) else row.value
    key = find_key(known, QUERY_IDS[:4])
    qid = identifier(row, known, QUERY_IDS[:4]) if key else numbered(row)
    for number, invocation in enumerate(row.value[HISTORY], start=row.value.get(FIRST, 0)):
        if not isinstance(invocation, Mapping) or not isinstance(invocation.get("prompt"), Sequence):
            raise row.error(f"invocation {number} has no prompt. Correct or remove it.")
        if isinstance(invocation["prompt"], str):
            raise row.error(
                f"invocation {number} has a prompt that is one text, with a chat template in it; expected turns with "
                "role and content. Write the history again with a client that sends turns."
            )
        turns = [*_turns_of(invocation["prompt"], "user"), *_turns_of(invocation.get("response"), "assistant")]
        yield Conversation({"id": f"{qid}-{number}", "qid": qid, "conversations": _three_turns(row, turns, None)})


def graded_list(row: Row) -> Iterator[GradedList]:
    value = row.value
    qid_key = find_key(value, QUERY_IDS[:4])
    id_key = find_key(value, ("id", "_id")) or qid_key
    record_id = numbered(row) if id_key is None else identifier(row, value, (id_key,))
    asked = value.get("query") or _last_text(value.get("messages"))
    query = query_of(row, record_id, asked if isinstance(asked, str) else "")
    positives, negatives = (_passages(row, value, keys) for keys in (_POSITIVES, _NEGATIVES))
    given = (
        scores_of(value, (f"{_key(value, _POSITIVES)}_scores", "pos_scores"), len(positives)),
        scores_of(value, (f"{_key(value, _NEGATIVES)}_scores", "neg_scores"), len(negatives)),
    )
    docids = [docid for docid, _ in positives + negatives]
    yield GradedList(
        id=record_id,
        qid=None if qid_key is None else identifier(row, value, (qid_key,)),
        query=query.text,
        texts=tuple(text for _, text in positives + negatives),
        docids=None if None in docids else tuple(map(str, docids)),
        grades=(1,) * len(positives) + (0,) * len(negatives),
        scores=None if None in given else tuple(score for scores in given for score in scores or ()),
        is_numbered=id_key is None,
    )


def scores_of(value: Mapping[str, Any], keys: Sequence[str], number: int) -> list[float] | None:
    """The teacher's scores under one of the keys; None unless there is a finite one for each passage."""
    found = next((value[key] for key in keys if isinstance(value.get(key), list)), None)
    if found is None or len(found) != number:
        return None
    complete = all(isinstance(score, int | float) and abs(score) < MAX_VALUE for score in found)
    return [float(score) for score in found] if complete else None


def _passages(row: Row, value: Mapping[str, Any], keys: Sequence[str]) -> list[tuple[str | None, str]]:
    """The passages under the first of the keys."""
    given: Any = value[_key(value, keys)]
    return passages_of(row, [given] if isinstance(given, str | Mapping) else given or [])


def passages_of(row: Row, given: Sequence[Any]) -> list[tuple[str | None, str]]:
    """(document id, text) of each passage, which may be text, an object, or a list of turns."""
    passages: list[tuple[str | None, str]] = []
    for passage in given:
        docid = None if find_key(passage, DOCUMENT_IDS) is None else identifier(row, passage, DOCUMENT_IDS)
        if isinstance(passage, Sequence) and not isinstance(passage, str):
            passage = _last_text(passage)
        try:
            text = document_text({"text": passage} if isinstance(passage, str) else passage)
        except (PromptError, AttributeError, TypeError, ValueError) as error:
            raise row.error(f"a passage is {str(passage)[:60]!r}; expected text. Correct the record.") from error
        if not text.strip() or not is_unicode(text):
            raise row.error("a passage is empty or no valid Unicode. Correct or remove it.")
        passages.append((docid, text))
    return passages


def _key(value: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first of the keys that an object has; "" if none."""
    return next((key for key in keys if value.get(key) is not None), "")


def _with_value(turn: Any) -> Any:
    """A turn with its text under `value`; OpenAI writes it as `content`, as text or as parts."""
    if not isinstance(turn, Mapping) or "value" in turn:
        return turn
    content = turn.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = None if None in texts else "".join(map(str, texts))
    return {"from": turn.get("role"), "value": content}


def _turns_of(value: Any, role: str) -> list[Any]:
    """Turns from a list of them, or from one text of a role."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_with_value(turn) for turn in value]
    return [{"from": role, "value": value}]


def _last_text(value: Any) -> str:
    """The text of the last turn; "" if there is none."""
    return "".join(str(turn.get("value")) for turn in _turns_of(value, "user")[-1:] if isinstance(turn, Mapping))


def _three_turns(row: Row, turns: list[Any], system: Any) -> list[Any]:
    """System, user and assistant; a system text may be missing, or stand beside the turns."""
    roles = [_role(turn) for turn in turns]
    if len(turns) == 2 and roles[0] != "system":
        turns = [{"from": "system", "value": system if isinstance(system, str) else ""}, *turns]
        roles = ["system", *roles]
    if len(turns) == 3 and None not in roles and roles != ["system", "human", "gpt"]:
        found = ", ".join(str(turn.get("from") or turn.get("role")) for turn in turns)
        raise row.error(f"the turns are {found}; expected system, user, assistant. Correct or remove the record.")
    return turns


def _role(turn: Any) -> str | None:
    name = str(turn.get("from") or turn.get("role") or "").lower() if isinstance(turn, Mapping) else ""
    return next((role for role, names in _ROLES.items() if name in names), None)


def _with_id(row: Row, fields: dict[str, Any]) -> Conversation:
    key = next((key for key in ("id", "_id", "uid", "uuid", "custom_id") if fields.get(key) not in (None, "")), None)
    grades = fields.get("grades")
    if isinstance(grades, list):
        whole = [int(grade) if isinstance(grade, float) and grade.is_integer() else grade for grade in grades]
        fields = {**fields, "grades": whole}
    return Conversation({**fields, "id": numbered(row) if key is None else fields[key]}, is_numbered=key is None)
