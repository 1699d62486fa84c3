"""Every layout is read from a sample, by content and under any name; what is not read is named for what it is."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstd
from support.source_samples import SAMPLES, Sample, page

from rankllm_composer.errors import RecordError, SourceError
from rankllm_composer.options import SourceOptions
from rankllm_composer.prompts.permutations import parse_permutation
from rankllm_composer.prompts.record import Record
from rankllm_composer.sources.conversations import open_conversations
from rankllm_composer.sources.files import read_rows
from rankllm_composer.sources.layouts import LAYOUTS, layout_of
from rankllm_composer.sources.lists import NUMBERED
from rankllm_composer.sources.look import look
from rankllm_composer.sources.records import Noted, read_records
from rankllm_composer.sources.retrieval_files import (
    load_documents,
    load_judgments,
    load_queries,
    load_run,
    rank_candidates,
    read_part,
)

PAGE = Path(__file__).parents[2] / "docs" / "what-it-reads.md"


@pytest.fixture
def write(tmp_path):
    def write_sample(sample: Sample, name: str | None = None) -> Path:
        path = tmp_path / (name or sample.name)
        path.write_bytes(sample.content if isinstance(sample.content, bytes) else sample.content.encode())
        return path

    return write_sample


def records_of(path: Path, **options) -> list[Record]:
    return [record for _, record in read_records(open_conversations(SourceOptions(input=str(path), **options)))]


def read(path: Path, part: str):
    """What is read for a part, as the samples state it."""
    if part == "queries":
        return load_queries(path)
    if part == "docs":
        return load_documents(path, {"d1", "d2"})
    if part == "judgments":
        return load_judgments(path)
    if part == "run":
        return load_run(path)
    if part == "teacher":
        lines = list(read_part(path, "teacher"))
        if not hasattr(lines[0], "qid"):
            return [tuple(line) for line in lines]
        return {lines[0].qid: rank_candidates(lines, path.name).docids}
    found = []
    for record in records_of(path):
        if record.grades is None:
            found.append((record.id, record.response))
        else:
            best = parse_permutation(record.response, 2)[0]
            assert record.grades[best] == 1
            found.append((record.id, dict(zip(record.turn.passages, record.grades))))
    return found


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.title)
def test_each_layout_is_read_whatever_the_file_is_called(sample, write):
    for part, expected in sample.expected.items():
        assert read(write(sample), part) == expected, part
        if part != "records":  # whose place names the file
            assert read(write(sample, "a.bin"), part) == expected, part


def test_the_page_lists_what_the_samples_show(write):
    text = page(write)
    how = "Write it with python tests/support/source_samples.py > docs/what-it-reads.md."
    assert PAGE.read_text(encoding="utf-8") == text, how
    shown = [layout_of(next(read_rows(write(sample))), part) for sample in SAMPLES for part in sample.expected]
    assert {layout.name for layout in shown} == {layout.name for layout in LAYOUTS if layout.readers}


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress])
def test_compression_is_recognized_by_content(compress, tmp_path):
    (tmp_path / "a.tsv").write_bytes(compress(b"1\tsea birds\n") + compress(b"2\told maps\n"))
    assert load_queries(tmp_path / "a.tsv") == {"1": "sea birds", "2": "old maps"}


NOT_READ = {
    "a preference pair": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "found preference pairs, which are not read",
    ),
    "turns with a rejected answer": ({"messages": [], "rejected_response": "b"}, "found preference pairs"),
    "vectors": ({"id": "1", "vector": [0.5]}, "found vectors, which are not read"),
    "a request of OpenAI": ({"custom_id": "a", "body": {"messages": []}}, "requests of OpenAI's batch API"),
    "a topic of CAsT": ({"number": 31, "turn": [{"number": 1}]}, "found conversational topics with turns"),
    "an unknown object": ({"a": 1, "b": 2}, "found an object with the keys 'a', 'b'; expected training records"),
    "a run": (
        "1 Q0 d1 1 9.5 t",
        "found a TREC run, read as a first-stage run and a teacher's order; expected training",
    ),
    "candidates": (
        {"query": {"text": "a", "qid": "1"}, "candidates": []},
        "found queries with their candidates (an object with the keys 'query', 'candidates'), read as a first-stage",
    ),
    "a list under other names": (
        {"question": "a", "docs": ["b", "c"], "ranking": [2, 1]},
        "(an object with the keys 'question', 'docs', 'ranking'), read as queries; expected training records in a "
        "layout of docs/what-it-reads.md. Write the keys query, passages and ranking, scores or grades, or convert",
    ),
    "a record with earlier turns": (
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        "the record has a history of further turns",
    ),
    "a csv": ("id,text", "found the text 'id,text', perhaps with columns separated by commas"),
    "a prompt with its template": (
        {"query": {"qid": "1"}, "invocations_history": [{"prompt": "<s>[INST]", "response": "[A]"}]},
        "invocation 0 has a prompt that is one text, with a chat template in it",
    ),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_what_is_not_read_is_named(case, tmp_path):
    value, message = NOT_READ[case]
    (tmp_path / "f.jsonl").write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(RecordError) as caught:
        records_of(tmp_path / "f.jsonl")
    assert message in str(caught.value)
    assert str(caught.value).startswith("f.jsonl:record 0")


def test_lines_of_a_table_must_have_its_columns_and_blocks_must_end(tmp_path):
    for content, message in (
        ("query-id\tcorpus-id\tscore\n1\td1\n", "f:line 2: '1\\td1' has 2 columns; expected 3: query-id, corpus-id"),
        ("<top>\n<num> 1\n<title> a\n", "f:line 1: the block that starts here has no end"),
        ("<html>\n", "the file has tags but no block <top>"),
    ):
        (tmp_path / "f").write_text(content)
        with pytest.raises(SourceError) as caught:
            load_judgments(tmp_path / "f")
        assert message in str(caught.value)


ODD = {
    "tabs around ids with spaces": (load_run, "1\tQ0\td 1\t1\t5.0\tt t\n", {"1": ["d 1"]}),
    "a run with a header": (load_run, "qid\tQ0\tdocid\trank\tscore\trun\n1\tQ0\td\t1\t5\tx\n", {"1": ["d"]}),
    "a byte order mark and CRLF": (load_queries, "\ufeff1\ta b\r\n2\tc\r\n", {"1": "a b", "2": "c"}),
    "a byte order mark before JSON": (load_queries, '\ufeff{"qid": 1.0, "text": "a"}\r\n', {"1": "a"}),
    "a query like a judgment": (load_queries, "301\tsales in 2019\n", {"301": "sales in 2019"}),
    "mixed separators": (load_judgments, "1 0\td1  1.0\n1\t0 d2 -1\n", {"1": {"d1": 1, "d2": -1}}),
    "ids of the candidates alone": (
        load_run,
        json.dumps([{"query": "a", "hits": [{"content": "x", "qid": 7, "docid": 1, "score": 3}]}]),
        {"7": ["1"]},
    ),
    "a list with judgments": (
        load_judgments,
        json.dumps({"qid": "x", "query": "q", "top1000": [{"docid": "d", "text": "t"}], "qrels": {"d": 2}}),
        {"x": {"d": 2}},
    ),
    "one text for one id twice": (load_queries, "1\ta\n1\ta\n", {"1": "a"}),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_files_are_read(case, tmp_path):
    load, content, expected = ODD[case]
    (tmp_path / "f").write_text(content, encoding="utf-8", newline="")
    assert load(tmp_path / "f") == expected


def test_queries_with_images_are_not_read_for_their_text_alone(tmp_path):
    row = {"qid": "8:1", "query_txt": "the same in red", "query_img_path": None}
    (tmp_path / "f").write_text(json.dumps(row))
    assert load_queries(tmp_path / "f") == {"8:1": "the same in red"}
    (tmp_path / "f").write_text(json.dumps(row | {"query_img_path": "a.jpg"}))
    with pytest.raises(SourceError, match="found queries with images, which are not read"):
        load_queries(tmp_path / "f")


def test_records_without_an_id_are_numbered_and_counted(tmp_path, write):
    (sample,) = (sample for sample in SAMPLES if sample.name == "messages.jsonl")
    path = write(sample)
    path.write_text(path.read_text() * 2)
    source = open_conversations(SourceOptions(input=str(path)))
    made = [entry for item in source.items() for _, entry in source.records(item)]
    assert [entry.id for entry in made if isinstance(entry, Record)] == ["0", "1"]
    assert made.count(Noted(NUMBERED)) == 2


def test_graded_passages_are_shuffled_cut_to_the_window_and_follow_the_scores(tmp_path):
    row = {"id": "q", "query": "sea birds", "pos": ["p0", "p1"], "neg": [f"n{i}" for i in range(9)]}
    scored = row | {"id": "s", "pos_scores": [1, 2], "neg_scores": list(range(3, 12))}
    alike = row | {"id": "n", "neg": [], "pos": ["p0", "p1"]} | {"neg": [""]}
    path = tmp_path / "flag.jsonl"
    path.write_text("\n".join(map(json.dumps, [row, scored])) + "\n")
    plain, by_score = records_of(path, window=6, identifiers="numbers")
    shown = plain.turn.passages
    assert sorted(shown) == ["n0", "n1", "n2", "n3", "p0", "p1"] and list(shown) != sorted(shown)
    assert plain.grades == tuple(int(text.startswith("p")) for text in shown)
    best = [shown[i] for i in parse_permutation(plain.response, 6, "numbers")]
    assert best == sorted(shown, key=lambda text: text.startswith("n"))  # equal grades keep their order
    ordered = [by_score.turn.passages[i] for i in parse_permutation(by_score.response, 6, "numbers")]
    assert ordered == ["n3", "n2", "n1", "n0", "p1", "p0"]
    assert records_of(path, window=6, identifiers="numbers") == [plain, by_score]
    path.write_text(json.dumps(alike))
    with pytest.raises(RecordError, match="a passage is empty"):
        records_of(path)


def test_one_bad_invocation_of_a_history_is_refused_alone(tmp_path, write):
    (sample,) = (sample for sample in SAMPLES if sample.name == "history.json")
    history = json.loads(sample.content)
    history[0]["invocations_history"][0]["response"] = "I cannot rank these."
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps(history[0]))
    source = open_conversations(SourceOptions(input=str(path)))
    assert [record.id for _, record in read_records(source, skip_bad=True)] == ["7-1"]
    with pytest.raises(RecordError, match=r"history.jsonl:record 0 \(line 1\) invocation 0: id '7-0': "):
        list(read_records(source))


def test_a_configuration_of_a_data_set_is_chosen_by_name(tmp_path, write):
    (sample,) = (sample for sample in SAMPLES if sample.name == "records.json")
    folder = tmp_path / "set"
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        text = sample.content.replace('"id": "1"', f'"id": "{name}"')
        (folder / name / "train.json").write_text(text)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/*\n- config_name: two\n  data_files: two/*\n---\n"
    )
    assert [record.id for record in records_of(folder, config="two")] == ["two"]
    with pytest.raises(RecordError, match=r"the configuration \(config\)"):
        records_of(folder)


def test_look_says_what_joins_and_shows_a_list(tmp_path, write):
    files = {sample.name: write(sample) for sample in SAMPLES}
    chosen = ("collection.tsv", "topics.tsv.gz", "qrels.txt", "bm25.trec", "swift.jsonl")
    text = "\n".join(look([str(files[name]) for name in chosen[:4]]))
    assert "bm25.trec: a TREC run (text), read for a first-stage run, a teacher's order" in text
    assert f"--docs {files['collection.tsv']}" in text and f"--queries {files['topics.tsv.gz']}" in text
    assert "a first-stage run and queries: 1 of 1 query ids match" in text
    assert "a first-stage run and documents: 2 of 2 document ids match" in text
    assert "  1. presented as 2 d1 (grade 1): gulls and terns" in text
    alone = "\n".join(look([str(files["swift.jsonl"])]))
    assert "read for training records" in alone and "(grade 1): gulls and terns" in alone
    (tmp_path / "other.tsv").write_text("x7\tanother\n")
    apart = "\n".join(look([str(files["bm25.trec"]), str(tmp_path / "other.tsv")]))
    assert "a first-stage run and queries: 0 of 1 query ids match ('1' and 'x7', for example)" in apart
    assert "no list is shown" in apart
    (tmp_path / "a.bin").write_bytes(b"PK\x03\x04")
    assert next(look([str(tmp_path / "a.bin")])).startswith("a.bin: not read: a.bin: the file is a zip archive")
