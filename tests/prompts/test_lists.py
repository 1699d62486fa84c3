"""The window that lists train, and what they ask of a tokenizer."""

from __future__ import annotations

import pytest
from support.tiny_training import new_tokenizer

from rankllm_composer.errors import PromptError
from rankllm_composer.prompts.contract import decoding_contract
from rankllm_composer.prompts.lists import check_lists, list_kind, trained_window, unreadable_decodings
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import render_user_turn


@pytest.mark.parametrize(
    ("lists", "strides", "expected"),
    [
        ({("letters", 20): 7}, [10], ("letters", 20, 10)),
        ({("letters", 20): 7}, [], ("letters", 20, 10)),
        ({("letters", 20): 7}, [4, 4], ("letters", 20, 4)),
        ({("letters", 20): 7}, [4, 5], ("letters", 20, 10)),
        ({("letters", 4): 9}, [10], ("letters", 4, 2)),  # the default stride of a source
        ({("letters", 5): 9}, [5], ("letters", 5, 2)),  # lists that do not overlap lift nothing from window to window
        ({("letters", 26): 1, ("letters", 4): 99}, [], ("letters", 26, 13)),
        ({("numbers", 30): 9}, [], ("numbers", 30, 15)),
        ({("numbers", 30): 3, ("letters", 6): 2, ("letters", 5): 2}, [], ("letters", 6, 3)),  # mixed streams
        ({("numbers", 30): 3, ("letters", 6): 3}, [], ("letters", 6, 3)),
        ({("numbers", 2): 3, ("letters", 6): 0}, [], ("numbers", 2, 1)),
    ],
)
def test_the_window_is_that_of_the_lists(lists, strides, expected):
    window = trained_window(lists, strides)
    assert window == expected
    contract = decoding_contract(
        new_tokenizer(), "generation", window.style, num_identifiers=window.size, stride=window.stride
    )
    assert (contract.identifier_style, contract.window_size, contract.stride) == expected
    assert len(contract.identifiers) == window.size


def test_no_lists_have_no_window():
    with pytest.raises(PromptError, match="lists: none"):
        trained_window({("letters", 4): 0})


def test_the_kind_of_a_list():
    record = Record("r", "", render_user_turn("q", ["a", "b", "c"], "numbers"), "[1] > [2] > [3]")
    assert list_kind(record) == ("numbers", 3)
    assert list_kind(record, "letters") == ("letters", 3)


def test_one_rule_for_the_identifiers_in_use(mistral_v3_tokenizer):
    long, short = {("numbers", 9): 3, ("numbers", 10): 1}, {("numbers", 9): 3, ("letters", 26): 1}
    for objective in ("ranking", "combined"):
        check_lists(mistral_v3_tokenizer, objective, short)
        with pytest.raises(PromptError, match=r"lists of 10 candidates named by numbers, objective .* at most 9"):
            check_lists(mistral_v3_tokenizer, objective, long)
    check_lists(mistral_v3_tokenizer, "generation", long)
    check_lists(mistral_v3_tokenizer, "combined", {("numbers", 99): 0, ("letters", 2): 1})


def test_what_cannot_be_read_one_way_is_read_the_other(mistral_v3_tokenizer):
    lists = {("numbers", 20): 5}
    assert unreadable_decodings(mistral_v3_tokenizer, "combined", {("letters", 20): 5}) == {}
    (decoding,) = unreadable_decodings(mistral_v3_tokenizer, "ranking", {("letters", 20): 5})
    assert decoding == "generation"
    reasons = unreadable_decodings(mistral_v3_tokenizer, "generation", lists)
    assert list(reasons) == ["first_token"] and "identifier [10] is several tokens" in reasons["first_token"]
