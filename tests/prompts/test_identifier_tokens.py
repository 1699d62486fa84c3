"""Identifiers as tokens: what is trained is what the inference client asks about; what has no score is refused."""

from __future__ import annotations

import copy
import re
import unicodedata

import pytest
from support.real_tokenizers import build_tekken
from support.small_tokenizers import (
    GPT2_WORDS,
    LLAMA3_WORDS,
    QWEN_WORDS,
    byte_level_tokenizer,
    record,
    word_level_tokenizer,
)

from rankllm_composer.errors import PromptError
from rankllm_composer.prompts.encoding import encode_prompt, encode_record
from rankllm_composer.prompts.identifier_tokens import (
    check_tokenizer,
    identifier_token_ids,
    separator_token_ids,
    splits_after_bracket,
)
from rankllm_composer.prompts.permutations import MAX_CANDIDATES, identifiers

OBJECTIVES = ("generation", "ranking", "combined")
KINDS = ("gpt2_like", "qwen_like", "llama3_like", "qwen3", "tekken", "mistral_v3", "zephyr_v1")
JOINS = {"gpt2_like": "", "qwen_like": "all", "llama3_like": "all", "qwen3": "not OQ", "tekken": "ANTX"}
LONGEST_NUMBERS = {"gpt2_like": 99, "llama3_like": 99}


@pytest.fixture(scope="module")
def tokenizers(request) -> dict:
    """Each tokenizer, made when it is asked for."""
    makers = {
        "gpt2_like": lambda: byte_level_tokenizer(GPT2_WORDS),
        "qwen_like": lambda: byte_level_tokenizer(QWEN_WORDS),
        "llama3_like": lambda: byte_level_tokenizer(LLAMA3_WORDS),
        "tekken": build_tekken,
        "qwen3": lambda: qwen3(request.getfixturevalue("shared")),
        "mistral_v3": lambda: request.getfixturevalue("mistral_v3_tokenizer"),
        "zephyr_v1": lambda: request.getfixturevalue("zephyr_v1_tokenizer"),
    }

    class Made(dict):
        def __missing__(self, name: str):
            self[name] = makers[name]()
            return self[name]

    return Made()


def qwen3(shared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "parity" / "tokenizers" / "qwen3")


def client_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Tokens that rank_llm 0.26.0 sends for FIRST: the rendered and repaired prompt and a bracket, as one text."""
    from ftfy import fix_text

    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return tokenizer.encode(f"{fix_text(prompt)}[")


def client_reads(token: str, num_candidates: int, style: str) -> int | None:
    """Candidate, from 0, that rank_llm 0.26.0 takes a decoded token for; None for none. Copied rule, not its code."""
    if style == "letters":
        if len(token) == 1 and token.isalpha() and 64 + 1 <= ord(token) <= 64 + num_candidates:
            return ord(token) - 65
        return None
    skipped = ("SUPERSCRIPT", "VULGAR FRACTION", "SUBSCRIPT", "CJK UNIFIED")
    is_digit = len(token) == 1 and token.isnumeric() and not unicodedata.name(token).startswith(skipped)
    if not (token.isascii() and token.isdecimal()) and not is_digit:
        return None
    return int(token) - 1 if 1 <= int(token) <= num_candidates else None


@pytest.mark.parametrize("style", MAX_CANDIDATES)
@pytest.mark.parametrize("name", KINDS)
def test_the_trained_token_is_the_one_that_the_client_asks_about(tokenizers, name: str, style: str) -> None:
    tokenizer = tokenizers[name]
    longest = 26 if style == "letters" else LONGEST_NUMBERS.get(name, 9)
    for size in range(2, longest + 1):
        mapping = record(size, style)
        system, user, answer = (turn["value"] for turn in mapping["conversations"])
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        asked = client_prompt(tokenizer, messages)
        ranking = encode_record(mapping, tokenizer, "ranking")
        combined = encode_record(mapping, tokenizer, "combined")

        # The prompt ends in the bracket, and each identifier's token is one that the client reads as this candidate.
        assert ranking.input_ids.tolist() == asked
        assert combined.input_ids[: combined.score_position + 1].tolist() == asked
        for encoded in (ranking, combined):
            read = [client_reads(tokenizer.decode([i]), size, style) for i in encoded.identifier_token_ids]
            assert read == list(range(size))
        # The target is the bare identifier of the best candidate (the last here), and then the rest of the answer.
        *target, end = combined.input_ids[combined.score_position + 1 :].tolist()
        assert target[0] == combined.identifier_token_ids[size - 1] and combined.ranks[size - 1] == 0
        assert end == tokenizer.eos_token_id and tokenizer.decode(target) == answer[1:]
        if name not in ("mistral_v3", "zephyr_v1"):  # SentencePiece puts a space in front of a text
            assert target == tokenizer(answer[1:], add_special_tokens=False)["input_ids"]
        assert combined.split_token == (f"[{identifiers(size, style)[-1]}" if combined.split_token else None)


@pytest.mark.parametrize(("name", "joined"), JOINS.items())
def test_where_a_letter_is_one_token_with_its_bracket(tokenizers, name: str, joined: str) -> None:
    tokenizer = tokenizers[name]
    letters = identifiers(26)
    expected = {"": set(), "all": set(letters), "not OQ": set(letters) - set("OQ")}.get(joined, set(joined))
    for best in letters:
        order = [best, *(letter for letter in letters if letter != best)]
        mapping = record(26)
        mapping["conversations"][2]["value"] = " > ".join(f"[{letter}]" for letter in order)
        combined = encode_record(mapping, tokenizer, "combined")
        generation = encode_record(mapping, tokenizer, "generation")
        assert combined.split_token == (f"[{best}" if best in expected else None)
        assert len(combined.input_ids) - len(generation.input_ids) == (best in expected)
        assert generation.split_token is None
        # Generation is trained as the tokenizer alone writes the answer.
        answer = mapping["conversations"][2]["value"]
        alone = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert generation.input_ids[generation.response_start : -1].tolist() == alone
    assert splits_after_bracket(tokenizer, 26) == bool(expected)
    assert not splits_after_bracket(tokenizer, 9, "numbers")


def test_merged_identifiers_are_split_where_scores_are_read(tokenizers) -> None:
    before = copy.deepcopy(tokenizers["gpt2_like"])
    before.add_tokens(["[C"])
    for tokenizer, names in ((tokenizers["qwen_like"], "ABC"), (before, "C")):
        for objective in OBJECTIVES:
            check_tokenizer(tokenizer, objective)
        token = re.escape(f"identifier [{names[0]}] merges with its bracket in the token '[{names[0]}'")
        with pytest.raises(PromptError, match=token + r".* or the objective ranking or combined\."):
            identifier_token_ids(tokenizer, 3, "letters", "generation")
        combined = encode_record(record(), tokenizer, "combined")
        target = tokenizer.convert_ids_to_tokens(combined.input_ids[combined.score_position :].tolist())
        assert (target[:3], combined.split_token) == (["[", "C", "]"], "[C")
        assert tokenizer.convert_ids_to_tokens(combined.identifier_token_ids.tolist()) == ["A", "B", "C"]
        encoded = encode_record(record(), tokenizer, "generation")
        assert encoded.identifier_token_ids is None
        assert tokenizer.convert_ids_to_tokens(int(encoded.input_ids[encoded.response_start])) == "[C"
        prompt = encode_prompt(*(turn["value"] for turn in record()["conversations"][:2]), tokenizer, False)
        assert encoded.input_ids[: encoded.response_start].tolist() == prompt.tolist()


def test_an_identifier_that_merges_with_its_closing_bracket_is_scored_but_not_written(tokenizers) -> None:
    tokenizer = copy.deepcopy(tokenizers["gpt2_like"])
    tokenizer.add_tokens(["C]"])
    message = re.escape("identifier [C] merges with its bracket in the token 'C]'") + (
        ".* Use numbers, lists of at most 2, or the objective generation or ranking"
    )
    for call in (
        lambda: encode_record(record(), tokenizer, "combined"),
        lambda: check_tokenizer(tokenizer, "combined", "letters", 3),
    ):
        with pytest.raises(PromptError, match=message):
            call()
    # The advice.
    check_tokenizer(tokenizer, "combined", "numbers", 3)
    check_tokenizer(tokenizer, "combined", "letters", 2)
    for objective in ("generation", "ranking"):
        check_tokenizer(tokenizer, objective, "letters", 3)
        encode_record(record(), tokenizer, objective)


def test_the_tokens_between_identifiers(tokenizers, mistral_v3_tokenizer) -> None:
    for tokenizer in (tokenizers["qwen_like"], tokenizers["gpt2_like"], mistral_v3_tokenizer):
        for style in MAX_CANDIDATES:
            first, second = identifier_token_ids(tokenizer, 2, style)
            tokens = [first, *separator_token_ids(tokenizer, style), second]
            names = identifiers(2, style)
            assert tokenizer.decode(tokens) == f"{names[0]}] > [{names[1]}"
    merged = copy.deepcopy(tokenizers["gpt2_like"])
    merged.add_tokens([" [B"])
    check_tokenizer(merged, "combined")
    with pytest.raises(
        PromptError, match=r"\[B\] merges with its bracket in the middle of an answer.* Generate without"
    ):
        separator_token_ids(merged)


def test_alternatives_are_named_only_if_they_work(tokenizers, mistral_v3_tokenizer) -> None:
    qwen_like = tokenizers["qwen_like"]
    several = r"\[10\] is several tokens \('1', '0'\).* "
    with pytest.raises(PromptError, match=several + r"Use letters, lists of at most 9, or the objective generation\."):
        identifier_token_ids(qwen_like, 20, "numbers")
    with pytest.raises(PromptError, match=several + r"Use lists of at most 9, or the objective generation\."):
        identifier_token_ids(qwen_like, 30, "numbers")
    with pytest.raises(PromptError, match=several + r"Use lists of at most 9, or generation without constraints\."):
        identifier_token_ids(qwen_like, 20, "numbers", "generation")  # letters merge as generation writes them
    with pytest.raises(PromptError, match=r"Use letters, lists of at most 9, or the objective generation\."):
        identifier_token_ids(mistral_v3_tokenizer, 20, "numbers")
    words = word_level_tokenizer("[ ] > A B 1 2")
    with pytest.raises(PromptError, match=r"identifier \[C\] is not the token 'C'"):
        identifier_token_ids(words, 3)


def test_only_identifiers_in_use_are_looked_at(tokenizers) -> None:
    tokenizer = copy.deepcopy(tokenizers["gpt2_like"])
    tokenizer.add_tokens(["Z]"])
    check_tokenizer(tokenizer, "combined", "letters", 25)
    with pytest.raises(PromptError, match=r"\[Z\] merges"):
        check_tokenizer(tokenizer, "combined", "letters", 26)
    for added in ("assistant\n[1", "assistant\n[Y"):  # at the end of the prompt
        tokenizer = copy.deepcopy(tokenizers["gpt2_like"])
        tokenizer.add_tokens([added])
        check_tokenizer(tokenizer, "generation", "letters", 24)
        style = "numbers" if added.endswith("1") else "letters"
        with pytest.raises(PromptError, match="is tokenized differently when a response follows"):
            check_tokenizer(tokenizer, "generation", style, 25)


@pytest.mark.parametrize("objective", ["ranking", "combined"])
def test_identifiers_of_several_tokens_stop_where_scores_are_read(mistral_v3_tokenizer, objective: str) -> None:
    message = r"identifier \[10\] is several tokens.*lists of at most 9, or the objective generation"
    with pytest.raises(PromptError, match=message):
        encode_record(record(10, "numbers"), mistral_v3_tokenizer, objective)
    with pytest.raises(PromptError, match=message):
        check_tokenizer(mistral_v3_tokenizer, objective, "numbers", 20)


def test_identifiers_of_several_tokens_are_generated(mistral_v3_tokenizer) -> None:
    check_tokenizer(mistral_v3_tokenizer, "generation", "numbers", 99)
    encoded = encode_record(record(10, "numbers"), mistral_v3_tokenizer, "generation")
    assert encoded.identifier_token_ids is None
    assert encoded.ranks.tolist() == list(range(9, -1, -1))
    response = mistral_v3_tokenizer.decode(encoded.input_ids[encoded.response_start :])
    assert response == "[10] > [9] > [8] > [7] > [6] > [5] > [4] > [3] > [2] > [1]</s>"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_unknown_identifiers_stop(objective: str) -> None:
    tokenizer = word_level_tokenizer("[ ] > A C")
    with pytest.raises(PromptError, match=r"identifier \[B\] is not the token 'B' everywhere"):
        encode_record(record(), tokenizer, objective)
