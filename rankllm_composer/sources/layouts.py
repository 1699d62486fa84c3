"""The layouts that are recognized by the content of a row, and what each of them holds.

`LAYOUTS` is the one table: the readers look layouts up in it, `sources look` names them, docs/what-it-reads.md lists
them. The first that matches and holds what is read counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rankllm_composer.sources import json_layouts as objects
from rankllm_composer.sources import ranked_records as ranked
from rankllm_composer.sources import text_layouts as lines
from rankllm_composer.sources import training_layouts as training
from rankllm_composer.sources.files import Row

Part = Literal["run", "teacher", "queries", "docs", "judgments", "records"]

PARTS: dict[Part, str] = {
    "records": "training records",
    "run": "a first-stage run",
    "teacher": "a teacher's order",
    "queries": "queries",
    "docs": "documents",
    "judgments": "judgments",
}
"""What a file can be read for."""


@dataclass(frozen=True)
class Layout:
    """A layout: what it is called, which rows it matches, and how each part that it holds is read from a row."""

    name: str
    matches: Callable[[Any], bool]
    readers: Mapping[Part, Callable[[Row], Iterable[Any]]] = field(default_factory=dict)


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(name in value for name in names)


_CANDIDATES: dict[Part, Callable[[Row], Iterable[Any]]] = {
    "run": objects.candidates_run,
    "teacher": objects.candidates_run,
    "queries": objects.candidates_query,
    "docs": objects.candidates_documents,
    "judgments": objects.candidates_judgments,
}
LAYOUTS = (
    Layout("a history of rank_llm's invocations", training.is_history, {"records": training.history}),
    Layout("queries with positive and negative passages", training.is_graded_list, {"records": training.graded_list}),
    Layout("preference pairs", lambda value: _has("chosen", "rejected")(value) or _has("rejected_response")(value)),
    Layout("conversations", training.is_conversation, {"records": training.conversation}),
    Layout("instructions with outputs", training.is_instruction, {"records": training.instruction}),
    Layout("queries with ranked passages", ranked.is_ranked_list, {"records": ranked.ranked_list}),
    Layout("queries with their candidates", objects.is_candidates, _CANDIDATES),
    Layout(
        "ids of candidates in two orders",
        objects.is_orders,
        {
            "run": objects.orders_run,
            "teacher": objects.orders_teacher,
            "queries": objects.orders_query,
            "judgments": objects.orders_judgments,
        },
    ),
    Layout("queries with images", lambda value: _has("query_img_path")(value) and bool(value["query_img_path"])),
    Layout("topics that name a document", lambda value: _has("num", "docid")(value) and not objects.is_query(value)),
    Layout(
        "vectors", lambda value: (_has("vector")(value) or _has("embedding")(value)) and not objects.is_query(value)
    ),
    Layout("conversational topics with turns", _has("turn")),
    Layout("requests of OpenAI's batch API, without answers", _has("custom_id", "body")),
    Layout("judgments of BEIR", objects.is_beir_judgment, {"judgments": objects.flat_judgment}),
    Layout(
        "pairs of a query and a document with a number",
        objects.is_flat_judgment,
        {"judgments": objects.flat_judgment, "run": objects.flat_run, "teacher": objects.flat_run},
    ),
    Layout("queries", objects.is_query, {"queries": objects.json_query}),
    Layout("questions without ids", objects.is_question, {"queries": objects.numbered_query}),
    Layout("documents", objects.is_document, {"docs": objects.json_document}),
    Layout(
        "one object of texts by id",
        objects.is_text_by_id,
        {"queries": objects.queries_by_id, "docs": objects.documents_by_id},
    ),
    Layout(
        "one object of numbers by query and document",
        objects.is_numbers_by_ids,
        {"judgments": objects.judgments_by_ids, "run": objects.run_by_ids, "teacher": objects.run_by_ids},
    ),
    Layout("permutations of RankGPT", objects.is_permutation, {"teacher": objects.permutation}),
    Layout("a TREC run", lines.is_trec_run, {"run": lines.trec_run, "teacher": lines.trec_run}),
    Layout("TREC judgments", lines.is_trec_qrels, {"judgments": lines.trec_qrels}),
    Layout(
        "lines of query, document and number",
        lines.is_three_columns,
        {"judgments": lines.short_qrels, "run": lines.ranks, "teacher": lines.ranks},
    ),
    Layout("lines of id, tab and text", lines.is_id_and_text, {"queries": lines.tsv_query, "docs": lines.tsv_document}),
    Layout("lines of number, colon and text", lines.is_id_colon_text, {"queries": lines.colon_query}),
    Layout("paths of sections, as in TREC CAR", lines.is_section_path, {"queries": lines.section_query}),
)


def layouts_of(value: Any) -> list[Layout]:
    """All layouts that match a row."""
    return [layout for layout in LAYOUTS if layout.matches(value)]


def layout_of(row: Row, part: Part) -> Layout:
    """The layout in which a row holds a part.

    Raises:
        SourceError: there is none; names what the row is instead.
    """
    found = layouts_of(row.value)
    for layout in found:
        if part in layout.readers:
            return layout
        if not layout.readers:  # what it is matters more than what else could be read from it
            found = [layout]
            break
    expected = f"expected {PARTS[part]} in a layout of docs/what-it-reads.md"
    if not found:
        raise row.error(f"found {describe_value(row.value)}; {expected}. Convert the file or name another.")
    held = " and ".join(PARTS[name] for name in found[0].readers)
    what, remedy = found[0].name, "Convert the file or name another."
    if held and part == "records" and isinstance(row.value, Mapping):  # perhaps a list whose keys have other names
        what += f" ({describe_value(row.value)})"
        remedy = "Write the keys query, passages and ranking, scores or grades, or convert the file."
    what += f", read as {held}" if held else ", which are not read"
    raise row.error(f"found {what}; {expected}. {remedy}")


def describe_value(value: Any) -> str:
    """What a row of no known layout is, in words."""
    if isinstance(value, Mapping):
        keys = ", ".join(map(repr, list(value)[:8]))
        return f"an object with the keys {keys}" if keys else "an object without keys"
    if not isinstance(value, str):
        return f"the JSON value {str(value)[:60]!r}"
    commas = ", perhaps with columns separated by commas" if value.count(",") and "\t" not in value else ""
    return f"the text {value[:80]!r}{commas}"
