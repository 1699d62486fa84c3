"""One small sample of each layout that the sources read, with what must be read from it, and the page made of them.

`python tests/support/source_samples.py > docs/what-it-reads.md` writes the page.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn
from rankllm_composer.sources.files import read_rows
from rankllm_composer.sources.layouts import LAYOUTS, PARTS, layouts_of

USER = render_user_turn("sea birds", ["the mole", "gulls and terns"])
QUERIES = {"1": "sea birds", "2": "old maps"}
DOCS = {"d1": "gulls and terns", "d2": "the mole"}
RUN = {"1": ["d2", "d1"]}
GRADES = {"1": {"d1": 1, "d2": 0}}


class Sample(NamedTuple):
    """A file of a layout: its name in the page, its content, and by part what is read from it."""

    title: str
    name: str
    content: str | bytes
    expected: dict[str, Any]
    comment: str = ""


def _turns(*names: str, text: str = "value", role: str = "from") -> list[dict[str, str]]:
    texts = {"system": SYSTEM_MESSAGE, "human": USER, "user": USER, "gpt": "[B] > [A]", "assistant": "[B] > [A]"}
    return [{role: name, text: texts[name]} for name in names]


def _lines(*rows: Any) -> str:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def _openai(*names: str) -> list[dict[str, str]]:
    return _turns(*names, text="content", role="role")


CANDIDATES = [
    {"docid": "d2", "score": 2.5, "doc": {"contents": "the mole"}},
    {"docid": "d1", "score": 1.5, "doc": {"contents": "gulls and terns"}},
]
RECORD = [("1", "[B] > [A]")]
NUMBERED = [("0", "[B] > [A]")]
ONE_LIST = {"run": RUN, "queries": {"1": "sea birds"}, "docs": DOCS}
PASSAGE_OBJECTS = [{"docid": "d2", "text": "the mole"}, {"docid": "d1", "title": "", "text": "gulls and terns"}]
PASSAGES = {"pos": ["gulls and terns"], "neg": ["the mole"]}

SAMPLES = (
    Sample(
        "Training records in the published layout",
        "records.json",
        json.dumps([{"id": "1", "conversations": _turns("system", "human", "gpt")}]),
        {"records": RECORD},
    ),
    Sample(
        "A query with passages and their order: positions from 1, best first",
        "ranked.jsonl",
        _lines({"id": "1", "query": "sea birds", "passages": ["the mole", "gulls and terns"], "ranking": [2, 1]}),
        {"records": RECORD},
        "presented as they stand",
    ),
    Sample(
        "The same with docids, which a ranking may name, and titles",
        "ranked_docids.jsonl",
        _lines({"qid": "1", "query": "sea birds", "passages": PASSAGE_OBJECTS, "ranking": ["d1", "d2"]}),
        {"records": RECORD},
    ),
    Sample(
        "The same with scores, or with grades from 0; equal ones are tied, and null is not known",
        "scored.jsonl",
        _lines(
            {"query": "sea birds", "passages": ["the mole", "gulls and terns"], "scores": [-1.5, 7]},
            {"query": "sea birds", "passages": ["the mole", "gulls and terns"], "grades": [0, 1]},
        ),
        {"records": [("0", "[B] > [A]"), ("1", {"the mole": 0, "gulls and terns": 1})]},
    ),
    Sample(
        "OpenAI messages; records without an id are numbered",
        "messages.jsonl",
        _lines({"messages": _openai("system", "user", "assistant")}),
        {"records": NUMBERED},
    ),
    Sample(
        "A system text beside the turns, as LLaMA-Factory writes it, or none",
        "system.ndjson",
        _lines({"id": 1, "system": SYSTEM_MESSAGE, "conversations": _turns("human", "gpt")}),
        {"records": RECORD},
    ),
    Sample(
        "Conversations stored as JSON text",
        "text.JSONL",
        _lines({"id": "1", "conversations": json.dumps(_turns("system", "human", "gpt"))}),
        {"records": RECORD},
    ),
    Sample(
        "Instructions, as in Alpaca",
        "alpaca.json",
        json.dumps([{"id": "1", "system": SYSTEM_MESSAGE, "instruction": USER, "input": "", "output": "[B] > [A]"}]),
        {"records": RECORD},
    ),
    Sample(
        "Prompts with completions, as in TRL",
        "trl.jsonl",
        _lines({"id": "1", "prompt": _openai("system", "user"), "completion": _openai("assistant")}),
        {"records": RECORD},
    ),
    Sample(
        "A history of rank_llm's invocations",
        "history.json",
        json.dumps(
            [
                {
                    "query": {"text": "sea birds", "qid": "7"},
                    "invocations_history": [
                        {"prompt": _openai("system", "user"), "response": "[B] > [A]", "input_token_count": 9},
                        {"prompt": _openai("user"), "response": "[A] > [B]", "input_token_count": 9},
                    ],
                }
            ],
            indent=2,
        ),
        {"records": [("7-0", "[B] > [A]"), ("7-1", "[A] > [B]")]},
        "one record per invocation",
    ),
    Sample(
        "FlagEmbedding: positives and negatives, with scores of a teacher or without",
        "flag.jsonl",
        _lines({"query": "sea birds", **PASSAGES, "pos_scores": [9.5], "neg_scores": [1]}),
        {"records": [("0", {"gulls and terns": 1, "the mole": 0})]},
        "presented in random order; grades 1 and 0; ordered by the scores, else by grade",
    ),
    Sample(
        "Tevatron",
        "tevatron.jsonl",
        _lines(
            {
                "query_id": "1",
                "query": "sea birds",
                "positive_passages": [{"docid": "d1", "title": "", "text": "gulls and terns"}],
                "negative_passages": [{"docid": "d2", "title": "", "text": "the mole"}],
            }
        ),
        {"records": [("1", {"gulls and terns": 1, "the mole": 0})]},
    ),
    Sample(
        "ms-swift",
        "swift.jsonl",
        _lines(
            {
                "messages": [{"role": "user", "content": "sea birds"}],
                "positive_messages": [[{"role": "assistant", "content": "gulls and terns"}]],
                "negative_messages": [[{"role": "assistant", "content": "the mole"}]],
            }
        ),
        {"records": [("0", {"gulls and terns": 1, "the mole": 0})]},
    ),
    Sample(
        "Requests and results of rank_llm",
        "requests.jsonl",
        _lines({"query": {"text": "sea birds", "qid": 1}, "candidates": CANDIDATES}),
        ONE_LIST | {"teacher": RUN},
        "first stage, queries and documents in one file; in the order of the list",
    ),
    Sample(
        "Candidates of RankGPT",
        "rankgpt.jsonl",
        _lines(
            {
                "query": "sea birds",
                "positive_passages": [{"docid": "d1", "text": "gulls and terns"}],
                "retrieved_passages": [{"docid": "d2", "text": "the mole"}, {"docid": "d1", "text": "gulls and terns"}],
            }
        ),
        {"run": {"0": ["d2", "d1"]}, "queries": {"0": "sea birds"}, "docs": DOCS, "judgments": {"0": {"d1": 1}}},
    ),
    Sample("Permutations of RankGPT", "permutations.json", json.dumps(["[2] > [1]"]), {"teacher": [(1, (1, 0))]}),
    Sample(
        "Lists of ReasonRank and fullrank",
        "fullrank.jsonl",
        _lines({"qid": "1", "initial_list": ["d2", "d1"], "final_list": ["d1", "d2"], "relevant_docids": ["d1"]}),
        {"run": RUN, "teacher": {"1": ["d1", "d2"]}, "judgments": {"1": {"d1": 1}}},
    ),
    Sample("TREC run", "bm25.trec", "1 Q0 d2 1 9.5 bm25\n1 Q0 d1 2 7.25 bm25\n", {"run": RUN, "teacher": RUN}),
    Sample("Run with three columns, as in MS MARCO", "run.tsv", "1\td1\t2\n1\td2\t1\n", {"run": RUN}),
    Sample("Run of pytrec_eval", "run.json", json.dumps({"1": {"d1": 7.25, "d2": 9.5}}), {"run": RUN}),
    Sample("TREC judgments", "qrels.txt", "1 0 d1 1\n1 0 d2 0\n", {"judgments": GRADES}),
    Sample(
        "Judgments of MIRACL, CIRAL and MS MARCO",
        "qrels.miracl.tsv",
        "1\tQ0\td1\t1\n1\tQ0\td2\t0\n",
        {"judgments": GRADES},
    ),
    Sample(
        "Judgments of BEIR", "test.tsv", "query-id\tcorpus-id\tscore\n1\td1\t1.0\n1\td2\t0\n", {"judgments": GRADES}
    ),
    Sample(
        "Judgments as rows of a data set",
        "qrels.jsonl",
        _lines({"qid": 1, "docid": "d1", "relevance": 1.0}, {"qid": 1, "docid": "d2", "relevance": 0}),
        {"judgments": GRADES},
    ),
    Sample("Judgments of pytrec_eval", "qrels.json", json.dumps(GRADES), {"judgments": GRADES}),
    Sample("Topics with tabs", "topics.tsv.gz", gzip.compress(b"1\tsea birds\n2\told maps\n"), {"queries": QUERIES}),
    Sample(
        "Queries of this package",
        "queries.jsonl",
        _lines({"qid": 1, "text": "sea birds"}, {"qid": "2", "text": "old maps"}),
        {"queries": QUERIES},
    ),
    Sample(
        "Queries of BEIR",
        "beir.jsonl",
        _lines({"_id": "1", "text": "sea birds"}, {"_id": "2", "text": "old maps", "metadata": {}}),
        {"queries": QUERIES},
    ),
    Sample(
        "Topics of Anserini",
        "anserini.jsonl",
        _lines({"qid": "1", "query": "sea birds"}, {"qid": "2", "query": "old maps"}),
        {"queries": QUERIES},
    ),
    Sample(
        "Topics with titles or contents",
        "titles.jsonl",
        _lines({"id": "1", "title": "sea birds"}, {"id": 2, "contents": "old maps"}),
        {"queries": QUERIES},
    ),
    Sample(
        "Topics of pyserini", "topics.json", json.dumps({"1": {"title": "sea birds"}}), {"queries": {"1": "sea birds"}}
    ),
    Sample(
        "TREC topics",
        "topics.trec",
        "<top>\n<num> Number: 1\n<title> sea birds\n<desc> Description:\nwhich\n</top>\n\n"
        "<top>\n<num> Number: 2 </num>\n<title>\nold maps\n</title>\n</top>\n",
        {"queries": QUERIES},
    ),
    Sample(
        "TREC topics in XML",
        "topics.xml",
        '<topics>\n<topic number="1">\n<query>sea birds</query>\n<question>which?</question>\n</topic>\n'
        '<topic number="2">\n<query>old maps</query>\n</topic>\n</topics>\n',
        {"queries": QUERIES},
    ),
    Sample(
        "Topics with colons, as in the efficiency track", "topics.05", "1:sea birds\n2:old maps\n", {"queries": QUERIES}
    ),
    Sample(
        "Topics of TREC CAR",
        "topics.car",
        "enwiki:Birds/Sea%20birds\n",
        {"queries": {"enwiki:Birds/Sea%20birds": "Birds Sea birds"}},
    ),
    Sample(
        "Questions of DPR",
        "dpr.jsonl",
        _lines({"question": "sea birds", "answer": ["gull"]}),
        {"queries": {"0": "sea birds"}},
    ),
    Sample(
        "Documents of this package",
        "docs.jsonl",
        _lines({"docid": "d1", "text": "gulls and terns"}, {"docid": "d2", "title": "", "text": "the mole"}),
        {"docs": DOCS},
        "text under text, segment, contents, content, body or passage, and a title",
    ),
    Sample(
        "Documents of BEIR and of Anserini",
        "corpus.jsonl",
        _lines({"_id": "d1", "title": "", "text": "gulls and terns"}, {"id": "d2", "contents": "the mole"}),
        {"docs": DOCS},
    ),
    Sample(
        "Collection with tabs, as in MS MARCO", "collection.tsv", "d1\tgulls and terns\nd2\tthe mole\n", {"docs": DOCS}
    ),
    Sample(
        "TREC documents",
        "docs.sgml",
        "<DOC>\n<DOCNO> d1 </DOCNO>\n<TEXT>\ngulls <b>and</b> terns\n</TEXT>\n</DOC>\n"
        "<DOC>\n<DOCNO>d2</DOCNO>\nthe mole\n</DOC>\n",
        {"docs": DOCS},
    ),
)


def page(write: Callable[[Sample], Path]) -> str:
    """The page of docs/ that lists what is read; `write` writes the file of a sample."""
    rows = []
    for sample in SAMPLES:
        row = next(read_rows(write(sample)))
        parts = dict.fromkeys(part for layout in layouts_of(row.value) for part in layout.readers)
        shown = _first_line(sample.content)
        comment = f"; {sample.comment}" if sample.comment else ""
        rows.append(f"| {sample.title} | `{shown}` | {', '.join(PARTS[part] for part in parts)}{comment} |")
    refused = [f"- {layout.name}" for layout in LAYOUTS if not layout.readers]
    return _TEMPLATE.format(rows="\n".join(rows), refused="\n".join(refused))


def _first_line(content: str | bytes) -> str:
    text = gzip.decompress(content).decode() if isinstance(content, bytes) else content
    for turn in (SYSTEM_MESSAGE, USER):
        text = text.replace(json.dumps(turn)[1:-1], "…").replace(json.dumps(json.dumps(turn)[1:-1])[1:-1], "…")
    shown = " ".join(text.split()) if text.startswith(("<", "[\n")) else text.splitlines()[0]
    shown = shown.replace("\t", " → ").replace("|", "\\|")
    return shown if len(shown) <= 150 else f"{shown[:149]}…"


_TEMPLATE = """# What it reads

`shards build` and `rerank` read the same layouts, recognized by their content and never by the name of the file. A
file is JSON Lines, a JSON array, Parquet, lines of text, a table whose first line names its columns, or tagged
blocks; it may be compressed with gzip or zstd. Queries, documents and judgments can also be a folder in BEIR's layout
(`queries.jsonl`, `corpus.jsonl`, `qrels/test.tsv`) or `irds:ID`, a data set of the package ir_datasets, which can
hold a run as well. `--input` also takes the id of a Hugging Face data set (with `--split` and `--config`) or a folder
with one.

`rankllm-composer sources look FILE...` prints what files are taken for, how many of their ids match, and one list.

Runs are ordered as trec_eval orders them: by score (in 32 bits), equal scores by document id, both descending. Where
the rank column disagrees, the number of queries is printed. Ids may be text or whole numbers, ranks and grades may be
written `1.0`. In the examples, → stands for a tab, and … for texts that are left out.

| layout | first row | read for |
|---|---|---|
{rows}

Recognized, but not read:

{refused}
"""


if __name__ == "__main__":
    import tempfile

    def _write(sample: Sample) -> Path:
        path = Path(tempfile.mkdtemp()) / sample.name
        path.write_bytes(sample.content if isinstance(sample.content, bytes) else sample.content.encode())
        return path

    print(page(_write), end="")
