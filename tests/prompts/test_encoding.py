"""Prompts: token ids and supervision equal to the published training code's, and what a record must be."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import real_tokenizers

from rankllm_composer.errors import PromptError
from rankllm_composer.options import OBJECTIVES
from rankllm_composer.prompts.encoding import encode_prompt, encode_record, render_prompt
from rankllm_composer.prompts.permutations import format_permutation
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDS = {r["id"]: r for r in json.loads((GOLDEN / "records.json").read_text(encoding="utf-8"))}
CASES = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))["cases"]
TOKENIZERS = tuple(real_tokenizers.SOURCES)
any_texts = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(), max_size=10),  # with lone surrogates
    st.lists(
        st.sampled_from(
            ["[INST]", "[/INST]", "</s>", "<s>", "<|user|>", "<|assistant|>\n", "[A] > [B]", "\n[B] ", "â€™"]
        ),
        max_size=4,
    ).map("".join),
)


@pytest.fixture(scope="module")
def tokenizers(mistral_v3_tokenizer, zephyr_v1_tokenizer) -> dict:
    return {"mistral_v3": mistral_v3_tokenizer, "zephyr_v1": zephyr_v1_tokenizer}


def make_record(query: str = "query", passages=("one", "two", "three"), response: str = "[C] > [A] > [B]") -> Record:
    return Record("r", SYSTEM_MESSAGE, render_user_turn(query, passages), response)


def conversations(*values: str, **more) -> dict:
    return {"id": "r", "conversations": [{"from": "any", "value": value} for value in values], **more}


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join((case["tokenizer"], case["objective"], case["record"]))
)
def test_equal_to_the_published_training(case: dict, tokenizers: dict) -> None:
    tokenizer, mapping = tokenizers[case["tokenizer"]], RECORDS[case["record"]]
    record = Record.from_conversations(mapping)
    bracket = "[" if case["objective"] == "ranking" else ""
    assert render_prompt(record, tokenizer) + bracket == case["prompt"]
    # What is trained on is the same with and without a ranking loss beside the language model's.
    for objective in {"ranking": ["ranking"], "combined": ["combined", "generation"]}[case["objective"]]:
        for source in (mapping, record):
            encoded = encode_record(source, tokenizer, objective)
            assert encoded.input_ids.tolist() == case["input_ids"]
            assert encoded.ranks.tolist() == case["ranks"]
            assert encoded.score_position == case["score_position"]
            assert encoded.response_start == case.get("prompt_length", len(case["input_ids"]))
            assert (encoded.input_ids.dtype, encoded.ranks.dtype) == (np.int32, np.int64)
            assert encoded.identifier_token_ids.dtype == np.int32
            if "identifier_token_ids" in case:
                assert encoded.identifier_token_ids.tolist() == case["identifier_token_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_identifier_tokens_are_those_of_the_response(name: str, record: dict, tokenizers: dict) -> None:
    encoded = encode_record(record, tokenizers[name], "ranking")
    tokens = tokenizers[name].convert_ids_to_tokens(encoded.identifier_token_ids)
    assert "".join(tokens) == "ABCDEFGHIJKLMNOPQRST"[: len(encoded.ranks)]
    supervised = encode_record(record, tokenizers[name], "combined")
    response = supervised.input_ids[supervised.response_start :]
    places = [response.tolist().index(token) for token in encoded.identifier_token_ids]
    assert np.argsort(np.argsort(places)).tolist() == encoded.ranks.tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
@given(system=any_texts, query=any_texts, passages=st.lists(any_texts, min_size=1, max_size=26), data=st.data())
@settings(max_examples=60)
def test_boundary_and_scores_whatever_the_text(
    tokenizers: dict, name: str, system: str, query: str, passages: list[str], data: st.DataObject
) -> None:
    tokenizer = tokenizers[name]
    permutation = data.draw(st.permutations(range(len(passages))))
    record = Record("r", system, render_user_turn(query, passages), format_permutation(permutation))
    alone = encode_prompt(record.system, record.user, tokenizer, append_bracket=False)
    bracket = encode_prompt(record.system, record.user, tokenizer, append_bracket=True)
    ranking = encode_record(record, tokenizer, "ranking")
    combined = encode_record(record, tokenizer, "combined")

    # Prompt, then the bracket: the same whether the response follows or not.
    assert bracket.tolist() == [*alone.tolist(), bracket[-1]]
    assert tokenizer.convert_ids_to_tokens(int(bracket[-1])) == "["
    assert ranking.input_ids.tolist() == bracket.tolist()
    assert (ranking.score_position, ranking.response_start) == (len(alone), len(alone) + 1)
    assert combined.input_ids[: len(bracket)].tolist() == bracket.tolist()
    assert combined.score_position == combined.response_start == len(alone)
    # The response, and the ranks it says.
    assert combined.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(combined.input_ids[combined.response_start : -1]) == record.response
    assert [int(combined.ranks[candidate]) for candidate in permutation] == list(range(len(passages)))
    scored = [
        token for token in combined.input_ids[combined.response_start :] if token in combined.identifier_token_ids
    ]
    assert scored == combined.identifier_token_ids[list(permutation)].tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_tokenization_per_record(monkeypatch, tokenizers: dict, name: str, objective: str) -> None:
    tokenizer = tokenizers[name]
    encode_record(make_record(), tokenizer, objective)
    plain, texts = type(tokenizer)._batch_encode_plus, []

    def counted(self, batch, *args, **kwargs):
        texts.extend(batch)
        return plain(self, batch, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "_batch_encode_plus", counted)
    encode_record(make_record(), tokenizer, objective)
    assert len(texts) == 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_rebuilt_tokenizers_are_the_ones_measured(name: str, shared: Path, request) -> None:
    built, given_folder = request.getfixturevalue(f"{name}_folder"), shared / "parity" / "tokenizers" / name
    for file in ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json"):
        assert (built / file).read_bytes() == (given_folder / file).read_bytes()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("[A] > [B]", "missing: 'C'"),
        ("[A] > [B] > [C] > [D]", "beyond the list: 'D'"),
        ("[A] > [A] > [B] > [C]", "repeated: 'A'"),
        ("[1] > [2] > [4]", "missing: '3'; beyond the list: '4'"),
        ("[A] > [B] > [3]", "unknown: '3'"),
        ("[A]>[B]>[C]", "joined by ' > ' and nothing else"),
        (" [A] > [B] > [C]", "joined by ' > ' and nothing else"),
        ("A B C", "names no candidate"),
        ("", "names no candidate"),
    ],
)
def test_responses_that_are_no_permutation_stop(tokenizers: dict, response: str, message: str, objective: str) -> None:
    with pytest.raises(PromptError, match=rf"record 'r': response: .*{message}"):
        encode_record(make_record(response=response), tokenizers["mistral_v3"], objective)


def test_a_turn_of_another_layout_takes_its_length_from_the_response(tokenizers: dict) -> None:
    record = Record("r", "", "Which is better, [A] x or [B] y?", "[B] > [A]")
    encoded = encode_record(record, tokenizers["zephyr_v1"], "combined")
    assert encoded.ranks.tolist() == [1, 0]
    with pytest.raises(PromptError, match="beyond the list: 'C'"):
        encode_record(Record("r", "", record.user, "[C] > [A]"), tokenizers["zephyr_v1"], "combined")
    with pytest.raises(PromptError, match="is 27; expected 1 to 26 with letters"):
        encode_record(Record("r", "", record.user, "[A]" * 27), tokenizers["zephyr_v1"], "combined")


def test_objectives(tokenizers: dict) -> None:
    with pytest.raises(PromptError, match="is 'rank'; expected one of generation, ranking, combined"):
        encode_record(make_record(), tokenizers["mistral_v3"], "rank")


def test_the_system_text_may_be_empty(tokenizers: dict) -> None:
    record = Record("r", "", "user", "[A]")
    assert render_prompt(record, tokenizers["zephyr_v1"]) == "<|user|>\nuser</s>\n<|assistant|>\n"


def test_from_conversations_takes_order_and_value_only() -> None:
    mapping = conversations("s", "u", "[B] > [A]", qid=7, docids=["x", 8], grades=[0, 2], more="ignored")
    assert Record.from_conversations(mapping) == Record(
        "r", "s", "u", "[B] > [A]", qid="7", docids=("x", "8"), grades=(0, 2)
    )
    assert Record.from_conversations({**conversations("s", "u", "[A]"), "id": 12}) == Record("12", "s", "u", "[A]")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (None, "is NoneType; expected a mapping"),
        (["conversations"], "is list"),
        ({}, "id is None"),
        ({**conversations("s", "u", "r"), "id": ""}, "id is ''"),
        ({**conversations("s", "u", "r"), "id": 1.5}, "id is 1.5"),
        ({**conversations("s", "u", "r"), "id": True}, "id is True"),
        ({"id": "r"}, "record 'r': conversations: None; expected exactly three"),
        ({"id": "r", "conversations": "abc"}, "conversations: 'abc'"),
        (conversations("s", "u"), "conversations: 2 turns"),
        (conversations("s", "u", "r", "u"), "conversations: 4 turns"),
        ({"id": "r", "conversations": ["s", "u", "r"]}, "the system turn has no text under 'value'"),
        ({"id": "r", "conversations": [{"value": "s"}, {"text": "u"}, {"value": "r"}]}, "the human turn has no text"),
        (conversations("s", "u", None), "the gpt turn has no text"),
        (conversations("s", "u", "r", docids="x y"), "docids is 'x y'; expected a list of texts"),
        (conversations("s", "u", "r", docids=[None]), "docids is"),
        (conversations("s", "u", "r", grades=3), "grades is 3; expected a list of integers"),
        (conversations("s", "u", "r", grades=[0.5]), "grades is"),
        (conversations("s", "u", "r", grades=["1"]), "grades is"),
    ],
)
def test_records_of_another_layout_stop(tokenizers: dict, mapping, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Record.from_conversations(mapping)
    with pytest.raises(PromptError, match=message):
        encode_record(mapping, tokenizers["mistral_v3"], "combined")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), any_texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["id", "conversations", "from", "value", "qid", "docids", "grades"]), inner),
    ),
    max_leaves=12,
)
turns = st.lists(st.fixed_dictionaries({"value": st.one_of(any_texts, json_values)}), min_size=2, max_size=4)
mappings = st.fixed_dictionaries(
    {"id": json_values, "conversations": st.one_of(turns, json_values)},
    optional={"qid": json_values, "docids": json_values, "grades": json_values},
)


@given(st.one_of(json_values, mappings), st.sampled_from(OBJECTIVES))
def test_any_mapping_encodes_or_is_refused(tokenizers: dict, mapping, objective: str) -> None:
    try:
        encoded = encode_record(mapping, tokenizers["mistral_v3"], objective)
    except PromptError:
        return
    assert len(encoded.ranks) == len(encoded.identifier_token_ids)


def test_encoded_records_travel_between_processes(tokenizers: dict) -> None:
    encoded = encode_record(make_record(), tokenizers["mistral_v3"], "combined")
    copied = pickle.loads(pickle.dumps(encoded))
    assert copied.input_ids.tolist() == encoded.input_ids.tolist()
    assert copied.identifier_token_ids.tolist() == encoded.identifier_token_ids.tolist()
    assert (copied.response_start, copied.score_position) == (encoded.response_start, encoded.score_position)


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, rankllm_composer.prompts.encoding\n"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'ftfy', 'streaming') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
