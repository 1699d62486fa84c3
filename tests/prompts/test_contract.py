"""The decoding contract: what it says of a tokenizer and an objective, and that it reads back or says why not."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json

import pytest
from support.contracts import new_contract
from support.tiny_training import CHAT_TEMPLATE, new_tokenizer

from rankllm_composer.errors import ModelError, PromptError
from rankllm_composer.prompts.contract import CONTRACT_FILE, decoding_contract, num_bos_tokens, read_contract


@pytest.mark.parametrize(
    ("objective", "client_version", "append_bracket", "score_token_index"),
    [
        ("generation", "0.26.0", True, 0),
        ("combined", "0.26.0", True, 0),
        ("ranking", "0.26.0", True, 0),
        ("generation", "0.25.7", False, 1),
        ("combined", "0.25.7", False, 1),
        ("ranking", "0.25.7", True, 0),  # the client cannot read it; `rerank` can
    ],
)
def test_the_bracket_is_appended_as_the_client_does(objective, client_version, append_bracket, score_token_index):
    contract = decoding_contract(new_tokenizer(), objective, client_version=client_version)
    assert (contract.append_bracket, contract.score_token_index) == (append_bracket, score_token_index)
    other = {"0.26.0": "0.25.7", "0.25.7": "0.26.0"}[client_version]
    assert contract.with_client(other) == decoding_contract(new_tokenizer(), objective, client_version=other)


def test_a_contract_that_names_no_client_is_of_the_version_before_there_were_two(tmp_path):
    written = json.loads(decoding_contract(new_tokenizer(), "combined", client_version="0.25.7").to_json())
    del written["client_version"], written["bracket_merges"]
    (tmp_path / CONTRACT_FILE).write_text(json.dumps(written))
    contract = read_contract(tmp_path)
    assert (contract.client_version, contract.append_bracket, contract.bracket_merges) == ("0.25.7", False, False)


@pytest.mark.parametrize(
    ("changes", "decoding", "unserved"),
    [
        ({"objective": "generation"}, "generation", set()),
        ({"objective": "combined"}, "first_token", set()),
        ({"objective": "ranking"}, "first_token", {"generation"}),
        ({"objective": "combined", "identifier_style": "numbers"}, "first_token", set()),
        ({"objective": "combined", "bracket_merges": True}, "first_token", set()),
        ({"objective": "generation", "identifier_token_ids": None}, "generation", {"first_token"}),
        (
            {"objective": "generation", "identifier_token_ids": None, "bracket_merges": True},
            "generation",
            {"first_token"},
        ),
        ({"objective": "combined", "client_version": "0.25.7"}, "first_token", set()),
        ({"objective": "ranking", "client_version": "0.25.7"}, None, {"first_token", "generation"}),
        (
            {"objective": "combined", "identifier_style": "numbers", "client_version": "0.25.7"},
            "generation",
            {"first_token"},
        ),
        ({"objective": "combined", "bracket_merges": True, "client_version": "0.25.7"}, "first_token", set()),
    ],
)
def test_what_each_client_can_serve(changes, decoding, unserved):
    contract = dataclasses.replace(new_contract(), **changes)
    assert (contract.served_decoding(), set(contract.unserved())) == (decoding, unserved)


@pytest.mark.parametrize(
    ("client_version", "max_passage_words", "window", "shown", "difference"),
    [
        ("0.26.0", 300, 10, 300, None),
        ("0.26.0", 45, 10, 45, None),
        ("0.25.7", 300, 10, 600, None),
        ("0.25.7", 150, 10, 300, "shows up to 600 words of a passage in windows of 10, where the model was"),
    ],
)
def test_words_of_a_passage(client_version, max_passage_words, window, shown, difference):
    contract = decoding_contract(new_tokenizer(), "combined", num_identifiers=window, client_version=client_version)
    contract = dataclasses.replace(contract, max_passage_words=max_passage_words)
    assert contract.shown_words == shown
    assert (contract.unserved_words() is None) == (difference is None)
    assert difference is None or difference in contract.unserved_words()
    assert contract.with_client("0.26.0").shown_words == shown  # its command passes the limit


@pytest.mark.parametrize(
    ("style", "template"), [("letters", "rank_zephyr_alpha_template.yaml"), ("numbers", "rank_zephyr_template.yaml")]
)
def test_prompt_template_is_the_clients_for_the_identifiers(style, template):
    assert decoding_contract(new_tokenizer(), "generation", style).prompt_template == template


def test_what_it_says_of_the_tokenizer():
    contract = new_contract()
    assert contract.chat_template_sha256 == hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()
    assert contract.eos_token_ids == (2,)
    assert contract.num_bos == 2  # one from the template, one from the tokenizer
    assert new_contract(tokenizer=new_tokenizer(adds_bos=False)).num_bos == 1


def test_real_tokenizers_begin_prompts_as_the_client_does(mistral_v3_tokenizer, zephyr_v1_tokenizer):
    # Mistral's template writes <s> and its tokenizer adds one; Zephyr's template writes none.
    assert num_bos_tokens(mistral_v3_tokenizer) == 2
    assert num_bos_tokens(zephyr_v1_tokenizer) == 1


def test_a_tokenizer_without_bos_begins_prompts_with_none():
    tokenizer = new_tokenizer(adds_bos=False)
    tokenizer.chat_template = CHAT_TEMPLATE.removeprefix("<s>")
    assert num_bos_tokens(tokenizer) == 0


@pytest.mark.parametrize("objective", ["generation", "ranking", "combined"])
def test_it_reads_back(tmp_path, objective):
    contract = new_contract(objective, window_size=8, stride=4, context_size_tokens=512, max_passage_words=50)
    (tmp_path / CONTRACT_FILE).write_text(contract.to_json())
    assert read_contract(tmp_path) == contract


def test_numbers_of_several_tokens_are_for_generation_alone():
    assert new_contract("generation", identifier_token_ids=None).identifier_token_ids is None
    with pytest.raises(ModelError, match="identifier_token_ids is null, but the objective combined"):
        new_contract("combined", identifier_token_ids=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "pairwise"}, "objective is 'pairwise'; expected one of generation, ranking, combined"),
        ({"identifier_style": "roman"}, "identifier_style is 'roman'"),
        ({"client_version": "0.20.0"}, "client_version is '0.20.0'; expected one of 0.26.0, 0.25.7"),
        ({"stride": 0}, "stride is 0 with a window of 20"),
        ({"stride": 21}, "stride is 21 with a window of 20"),
        ({"window_size": 21}, "window_size is 21 but there are only 20 identifiers"),
        ({"identifier_token_ids": (7,) * 20}, "has 1 distinct tokens for 20 identifiers"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        dataclasses.replace(new_contract(), **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "format is 'list'; expected 1"),
        ('{"format": 2}', "format is 2; expected 1"),
        ('{"format": 1}', "missing keys .*'stride'"),
    ],
)
def test_files_that_do_not_read_are_named(tmp_path, text, message):
    (tmp_path / CONTRACT_FILE).write_text(text)
    with pytest.raises(ModelError, match=message) as failure:
        read_contract(tmp_path)
    assert str(tmp_path / CONTRACT_FILE) in str(failure.value)


@pytest.mark.parametrize(("key", "value"), [("window_size", "20"), ("identifiers", 5), ("stride", None), ("extra", 1)])
def test_values_of_another_type_are_refused(tmp_path, key, value):
    (tmp_path / CONTRACT_FILE).write_text(json.dumps(json.loads(new_contract().to_json()) | {key: value}))
    with pytest.raises(ModelError):
        read_contract(tmp_path)


def test_a_folder_without_contract_is_named(tmp_path):
    with pytest.raises(ModelError, match="no contract"):
        read_contract(tmp_path)


def test_tokenizers_that_cannot_serve_are_refused():
    without_template = new_tokenizer()
    without_template.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        new_contract(tokenizer=without_template)
    without_end = copy.deepcopy(new_tokenizer())
    without_end.eos_token = None
    with pytest.raises(PromptError, match="no end-of-sequence token"):
        new_contract(tokenizer=without_end)
    assert new_contract("ranking", tokenizer=without_end).eos_token_ids == ()
