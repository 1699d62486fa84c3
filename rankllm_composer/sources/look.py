"""What files are taken for, which of their ids match, and one list made from them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rankllm_composer.errors import RankLLMComposerError, counted
from rankllm_composer.options import IRDS, SourceOptions
from rankllm_composer.prompts.permutations import parse_permutation
from rankllm_composer.prompts.record import Record
from rankllm_composer.sources.conversations import open_conversations
from rankllm_composer.sources.files import container_of, read_rows
from rankllm_composer.sources.layouts import PARTS, Part, describe_value, layouts_of
from rankllm_composer.sources.records import RecordSource, open_source
from rankllm_composer.sources.retrieval_files import BEIR_FILES, file_of, load_run, read_part

_QUERY_PARTS: tuple[Part, ...] = ("run", "teacher", "queries", "judgments")
_DOCUMENT_PARTS: tuple[Part, ...] = ("run", "teacher", "docs", "judgments")
_FLAGS: dict[Part, str] = {"teacher": "--teacher-run", "records": "--input"}
_SHOWN_CHARS = 70


@dataclass
class _File:
    """A file, and the parts that it can be read for, the most usual first."""

    source: str
    what: str
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        return self.source if self.source.startswith(IRDS) else Path(self.source).name


def look(sources: Sequence[str]) -> Iterator[str]:
    """Say what each source is taken for, what joins with what and how many ids match; show one list.

    Args:
        sources: files, folders or irds:ID, as `shards build` and `rerank` take them.
    """
    files = [_look_at(source) for source in sources]
    for file in files:
        yield f"{file.name}: {file.what}"
    roles = _roles(files)
    for part, file in roles.items():
        yield f"{_FLAGS.get(part, f'--{part}')} {file.source}"
    yield from _counts(roles)
    yield from _one_list(roles)


def _look_at(source: str) -> _File:
    if source.startswith(IRDS):
        return _File(source, "a data set of ir_datasets, read part by part", ("run", "queries", "docs", "judgments"))
    if Path(source).is_dir():
        held: list[Part] = [part for part in BEIR_FILES if _holds(source, part)]
        what = f"a folder in BEIR's layout with {_listed(held)}" if held else "a folder, read as a data set"
        return _File(source, what, tuple(held) or ("records",))
    try:
        container = container_of(source)
        row = next(read_rows(source), None)
    except RankLLMComposerError as error:
        return _File(source, f"not read: {error}", ())
    if row is None:
        return _File(source, "an empty file", ())
    layouts = layouts_of(row.value)
    parts = tuple(dict.fromkeys(part for layout in layouts for part in layout.readers))
    if not layouts:
        return _File(source, f"not read: {describe_value(row.value)}", ())
    names = " or ".join(layout.name for layout in layouts)
    read = f"read for {_listed(parts)}" if parts else "which is not read"
    return _File(source, f"{names} ({container.kind}), {read}", parts)


def _holds(folder: str, part: Part) -> bool:
    try:
        return file_of(folder, part).is_file()
    except RankLLMComposerError:
        return False


def _listed(parts: Sequence[Part]) -> str:
    return ", ".join(PARTS[part] for part in parts)


def _roles(files: Sequence[_File]) -> dict[Part, _File]:
    """Which file is read for which part: each for the first of its parts that is free."""
    roles: dict[Part, _File] = {}
    either = {"queries", "docs"}  # the ids of the run decide what such a file holds
    for file in sorted(files, key=lambda file: (set(file.parts) == either, len(file.parts))):
        parts = file.parts
        if set(parts) == either and "run" in roles:
            docids = {line.docid for line in read_part(roles["run"].source, "run")}
            found = sum(document.docid in docids for document in islice(read_part(file.source, "docs"), 10_000))
            parts = ("docs", "queries") if found else ("queries", "docs")
        if free := next((part for part in parts if part not in roles), None):
            roles[free] = file
        if Path(file.source).is_dir() or file.source.startswith(IRDS):
            roles = dict.fromkeys(parts, file) | roles
    if "run" in roles:
        holds = [part for part in roles["run"].parts if part in ("queries", "docs", "judgments")]
        roles |= {part: roles["run"] for part in holds if part not in roles}
    return roles


def _counts(roles: dict[Part, _File]) -> Iterator[str]:
    """Entries of each part, and how many ids of queries and documents two parts share."""
    queries: dict[Part, dict[str, None]] = {}
    documents: dict[Part, dict[str, None]] = {}
    for part, file in roles.items():
        if part in ("records", "docs"):
            continue
        number = 0
        for entry in read_part(file.source, part):
            number += 1
            if hasattr(entry, "qid"):
                queries.setdefault(part, {})[entry.qid] = None
            if hasattr(entry, "docid"):
                documents.setdefault(part, {})[entry.docid] = None
        yield f"{PARTS[part]}: {counted(number, 'entry')}, {counted(len(queries.get(part, ())), 'query')}"
    if "run" in roles:
        notes: list[str] = []
        load_run(roles["run"].source, "first", notes.append)
        yield from notes
    known = {docid for found in documents.values() for docid in found}
    if "docs" in roles:
        number = 0
        for document in read_part(roles["docs"].source, "docs"):
            number += 1
            if document.docid in known or number == 1:
                documents.setdefault("docs", {})[document.docid] = None
        yield f"documents: {counted(number, 'entry')}"
    for what, ids, parts in (("query", queries, _QUERY_PARTS), ("document", documents, _DOCUMENT_PARTS)):
        base = next((part for part in parts if part in ids), None)
        for part in parts:
            if base is not None and part in ids and part != base:
                shared = sum(found in ids[part] for found in ids[base])
                yield f"{PARTS[base]} and {PARTS[part]}: {shared:,} of {len(ids[base]):,} {what} ids match" + (
                    "" if shared else f" ({next(iter(ids[base]))!r} and {next(iter(ids[part]))!r}, for example)"
                )


def _one_list(roles: dict[Part, _File]) -> Iterator[str]:
    """The first list that is made from the files, as text."""
    options: dict[str, Any] = {}
    if "records" in roles:
        options["input"] = roles["records"].source
    elif "run" in roles:
        names = {"teacher": "teacher_run"}
        options = {names.get(part, part): file.source for part, file in roles.items()}
    if "input" not in options and not ({"judgments", "teacher_run"} & options.keys()):
        if options:
            yield "no list is shown: judgments or a teacher's order is needed, which orders the candidates"
        return
    try:
        chosen = SourceOptions(**options, require_relevant=None if "input" in options else False)
        source: RecordSource = open_conversations(chosen) if "input" in options else open_source(chosen)
        with tempfile.TemporaryDirectory() as folder:
            prepared = source.prepare(Path(folder))
            made = (record for item in prepared.items() for _, record in prepared.records(item))
            record = next((record for record in made if isinstance(record, Record)), None)
    except RankLLMComposerError as error:
        yield f"no list can be made: {error}"
        return
    if record is not None:
        yield from _shown(record)


def _shown(record: Record) -> Iterator[str]:
    turn = record.turn
    yield f"list {record.id}: {turn.query}"
    for rank, i in enumerate(parse_permutation(record.response, len(turn.passages), turn.style), start=1):
        docid = f" {record.docids[i]}" if record.docids else ""
        known = {"grade": record.grades, "teacher's score": record.scores}
        values = [f"{name} {'unknown' if given[i] is None else given[i]}" for name, given in known.items() if given]
        grade = f" ({', '.join(values)})" if values else ""
        text = " ".join(turn.passages[i].split())
        yield f"  {rank}. presented as {i + 1}{docid}{grade}: {text[:_SHOWN_CHARS]}{'…' * (len(text) > _SHOWN_CHARS)}"
