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
    ("objective", "append_bracket", "score_token_index"),
    [("generation", False, 1), ("combined", False, 1), ("ranking", True, 0)],
)
def test_only_ranking_needs_the_bracket_appended(objective, append_bracket, score_token_index):
    contract = new_contract(objective)
    assert (contract.append_bracket, contract.score_token_index) == (append_bracket, score_token_index)


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
