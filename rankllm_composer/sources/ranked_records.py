"""The simple record: a query, its passages, and their order as a ranking, scores or grades."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rankllm_composer.errors import counted
from rankllm_composer.prompts.record import MAX_VALUE
from rankllm_composer.sources.entries import QUERY_IDS, as_id, find_key, identifier, query_of
from rankllm_composer.sources.files import Row
from rankllm_composer.sources.json_layouts import numbered
from rankllm_composer.sources.training_layouts import passages_of

ORDERS = ("ranking", "scores", "grades")


class RankedList(NamedTuple):
    """A query with its passages in presentation order, and what orders them: the first of these that is not None.

    `ranking` holds positions from 0, best first; `scores` and `grades` one value per passage, None = not known.
    """

    id: str
    qid: str | None
    query: str
    texts: tuple[str, ...]
    docids: tuple[str, ...] | None
    ranking: tuple[int, ...] | None
    scores: tuple[float | None, ...] | None
    grades: tuple[int | None, ...] | None
    is_numbered: bool


def is_ranked_list(value: Any) -> bool:
    """A query with passages and an order, or with passages that are texts alone."""
    if not isinstance(value, Mapping) or not isinstance(value.get("query"), str | Mapping):
        return False
    passages = value.get("passages")
    if not isinstance(passages, Sequence) or isinstance(passages, str):
        return False
    return any(value.get(key) is not None for key in ORDERS) or all(isinstance(text, str) for text in passages)


def ranked_list(row: Row) -> Iterator[RankedList]:
    """The list of a row; SourceError if it is none, or its order is not one of its passages."""
    value = row.value
    asked = value["query"] if isinstance(value["query"], Mapping) else value
    qid_key = find_key(asked, QUERY_IDS[:4])
    id_key = find_key(value, ("id", "_id")) or find_key(value, QUERY_IDS[:4])
    qid = None if qid_key is None else identifier(row, asked, (qid_key,))
    record_id = identifier(row, value, (id_key,)) if id_key else qid or numbered(row)
    passages = passages_of(row, value["passages"])
    if len(passages) < 2:
        raise row.error(f"passages holds {len(passages)}; expected 2 or more. Correct or remove the record.")
    known = [docid for docid, _ in passages if docid is not None]
    twice = _repeated(known)
    if twice is not None:
        raise row.error(f"passages holds the docid {twice!r} twice; expected each once. Remove one.")
    if known and len(known) < len(passages):
        raise row.error(f"{len(known)} of {len(passages)} passages have a docid; expected all or none. Add the others.")
    given = {key: _values(row, key, len(passages)) for key in ORDERS if value.get(key) is not None}
    if not given:
        raise row.error("no ranking, scores or grades; expected one of them, which orders the passages. Add it.")
    yield RankedList(
        id=record_id,
        qid=qid,
        query=query_of(row, record_id, value["query"]).text,
        texts=tuple(text for _, text in passages),
        docids=tuple(known) or None,
        ranking=_ranking(row, given["ranking"], known) if "ranking" in given else None,
        scores=tuple(_score(row, score) for score in given["scores"]) if "scores" in given else None,
        grades=tuple(_grade(row, grade) for grade in given["grades"]) if "grades" in given else None,
        is_numbered=id_key is None and qid is None,
    )


def _values(row: Row, key: str, number: int) -> Sequence[Any]:
    given = row.value[key]
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise row.error(f"{key} is {_shown(given)}; expected a list with one entry per passage. Write it in [ ].")
    if len(given) != number:
        found = f"{counted(len(given), 'entry')} for {counted(number, 'passage')}"
        raise row.error(f"{key} has {found}; expected one per passage. Correct it.")
    if all(entry is None for entry in given):
        raise row.error(f"{key} holds nothing but nulls; expected a value for at least one passage. Correct it.")
    return given


def _ranking(row: Row, given: Sequence[Any], docids: Sequence[str]) -> tuple[int, ...]:
    """Positions from 0, best first, of a ranking by positions from 1 or by docids; refused if it could be either."""
    number = len(given)
    names = [None if isinstance(entry, bool) else as_id(entry) for entry in given]
    if None in names:
        wrong = given[names.index(None)]
        raise row.error(f"ranking contains {_shown(wrong)}; expected {_expected(number, docids)}. Correct it.")
    twice = _repeated(names)
    if twice is not None:
        raise row.error(f"ranking names {twice!r} twice; expected each passage once. Correct it.")
    readings: list[tuple[int, ...]] = []
    if set(names) == set(docids):
        readings.append(tuple(docids.index(str(name)) for name in names))
    are_texts = any(isinstance(entry, str) for entry in given)
    if set(names) == {str(place) for place in range(1, number + 1)} and not (are_texts and not docids):
        readings.append(tuple(int(str(name)) - 1 for name in names))
    if len(set(readings)) > 1:
        raise row.error(
            "ranking can be read as positions and as docids, which give two orders; expected one reading. Write docids "
            "that are no numbers, or leave them out."
        )
    if readings:
        return readings[0]
    if set(names) == {str(place) for place in range(number)} and not are_texts:
        raise row.error("ranking counts from 0; expected positions from 1, best first. Add 1 to each.")
    if are_texts and not docids:
        remedy = "Write positions as numbers, or give each passage a docid."
        raise row.error(f"ranking holds text, but the passages have no docids; expected positions from 1. {remedy}")
    unknown = next(entry for entry, name in zip(given, names) if name not in (docids if are_texts else _places(number)))
    raise row.error(f"ranking contains {_shown(unknown)}; expected {_expected(number, docids)}. Correct it.")


def _score(row: Row, given: Any) -> float | None:
    is_number = isinstance(given, int | float) and not isinstance(given, bool) and abs(given) < MAX_VALUE
    if given is not None and not is_number:
        raise row.error(f"scores contains {_shown(given)}; expected numbers, higher for better, or null. Correct it.")
    return None if given is None else float(given)


def _grade(row: Row, given: Any) -> int | None:
    is_whole = isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given < 1 << 31
    if given is not None and not (is_whole and int(given) == given):
        raise row.error(
            f"grades contains {_shown(given)}; expected whole numbers from 0 (not relevant) up, or null. Correct it, "
            "or write scores, which may be any numbers."
        )
    return None if given is None else int(given)


def _expected(number: int, docids: Sequence[str]) -> str:
    places = f"the positions 1 to {number}, best first"
    return f"{places}, or the docids" if docids else places


def _places(number: int) -> list[str]:
    return [str(place) for place in range(1, number + 1)]


def _repeated(names: Sequence[Any]) -> Any:
    return next((name for place, name in enumerate(names) if name in names[:place]), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
