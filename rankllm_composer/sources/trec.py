"""Training lists from retrieval files: a first-stage run, queries and documents, ordered by judgments or by a teacher.

The files are read once into a SQLite database on disk: ranks, scores, grades, and the texts of the run's documents, so
that memory does not grow with the files and any process can build the lists of any query.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rankllm_composer.errors import RecordError, SourceError
from rankllm_composer.options import FROM_RUN, IRDS, SourceOptions
from rankllm_composer.prompts.clients import CURRENT_CLIENT, ClientVersion
from rankllm_composer.prompts.record import MAX_VALUE, OrderedBy, Record
from rankllm_composer.prompts.user_turn import clean_query, truncate_passage
from rankllm_composer.sources.entries import Judgment, Permutation, RunLine
from rankllm_composer.sources.lists import by_value, candidate_lists, described_client, make_record, word_limit
from rankllm_composer.sources.records import Dropped, Item, Made, Noted, describe_file, of_query
from rankllm_composer.sources.retrieval_files import (
    DISAGREEMENTS,
    Ranking,
    file_of,
    nothing_shared,
    rank_candidates,
    read_part,
    repeated,
    source_of,
)

_BATCH_ROWS = 10_000
_MAX_SCORE = MAX_VALUE / 10  # for infinite scores, which have a place but no distribution
_SCHEMA = """
    CREATE TABLE queries (number INTEGER PRIMARY KEY, qid TEXT UNIQUE, text TEXT, place TEXT, problem TEXT);
    CREATE TABLE run (query INTEGER, line INTEGER, docid TEXT, rank INTEGER, score REAL);
    CREATE TABLE teacher (query INTEGER, line INTEGER, docid TEXT, rank INTEGER, score REAL);
    CREATE TABLE judgments (query INTEGER, line INTEGER, docid TEXT, grade INTEGER);
    CREATE TABLE wanted (docid TEXT PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE docs (docid TEXT PRIMARY KEY, text TEXT, place TEXT, problem TEXT) WITHOUT ROWID;
"""
_INSERT_DOCUMENT = """
    INSERT INTO docs SELECT :docid, :text, :place, :problem WHERE EXISTS (SELECT 1 FROM wanted WHERE docid = :docid)
    ON CONFLICT (docid) DO UPDATE SET problem = excluded.place WHERE text <> excluded.text AND problem = ''
"""
_ROLES = {"run": "run", "teacher": "teacher_run", "judgments": "judgments", "queries": "queries", "docs": "docs"}
NOT_JUDGED = "lists without a judged candidate, whose candidates are all tied"
PARTLY_ORDERED = "lists that the teacher's order covers in part; the rest are tied behind it"


@dataclass(frozen=True)
class TrecSource:
    """Records made from retrieval files; a `RecordSource`.

    Lists are built for the queries in the queries file. Passages are prepared as the inference client does: title and
    text joined, repaired, truncated, `[12]` → `(12)`. Candidates and the teacher's order are sorted as trec_eval sorts
    them, see `rank_candidates`. Judgments give the grades (negative grades become 0, those of unjudged documents are
    unknown) and, without a teacher, the order. The scores of a teacher are kept. Queries and documents that are not
    named come from the run, where its layout holds them. The id of a list is `qid-number`. `prepare` sets `database`.
    """

    options: SourceOptions
    client: ClientVersion = CURRENT_CLIENT
    database: str | None = None

    def __post_init__(self) -> None:
        self.options.check()

    @property
    def name(self) -> str:
        return Path(self._source("run")).name

    @property
    def makes_lists(self) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        given = {role: getattr(self.options, role) for role in ("run", "queries", "docs", "judgments", "teacher_run")}
        files = [{"role": role, **_described(source, role)} for role, source in given.items() if source is not None]
        options: dict[str, Any] = {name: getattr(self.options, name) for name in FROM_RUN}
        options |= {"stride": self.options.step, "require_relevant": self._drops_irrelevant}
        options |= described_client(self.options, self.client)
        return {"kind": "trec", "files": files, "options": options}

    def prepare(self, folder: Path) -> TrecSource:
        """Read the files into a database in `folder`; raise SourceError if one is malformed or they do not match."""
        handle, path = tempfile.mkstemp(suffix=".sqlite", dir=folder)
        os.close(handle)
        with sqlite3.connect(path) as database:
            database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _SCHEMA)
            self._import(database)
        database.close()
        return replace(self, database=path)

    def items(self) -> Iterator[Item]:
        """Yield the queries of the queries file in its order, then those of the run alone, which are dropped later."""
        options = self.options
        size = options.window * min(word_limit(options, options.window, self.client), 100) * 6
        num_lists = options.lists_per_query or -(-max(0, options.depth - options.window) // options.step) + 1
        with closing(_Files(self)) as files:
            rows = files.database.execute("SELECT number, qid FROM queries ORDER BY number")
            for index, (number, qid) in enumerate(rows):
                yield Item(index, f"{self.name}:query {qid!r}", (number, qid), size * num_lists)

    def records(self, item: Item) -> list[Made]:
        """Build the lists of one query."""
        number, qid = item.raw
        with closing(_Files(self)) as files:
            query = files.query(number, qid)
            if query is None:
                return [(item.place, Dropped("queries of the run that the queries file lacks"))]
            return of_query(self._lists(files, item, query), clean_query(query))

    def _lists(self, files: _Files, item: Item, query: str) -> list[Made]:
        number, qid = item.raw
        options = self.options
        ranking = files.ranking("run", number, qid)
        candidates = ranking.docids[: options.depth]
        if len(candidates) < 2:
            return [(item.place, Dropped("queries with fewer than two candidates"))]
        made = self._notes(item, "run", ranking)
        teacher: dict[str, float] | None = None
        if options.teacher_run is not None:
            ordered = files.ranking("teacher", number, qid)
            if not ordered.docids:
                return [(item.place, Dropped("queries without a teacher's order"))]
            teacher, made = ordered.scores, made + self._notes(item, "teacher", ordered)
        grades = None if options.judgments is None else files.grades(number)
        passages: dict[str, str] = {}
        lists = candidate_lists(
            len(candidates),
            window=options.window,
            stride=options.step,
            num_lists=options.lists_per_query,
            seed=options.seed,
            qid=qid,
        )
        for i, members in enumerate(lists):
            place = f"{item.place} list {i}"
            docids = tuple(candidates[member] for member in members)
            record_grades = None if grades is None else tuple(map(grades.get, docids))
            scores = None if teacher is None else tuple(_finite(teacher.get(docid)) for docid in docids)
            num_ordered = len(docids) if scores is None else len(docids) - scores.count(None)
            if num_ordered == 0:
                made.append((place, Dropped("lists without a candidate in the teacher's order")))
                continue
            if self._drops_irrelevant and not any(grade and grade > 0 for grade in record_grades or ()):
                made.append((place, Dropped("lists without a relevant passage")))
                continue
            if num_ordered < len(docids):
                made.append((place, Noted(PARTLY_ORDERED)))
            if teacher is None and not set(docids) & (grades or {}).keys():
                made.append((place, Noted(NOT_JUDGED)))
            in_run = sorted(range(len(members)), key=lambda k: members[k])  # ties keep the first-stage order
            values = [grade or 0 for grade in record_grades or ()]
            if teacher is not None:
                places = {docid: place for place, docid in enumerate(teacher)}
                values = [-places.get(docid, len(places)) for docid in docids]
            best_first = [in_run[k] for k in by_value([values[k] for k in in_run])]
            for docid in docids:
                if docid not in passages:  # windows overlap, and all lists of a query have the same length
                    words = word_limit(options, len(docids), self.client)
                    passages[docid] = truncate_passage(files.document(docid, place), words)
            shown = [passages[docid] for docid in docids]
            ordered_by: OrderedBy = "grades" if scores is None else "scores"
            record = Record(f"{qid}-{i}", "", "", "", qid, docids, record_grades, scores, ordered_by)
            made.append((place, make_record(record, query, shown, best_first, options, place)))
        return made

    def _notes(self, item: Item, part: str, ranking: Ranking) -> list[Made]:
        if not ranking.disagreement:
            return []
        return [(item.place, Noted(f"queries of {self._name(part)} {DISAGREEMENTS[ranking.disagreement]}"))]

    def _import(self, database: sqlite3.Connection) -> None:
        """Read all files; raise SourceError if two of them that should share ids share none."""
        for part in ("queries", "docs"):
            source_of(part, getattr(self.options, part), self._source("run"))
        first: dict[str, tuple[str, str]] = {}  # the first query id and the first document id of each
        first["queries"] = (self._import_queries(database), "")
        first["run"] = self._import_lines(database, "run")
        run, queries = (self._name("run"), first["run"]), (self._name("queries"), first["queries"])
        if database.execute("SELECT 1 FROM run LIMIT 1").fetchone() is None:
            raise nothing_shared("query", (run[0], run[1][0]), (queries[0], queries[1][0]))
        database.execute("CREATE INDEX run_query ON run (query, docid)")
        for part in ("teacher", "judgments"):
            if getattr(self.options, _ROLES[part]) is not None:
                first[part] = self._import_lines(database, part)
                database.execute(f"CREATE INDEX {part}_query ON {part} (query)")
                other = (self._name(part), first[part])
                if database.execute(f"SELECT 1 FROM {part} LIMIT 1").fetchone() is None:
                    raise nothing_shared("query", (other[0], other[1][0]), (queries[0], queries[1][0]))
                shared = f"SELECT 1 FROM {part} AS a JOIN run AS b ON a.query = b.query AND a.docid = b.docid LIMIT 1"
                if database.execute(shared).fetchone() is None:
                    raise nothing_shared("document", (other[0], other[1][1]), (run[0], run[1][1]))
        database.execute("INSERT INTO wanted SELECT DISTINCT docid FROM run")
        example = self._import_documents(database)
        if database.execute("SELECT 1 FROM docs LIMIT 1").fetchone() is None:
            raise nothing_shared("document", (run[0], run[1][1]), (self._name("docs"), example))

    def _import_queries(self, database: sqlite3.Connection) -> str:
        insert = (
            "INSERT INTO queries (qid, text, place, problem) VALUES (?, ?, ?, '') ON CONFLICT (qid) DO UPDATE "
            "SET problem = excluded.place WHERE text <> excluded.text AND problem = ''"
        )
        example = ""
        for query in read_part(self._source("queries"), "queries"):
            example = example or query.qid
            database.execute(insert, (query.qid, query.text, query.place))
        return example

    def _import_lines(self, database: sqlite3.Connection, part: str) -> tuple[str, str]:
        """Store the lines whose query has a text; store the run's other queries without text, to be counted."""
        example: tuple[str, str] = ("", "")
        qid, number = None, None
        source: Iterator[RunLine | Judgment | Permutation] = read_part(self._source(part), part)  # type: ignore[arg-type]
        while batch := list(islice(source, _BATCH_ROWS)):
            rows: list[tuple[Any, ...]] = []
            for line in batch:
                if isinstance(line, Permutation):
                    rows += self._permuted(database, line)
                    continue
                example = example if example[0] else (line.qid, line.docid)
                if line.qid != qid:
                    qid, number = line.qid, _query_number(database, line.qid, add=part == "run")
                if number is not None:
                    rows.append((number, *line[:1], *line[2:]))
            marks = ", ".join("?" * (4 if part == "judgments" else 5))
            database.executemany(f"INSERT INTO {part} VALUES ({marks})", rows)
        return example

    def _permuted(self, database: sqlite3.Connection, line: Permutation) -> list[tuple[Any, ...]]:
        """Rows of a teacher's order that is given by positions in the run's list with the same number."""
        database.execute("CREATE INDEX IF NOT EXISTS run_line ON run (line)")
        listed = database.execute("SELECT query, docid FROM run WHERE line = ? ORDER BY rank", (line.line,)).fetchall()
        if len(listed) < 2:
            name, run = self._name("teacher"), self._name("run")
            raise SourceError(
                f"{name}: permutation {line.line} is for list {line.line} of {run}, which has no such list. Name the "
                "run whose lists were permuted, with one list per entry."
            )
        chosen = [listed[position] for position in line.positions if 0 <= position < len(listed)]
        return [(query, line.line, docid, rank, -rank) for rank, (query, docid) in enumerate(chosen, start=1)]

    def _import_documents(self, database: sqlite3.Connection) -> str:
        """Store the documents of the run; return the id of the first document of the file."""
        example = ""
        documents = read_part(self._source("docs"), "docs")
        while batch := list(islice(documents, _BATCH_ROWS)):
            example = example or batch[0].docid
            database.executemany(_INSERT_DOCUMENT, [document._asdict() for document in batch])
        return example

    def _source(self, part: str) -> str:
        """The source of a part; a run whose layout holds queries and documents is their source, too."""
        return str(getattr(self.options, _ROLES[part]) or self.options.run)

    def _name(self, part: str) -> str:
        return Path(self._source(part)).name

    @property
    def _drops_irrelevant(self) -> bool:
        if self.options.require_relevant is None:
            return self.options.judgments is not None and self.options.teacher_run is None
        return self.options.require_relevant


class _Files:
    """The database of a prepared source, open for reading."""

    def __init__(self, source: TrecSource) -> None:
        assert source.database is not None, "call prepare() first"
        self.database = sqlite3.connect(f"{Path(source.database).as_uri()}?mode=ro&immutable=1", uri=True)
        self._source = source

    def close(self) -> None:
        self.database.close()

    def query(self, number: int, qid: str) -> str | None:
        row = self.database.execute("SELECT text, place, problem FROM queries WHERE number = ?", (number,)).fetchone()
        text, place, problem = row
        if problem:
            raise _record_error(repeated("query", qid, place, problem))
        return text if text is None else str(text)

    def ranking(self, table: str, number: int, qid: str) -> Ranking:
        """Candidates of a query in a run, best first."""
        lines = _run_lines(self.database, table, number, qid)
        try:
            return rank_candidates(lines, self._source._name(table), self._source.options.duplicates)
        except SourceError as error:
            raise _record_error(str(error)) from error

    def grades(self, number: int) -> dict[str, int]:
        grades: dict[str, int] = {}
        rows = self.database.execute("SELECT docid, grade, line FROM judgments WHERE query = ?", (number,))
        for docid, grade, line in rows:
            if grades.setdefault(docid, grade) != grade:
                reason = f"document {docid!r} has grade {grade} here and {grades[docid]} before. Remove one."
                raise RecordError(f"{self._source._name('judgments')}:line {line}", None, reason)
        return grades

    def document(self, docid: str, place: str) -> str:
        row = self.database.execute("SELECT text, place, problem FROM docs WHERE docid = ?", (docid,)).fetchone()
        name = self._source._name("docs")
        if row is None:
            reason = f"document {docid!r} of the run is not in {name}. Add it, or remove it from the run."
            raise RecordError(place, None, reason)
        text, found, problem = row
        if problem.startswith(f"{name}:") and text:
            raise RecordError(place, None, repeated("document", docid, found, problem))
        if problem:
            raise RecordError(place, None, f"document {docid!r} of {name}: {problem}")
        return str(text)


def _finite(score: float | None) -> float | None:
    return None if score is None else max(-_MAX_SCORE, min(_MAX_SCORE, score))


def _query_number(database: sqlite3.Connection, qid: str, *, add: bool) -> int | None:
    """Number of a query that has a text; one without is added, to be counted, if `add`."""
    row = database.execute("SELECT number, text FROM queries WHERE qid = ?", (qid,)).fetchone()
    if row is None and add:
        database.execute("INSERT INTO queries (qid, problem) VALUES (?, '')", (qid,))
    return None if row is None or row[1] is None else int(row[0])


def _run_lines(database: sqlite3.Connection, table: str, number: int, qid: str) -> list[RunLine]:
    rows = database.execute(f"SELECT line, docid, rank, score FROM {table} WHERE query = ?", (number,))
    return [RunLine(line, qid, docid, rank, score) for line, docid, rank, score in rows]


def _record_error(text: str) -> RecordError:
    place, _, reason = text.partition(": ")
    return RecordError(place, None, reason)


def _described(source: str, role: str) -> dict[str, Any]:
    """What identifies a source on any machine."""
    if source.startswith(IRDS):
        return {"name": source}
    return describe_file(file_of(source, {"teacher_run": "teacher"}.get(role, role)))  # type: ignore[arg-type]
