"""Training lists from retrieval files: a TREC run, queries and documents, ordered by judgments or by a teacher's run.

The files are read once into a SQLite database on disk with ranks, grades and the offset of each document, so that
memory does not grow with the files and any process can build the lists of any query.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rankllm_composer.errors import PromptError, RecordError, SourceError
from rankllm_composer.options import FROM_RUN, SourceOptions
from rankllm_composer.prompts.permutations import format_permutation
from rankllm_composer.prompts.record import Record, validate_record
from rankllm_composer.prompts.user_turn import (
    SYSTEM_MESSAGE,
    clean_query,
    document_text,
    passage_word_limit,
    render_user_turn,
    truncate_passage,
)
from rankllm_composer.sources.records import Dropped, Item, describe_file
from rankllm_composer.sources.retrieval_files import (
    Judgment,
    RunLine,
    query_text,
    read_json_lines,
    read_judgments,
    read_run,
)

_BATCH_ROWS = 10_000
_SCHEMA = """
    CREATE TABLE queries (number INTEGER PRIMARY KEY, qid TEXT UNIQUE, text TEXT);
    CREATE TABLE run (query INTEGER, rank INTEGER, line INTEGER, docid TEXT,
        PRIMARY KEY (query, rank, line)) WITHOUT ROWID;
    CREATE TABLE teacher (query INTEGER, rank INTEGER, line INTEGER, docid TEXT,
        PRIMARY KEY (query, rank, line)) WITHOUT ROWID;
    CREATE TABLE qrels (query INTEGER, grade INTEGER, line INTEGER, docid TEXT,
        PRIMARY KEY (query, line)) WITHOUT ROWID;
    CREATE TABLE docs (docid TEXT PRIMARY KEY, start INTEGER) WITHOUT ROWID;
"""


def candidate_lists(
    num_candidates: int, *, window: int, stride: int, num_lists: int, seed: int, qid: str
) -> list[tuple[int, ...]]:
    """Choose and order the candidates of each list of a query.

    The first lists are windows over the first-stage order, from the top, `stride` apart, the last one ending at the
    last candidate. Further lists are random draws of `window` candidates in random order, each from a generator seeded
    with (seed, qid, number of the list). With `num_lists` 0 there is one list per window. Positions count from 0.
    """
    size = min(window, num_candidates)
    last = num_candidates - size
    starts = [*range(0, last, stride), last]
    lists = [tuple(range(start, start + size)) for start in starts]
    for number in range(len(lists), num_lists):
        lists.append(tuple(random.Random(f"{seed}/{qid}/{number}").sample(range(num_candidates), size)))
    return lists[: num_lists or None]


def teacher_order(
    docids: Sequence[str], grades: dict[str, int] | None, teacher: Sequence[str] | None
) -> tuple[int, ...]:
    """Order a list's candidates from best to worst, as 0-based positions; ties keep the given order.

    A teacher's ranking replaces the grades. Documents that it did not rank come last; unjudged documents have grade 0.
    """
    if teacher is not None:
        rank = {docid: i for i, docid in enumerate(teacher)}
        return tuple(sorted(range(len(docids)), key=lambda i: rank.get(docids[i], len(rank))))
    known = grades or {}
    return tuple(sorted(range(len(docids)), key=lambda i: -known.get(docids[i], 0)))


@dataclass(frozen=True)
class TrecSource:
    """Records made from retrieval files; a `RecordSource`.

    Lists are built for the queries in the queries file. Passages are prepared as the inference client does: title and
    text joined, repaired, truncated, `[12]` → `(12)`. Candidates are in the order of the run's rank column. Judgments
    give the grades (negative grades become 0) and, without a teacher's run, the order. The id of a list is
    `qid-number`. `prepare` sets `database`.
    """

    options: SourceOptions
    database: str | None = None

    def __post_init__(self) -> None:
        self.options.check()

    @property
    def name(self) -> str:
        return Path(self._path("run")).name

    def describe(self) -> dict[str, Any]:
        files = {role: getattr(self.options, role) for role in ("run", "queries", "docs", "judgments", "teacher_run")}
        options = {name: getattr(self.options, name) for name in FROM_RUN}
        return {
            "kind": "trec",
            "files": [{"role": role, **describe_file(path)} for role, path in files.items() if path is not None],
            "options": options | {"require_relevant": self._drops_irrelevant},
        }

    def prepare(self, folder: Path) -> TrecSource:
        """Read the files into a database in `folder`; raise SourceError if one is malformed or they do not match."""
        handle, path = tempfile.mkstemp(suffix=".sqlite", dir=folder)
        os.close(handle)
        with sqlite3.connect(path) as database:
            database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _SCHEMA)
            _import_queries(database, self._path("queries"))
            _import_lines(database, "run", read_run(self._path("run")))
            if self.options.teacher_run is not None:
                _import_lines(database, "teacher", read_run(self.options.teacher_run))
            if self.options.judgments is not None:
                _import_lines(database, "qrels", read_judgments(self.options.judgments))
            _import_docs(database, self._path("docs"))
            if database.execute("SELECT 1 FROM run LIMIT 1").fetchone() is None:
                found = f"the run has no candidates for any query in {self.options.queries}"
                raise SourceError(f"{self.options.run}: {found}. Check that the two files belong together.")
        database.close()
        return replace(self, database=path)

    def items(self) -> Iterator[Item]:
        """Yield the queries of the queries file in its order, then those of the run alone, which are dropped later."""
        options = self.options
        size = options.window * min(options.max_passage_words or passage_word_limit(options.window), 100) * 6
        num_lists = options.lists_per_query or -(-max(0, options.depth - options.window) // options.stride) + 1
        with closing(_Files(self)) as files:
            rows = files.database.execute("SELECT number, qid FROM queries ORDER BY number")
            for index, (number, qid) in enumerate(rows):
                yield Item(index, f"{self.name}:query {qid!r}", (number, qid), size * num_lists)

    def records(self, item: Item) -> list[tuple[str, Record | Dropped]]:
        """Build the lists of one query."""
        with closing(_Files(self)) as files:
            return self._lists(files, item)

    def _lists(self, files: _Files, item: Item) -> list[tuple[str, Record | Dropped]]:
        number, qid = item.raw
        options = self.options
        query = files.query(number)
        if query is None:
            return [(item.place, Dropped("queries of the run that are not in the queries file"))]
        candidates = files.order("run", number, self.name, options.depth)
        if len(candidates) < 2:
            return [(item.place, Dropped("queries with fewer than two candidates"))]
        teacher = None
        if options.teacher_run is not None:
            teacher = files.order("teacher", number, Path(options.teacher_run).name, None)
            if not teacher:
                return [(item.place, Dropped("queries without a teacher's order"))]
        grades = None if options.judgments is None else files.grades(number, Path(options.judgments).name)
        made: list[tuple[str, Record | Dropped]] = []
        passages: dict[str, str] = {}
        lists = candidate_lists(
            len(candidates),
            window=options.window,
            stride=options.stride,
            num_lists=options.lists_per_query,
            seed=options.seed,
            qid=qid,
        )
        for i, members in enumerate(lists):
            place = f"{item.place} list {i}"
            docids = tuple(candidates[member] for member in members)
            record_grades = None if grades is None else tuple(max(0, grades.get(docid, 0)) for docid in docids)
            if self._drops_irrelevant and not any(record_grades or ()):
                made.append((place, Dropped("lists without a relevant passage")))
                continue
            in_run = sorted(range(len(members)), key=lambda k: members[k])  # ties keep the first-stage order
            best_first = [in_run[k] for k in teacher_order([docids[k] for k in in_run], grades, teacher)]
            words = options.max_passage_words or passage_word_limit(len(docids))
            for docid in docids:
                if docid not in passages:  # windows overlap, and all lists of a query have the same length
                    passages[docid] = truncate_passage(files.document(docid, place), words)
            shown = [passages[docid] for docid in docids]
            user = render_user_turn(clean_query(query), shown, options.identifiers)
            response = format_permutation(best_first, options.identifiers)
            record = Record(f"{qid}-{i}", SYSTEM_MESSAGE, user, response, qid, docids, record_grades)
            validate_record(record, place)
            made.append((place, record))
        return made

    def _path(self, role: str) -> str:
        return str(getattr(self.options, role))

    @property
    def _drops_irrelevant(self) -> bool:
        if self.options.require_relevant is None:
            return self.options.judgments is not None and self.options.teacher_run is None
        return self.options.require_relevant


class _Files:
    """The database and the documents of a prepared source, open for reading."""

    def __init__(self, source: TrecSource) -> None:
        assert source.database is not None, "call prepare() first"
        self.database = sqlite3.connect(f"{Path(source.database).as_uri()}?mode=ro&immutable=1", uri=True)
        self._docs = Path(source._path("docs")).open("rb")  # noqa: SIM115 - closed by close()
        self._docs_name = Path(self._docs.name).name

    def close(self) -> None:
        self.database.close()
        self._docs.close()

    def query(self, number: int) -> str | None:
        text: str | None = self.database.execute("SELECT text FROM queries WHERE number = ?", (number,)).fetchone()[0]
        return text

    def order(self, table: str, number: int, name: str, depth: int | None) -> list[str]:
        """Document ids of a query in a run, best first, at most `depth`."""
        order = f"SELECT docid, line FROM {table} WHERE query = ? ORDER BY rank, line"
        rows = self.database.execute(order, (number,)).fetchall()
        lines: dict[str, int] = {}
        for docid, line in rows:
            if docid in lines:
                reason = f"document {docid!r} is repeated, also in line {lines[docid]}. Remove one."
                raise RecordError(f"{name}:line {line}", None, reason)
            lines[docid] = line
        return [docid for docid, _ in rows[:depth]]

    def grades(self, number: int, name: str) -> dict[str, int]:
        grades: dict[str, int] = {}
        rows = self.database.execute("SELECT docid, grade, line FROM qrels WHERE query = ?", (number,))
        for docid, grade, line in rows:
            if grades.setdefault(docid, grade) != grade:
                reason = f"document {docid!r} has grade {grade} here and {grades[docid]} before. Remove one."
                raise RecordError(f"{name}:line {line}", None, reason)
        return grades

    def document(self, docid: str, place: str) -> str:
        row = self.database.execute("SELECT start FROM docs WHERE docid = ?", (docid,)).fetchone()
        if row is None:
            reason = f"document {docid!r} of the run is not in {self._docs_name}. Add it, or remove it from the run."
            raise RecordError(place, None, reason)
        self._docs.seek(row[0])
        try:
            return document_text(json.loads(self._docs.readline()))
        except PromptError as error:
            raise RecordError(place, None, f"document {docid!r} of {self._docs_name}: {error}") from error


def _import_queries(database: sqlite3.Connection, path: str) -> None:
    for number, _, query in read_json_lines(path, "qid"):
        place = f"{Path(path).name}:line {number}"
        try:
            row = (query["qid"], query_text(query, query["qid"], place))
            database.execute("INSERT INTO queries (qid, text) VALUES (?, ?)", row)
        except sqlite3.IntegrityError as error:
            raise SourceError(f"{place}: query {query['qid']!r} is repeated. Remove one.") from error


def _import_lines(database: sqlite3.Connection, table: str, lines: Iterable[RunLine | Judgment]) -> None:
    """Store the lines whose query has a text; store the run's other queries without lines, to be counted."""
    qid, number, has_text = None, 0, False
    source = iter(lines)
    while batch := list(islice(source, _BATCH_ROWS)):
        rows = []
        for line in batch:
            if line.qid != qid:
                qid = line.qid
                row = database.execute("SELECT number, text FROM queries WHERE qid = ?", (qid,)).fetchone()
                if row is None and table == "run":
                    database.execute("INSERT INTO queries (qid) VALUES (?)", (qid,))
                number, has_text = (row[0], row[1] is not None) if row else (0, False)
            if has_text:
                rows.append((number, line.rank if isinstance(line, RunLine) else line.grade, line.line, line.docid))
        database.executemany(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", rows)


def _import_docs(database: sqlite3.Connection, path: str) -> None:
    source = ((number, start, doc["docid"]) for number, start, doc in read_json_lines(path, "docid"))
    while batch := list(islice(source, _BATCH_ROWS)):
        try:
            database.executemany("INSERT INTO docs VALUES (?, ?)", [(docid, start) for _, start, docid in batch])
        except sqlite3.IntegrityError as error:
            place = f"{Path(path).name}:lines {batch[0][0]} to {batch[-1][0]}"
            raise SourceError(f"{place}: a document is repeated. Remove one.") from error
