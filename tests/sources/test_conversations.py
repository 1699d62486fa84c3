"""Conversations: every kind of file gives the same records, one at a time; a bad one is reported by place and id."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
import zstd
from hypothesis import given
from hypothesis import strategies as st
from support.synthetic_records import conversation, write_jsonl

from rankllm_composer.errors import PromptError, RecordError
from rankllm_composer.options import SourceOptions
from rankllm_composer.prompts.permutations import parse_answer
from rankllm_composer.prompts.record import Record, augment_record, validate_record
from rankllm_composer.prompts.windows import record_window
from rankllm_composer.shards.manifest import BuildStats
from rankllm_composer.sources.conversations import open_conversations
from rankllm_composer.sources.records import open_source, read_records

HUMAN = conversation(3)["conversations"][1]["value"]


def read(path: Path) -> Iterator[tuple[str, Record]]:
    return read_records(open_conversations(SourceOptions(input=str(path))))


def write(folder: Path, ending: str, records: list[object]) -> Path:
    path = folder / f"train{ending}"
    if ending == "folder":
        path.mkdir()
        write_jsonl(path / "train.jsonl", records)
        return path
    plain = ending.removesuffix(".gz")
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return path
    text = json.dumps(records, indent=1) if plain == ".json" else "\n".join(map(json.dumps, records)) + "\n\n"
    compress = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(text.encode()))
    return path


@pytest.mark.parametrize(
    "ending",
    [".json", ".jsonl", ".json.gz", ".jsonl.gz", ".JSONL", ".ndjson", ".jsonl.zst", ".parquet", ".txt", "folder"],
)
def test_every_kind_of_file_gives_the_same_records(tmp_path, ending):
    layouts = [conversation(i, num_candidates=2 + i) for i in range(4)]
    found = list(read(write(tmp_path, ending, layouts)))
    assert [record for _, record in found] == [Record.from_conversations(layout) for layout in layouts]
    place = found[2][0]
    assert place.startswith({"folder": "trainfolder[train]"}.get(ending, f"train{ending}") + ":record 2")
    assert ("(line 3)" in place) == (ending not in (".json", ".json.gz", ".parquet", "folder"))


def test_golden_records_are_valid(golden):
    assert [len(validate_record(record).passages) for _, record in read(golden / "records.json")] == [
        record["conversations"][2]["value"].count("[") for record in json.loads((golden / "records.json").read_text())
    ]


def test_docids_and_grades_are_kept(tmp_path):
    layout = conversation(0, num_candidates=3, qid="7", docids=["a", "b", "c"], grades=[0, 2, 1])
    (_, record), *_ = read(write_jsonl(tmp_path / "a.jsonl", [layout]))
    assert (record.qid, record.docids, record.grades) == ("7", ("a", "b", "c"), (0, 2, 1))


# Nonstandard prompts: the replacement that turns the client's prompt into them.
NONSTANDARD = {
    "blank lines": ("\n", "\n\n"),
    "other last words": ("Answer concisely and directly and only respond", "Only respond"),
    "another example": ("e.g., [B] > [A]", "e.g., [D] > [B]"),
    "another kind in words": ("an alphabetical identifier", "number identifier"),
    "no full stops": (" number 3.", " number 3"),
    "several readings": ("\n[B] ", "\nfirst line\n[B] second line\n[B] "),
}


@pytest.mark.parametrize("wording", NONSTANDARD)
def test_a_nonstandard_prompt_is_kept_but_not_augmented(tmp_path, wording):
    human = HUMAN.replace(*NONSTANDARD[wording])
    assert human != HUMAN
    ((_, record),) = read(write_jsonl(tmp_path / "a.jsonl", [conversation(3, human=human)]))
    assert record.user == human
    turn = validate_record(record)
    assert (turn.query, turn.style, len(turn.passages)) == ("where is oar number 3", "letters", 4)
    for shuffle, style in ((True, None), (False, "numbers")):
        with pytest.raises(PromptError, match="cannot be shuffled or renamed"):
            augment_record(record, seed=1, epoch=0, shuffle_passages=shuffle, identifiers=style)
    with pytest.raises(PromptError):
        record_window(record, None, order=[1, 0, 2, 3])


def test_several_readings_are_no_other_wording(tmp_path):
    """The client's own words, with a line in a passage that opens like the next one: counted as that."""
    human = HUMAN.replace(*NONSTANDARD["several readings"])
    source = open_source(SourceOptions(input=str(write_jsonl(tmp_path / "a.jsonl", [conversation(3, human=human)]))))
    (noted, (_, record)) = [made for item in source.items() for made in source.records(item)]
    assert noted[1].what.startswith("prompts in the client's words with several readings")
    stats = BuildStats()
    stats.count_record(record)
    assert stats.num_nonstandard_prompts == 0 and record.turn.has_several_readings
    assert not record.has_standard_prompt
    (_, other), *_ = read(write_jsonl(tmp_path / "b.jsonl", [conversation(3, human=HUMAN.replace("\n", "\n\n"))]))
    assert not other.turn.has_several_readings


WHITE_SPACE = ["[B] > [A] > [D] > [C]\n", " [B] > [A] > [D] > [C]", "[B]>[A]>[D]>[C]", "[ B ]\t>\n[A]  > [D]>[C]\r\n"]
# Answer of record 3, which has 4 passages → (what the client reads, what is counted).
LENIENT = {
    "Sure! Here it is: [B] > [A] > [D] > [C]": ("BADC", "other text"),
    "<think>[C] is best</think>\n[B] > [A] > [D] > [C]": ("BADC", "a thought before them"),
    "[B] > [B] > [A] > [D] > [C]": ("BADC", "with a repeated identifier"),
    "[D] > [B]": ("DBAC", "omit candidates"),
    "B > A > D > C": ("BADC", "other text"),
    "[B] > [A] > [D] > [C] > [E]": ("BADC", "other text"),
}


def answer_of(path, answers="strict"):
    """(response, names of what is counted) of the one record of a file."""
    source = open_source(SourceOptions(input=str(path), answers=answers))
    *noted, (_, record) = [made for item in source.items() for made in source.records(item)]
    return record.response, [note.what for _, note in noted]


@pytest.mark.parametrize("answers", ["strict", "lenient"])
@pytest.mark.parametrize("answer", WHITE_SPACE)
def test_harmless_white_space_in_an_answer_is_normalized_and_counted(tmp_path, answer, answers):
    path = write_jsonl(tmp_path / "a.jsonl", [conversation(3, gpt=answer)])
    assert answer_of(path, answers) == (
        "[B] > [A] > [D] > [C]",
        ["answers with other white space, which is normalized"],
    )


@pytest.mark.parametrize("answer", LENIENT)
def test_lenient_answers_are_read_as_the_client_does(tmp_path, answer):
    expected, counted = LENIENT[answer]
    path = write_jsonl(tmp_path / "a.jsonl", [conversation(3, gpt=answer)])
    with pytest.raises(RecordError, match=r"--answers lenient reads it"):
        answer_of(path)
    response, (noted,) = answer_of(path, "lenient")
    assert response == " > ".join(f"[{name}]" for name in expected) and counted in noted
    read_by_client = parse_answer(answer, 4).permutation
    assert "".join("ABCD"[i] for i in read_by_client) == expected
    describe = open_source(SourceOptions(input=str(path), answers="lenient")).describe()
    assert describe["options"]["answers"] == "lenient"


def test_numbers_before_the_answer_are_read_as_the_client_does(tmp_path):
    human = HUMAN.replace("an alphabetical", "a numerical").replace("[B] > [A]", "[2] > [1]")
    for i, name in enumerate("ABCD", start=1):
        human = human.replace(f"\n[{name}] ", f"\n[{i}] ")
    path = write_jsonl(tmp_path / "a.jsonl", [conversation(3, human=human, gpt="1. [1] > [2]")])
    response, noted = answer_of(path, "lenient")
    assert response == "[1] > [2] > [3] > [4]" and [what.split(",")[0] for what in noted] == [
        "answers with a repeated identifier",
        "answers that omit candidates",
    ]


@pytest.mark.parametrize("answer", ["I cannot rank these.", "[]", "[2] > [1] > [4] > [3]"])
def test_an_answer_that_names_no_candidate_is_refused_by_both(tmp_path, answer):
    path = write_jsonl(tmp_path / "a.jsonl", [conversation(3, gpt=answer)])
    for answers in ("strict", "lenient"):
        with pytest.raises(RecordError) as failure:
            answer_of(path, answers)
        assert "--answers lenient reads it" not in str(failure.value)


# Fault → (record, part of the error). Record 3 has 4 passages.
BAD_RECORDS = {
    "a permutation that repeats": (conversation(3, gpt="[B] > [A] > [B] > [D]"), "repeated: 'B'"),
    "a permutation that misses": (conversation(3, gpt="[B] > [A] > [D]"), "missing: 'C'"),
    "a permutation that exceeds": (conversation(3, gpt="[B] > [A] > [D] > [C] > [E]"), "beyond the list: 'E'"),
    "a permutation in numbers": (conversation(3, gpt="[2] > [1] > [4] > [3]"), "unknown"),
    "a permutation with words": (conversation(3, gpt="Sure: [B] > [A] > [D] > [C]"), "nothing else"),
    "no permutation": (conversation(3, gpt=""), "response is empty"),
    "letters beyond Z": (conversation(3, human=HUMAN.replace("with 4 passages", "with 27 passages")), "1 to 26"),
    "another number of passages": (conversation(3, human=HUMAN.replace("with 4", "with 5")), "user turn"),
    "identifiers out of order": (conversation(3, human=HUMAN.replace("\n[B] ", "\n[C] ", 1)), "user turn"),
    "one passage": (conversation(3, num_candidates=1, gpt="[A]"), "1 passage; expected 2 or more"),
    "a missing turn": (conversation(3) | {"conversations": conversation(3)["conversations"][:2]}, "exactly three"),
    "no turns": ({"id": "q3"}, "an object with the keys 'id'; expected training records"),
    "an empty query": (conversation(3, human=HUMAN.replace("where is oar number 3", "")), "query is empty"),
    "another template": (conversation(3, human="Rank these."), "user turn"),
    "an empty user turn": (conversation(3, human="  "), "user turn is empty"),
    "a turn that is no text": (conversation(3, gpt=["B", "A"]), "gpt turn"),
    "a number for a record": (17, "the JSON value '17'; expected training records"),
    "turns in another order": (
        conversation(3) | {"conversations": conversation(3)["conversations"][::-1]},
        "gpt, human",
    ),
    "an empty id": (conversation(3, id=" "), "id is empty"),
    "half a surrogate pair": (conversation(3, human=HUMAN + "\ud800"), "surrogate"),
    "docids of another length": (conversation(3, docids=["a"]), "docids has 1 entry for 4 passages"),
    "grades that are no numbers": (conversation(3, grades=["high"] * 4), "high"),
    "grades that are no list": (conversation(3, grades=1), "grades is 1"),
}


# Faults that must be found in nonstandard prompts, too.
LIST_FAULTS = [
    "a permutation that repeats",
    "a permutation that misses",
    "a permutation that exceeds",
    "a permutation in numbers",
    "a permutation with words",
    "letters beyond Z",
    "another number of passages",
    "identifiers out of order",
    "one passage",
    "an empty query",
    "docids of another length",
]


@pytest.mark.parametrize("wording", NONSTANDARD)
@pytest.mark.parametrize("fault", LIST_FAULTS)
def test_a_bad_record_is_refused_with_any_prompt(tmp_path, fault, wording):
    bad, message_part = BAD_RECORDS[fault]
    system, human, gpt = bad["conversations"]
    human = human | {"value": human["value"].replace(*NONSTANDARD[wording])}
    path = write_jsonl(tmp_path / "a.jsonl", [bad | {"conversations": [system, human, gpt]}])
    with pytest.raises(RecordError) as caught:
        list(read(path))
    assert message_part in str(caught.value) and "q3" in str(caught.value)


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize("fault", BAD_RECORDS)
def test_a_bad_record_is_reported_with_file_index_id_and_reason(tmp_path, ending, fault):
    bad, message_part = BAD_RECORDS[fault]
    path = write(tmp_path, ending, [conversation(0), conversation(1), bad, conversation(4)])
    records = read(path)
    assert [record.id for _, record in (next(records), next(records))] == ["q0", "q1"]
    with pytest.raises(RecordError) as caught:
        next(records)
    message = str(caught.value)
    assert message.startswith(f"train{ending}:record 2")
    assert message_part in message
    if isinstance(bad, dict) and str(bad.get("id", " ")).strip():
        assert "q3" in message


@pytest.mark.parametrize(
    ("name", "content", "message_part"),
    [
        ("cut.json", json.dumps([conversation(0), conversation(1)])[:-40], "cut.json:record 1: invalid JSON"),
        ("broken.jsonl", '{"id": \n', "broken.jsonl:record 0 (line 1): invalid JSON"),
        ("deep.jsonl", "[" * 100_000, "deep.jsonl:record 0"),
        ("latin.json", '[{"id": "\xe9"}]'.encode("latin-1"), "latin.json:after record 0: the file cannot be read"),
        ("latin.jsonl", '{"id": "\xe9"}'.encode("latin-1"), "latin.jsonl:record 0 (line 1): invalid JSON"),
        ("cut.jsonl.gz", gzip.compress(b"\n" * 9, mtime=0)[:-12], "cannot be read from here on"),
        ("plain.jsonl.gz", b'{"id": 1}', "an object with the keys 'id'"),
        ("train.csv", "id,text", "the text 'id,text', perhaps with columns separated by commas"),
        ("train.zip", b"PK\x03\x04", "the file is a zip archive"),
    ],
)
def test_a_file_that_holds_no_records_is_named_for_what_it_is(tmp_path, name, content, message_part):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RecordError) as caught:
        list(read(path))
    assert message_part in str(caught.value)


@pytest.mark.parametrize("name", ["absent.jsonl", "/no/such/folder", "a/b/c"])
def test_a_missing_path_is_not_taken_for_a_data_set_id(name):
    with pytest.raises(RecordError, match="no such file or folder"):
        open_conversations(SourceOptions(input=name))


def test_a_data_set_that_cannot_be_opened_is_an_error(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(RecordError, match=r"cannot open the data set.*Check the id"):
        list(read(tmp_path / "set"))


def test_turns_may_be_stored_as_one_list_per_field(tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    layout = conversation(1)
    fields = {name: [turn[name] for turn in layout["conversations"]] for name in ("from", "value")}
    (tmp_path / "set").mkdir()
    pyarrow.write_table(pa.Table.from_pylist([{"id": "q1", "conversations": fields}]), tmp_path / "set" / "a.parquet")
    assert [record for _, record in read(tmp_path / "set")] == [Record.from_conversations(layout)]


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, ending):
    layouts = [conversation(i, num_words=400) for i in range(40)]
    path = write(tmp_path, ending, layouts * 50)
    records = read(path)
    next(records)
    tracemalloc.start()
    assert sum(1 for _ in records) == 1999
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 15_000_000
    assert peak < 6_000_000


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TURNS = st.lists(st.fixed_dictionaries({"value": st.sampled_from([HUMAN, "[A] > [B]", ""]) | JSON_LIKE}), max_size=4)
LAYOUTS = JSON_LIKE | st.fixed_dictionaries(
    {"id": st.just("q") | JSON_LIKE, "conversations": TURNS | JSON_LIKE},
    optional={"qid": JSON_LIKE, "docids": JSON_LIKE, "grades": JSON_LIKE},
)


@given(layout=LAYOUTS)
def test_any_line_gives_a_record_or_a_record_error(tmp_path_factory, layout):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(layout) + "\n", encoding="utf-8")
    try:
        assert all(isinstance(record, Record) for _, record in read(path))
    except RecordError as error:
        assert str(error).startswith("any.jsonl:record 0")


@given(content=st.binary(max_size=60), ending=st.sampled_from([".json", ".jsonl", ".jsonl.gz"]))
def test_any_file_gives_records_or_a_record_error(tmp_path_factory, content, ending):
    path = tmp_path_factory.getbasetemp() / f"bytes{ending}"
    path.write_bytes(content)
    try:
        assert list(read(path)) == []
    except RecordError as error:
        assert str(error).startswith(f"bytes{ending}")
