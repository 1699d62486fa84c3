"""What the versions of the inference client do differently: the words of a passage."""

from __future__ import annotations

import pytest

from rankllm_composer.prompts.clients import CLIENT_VERSIONS, given_word_limit, passage_word_limit

NUMBERS = (1, 2, 3, 7, 10, 19, 20, 26, 99)


def test_words_of_a_passage_in_windows_of_each_length():
    assert [passage_word_limit(num) for num in NUMBERS] == [300] * 9
    # 300 · 20 / n, rounded down
    assert [passage_word_limit(num, client="0.25.7") for num in NUMBERS] == [
        6000,
        3000,
        2000,
        857,
        600,
        315,
        300,
        230,
        60,
    ]
    assert passage_word_limit(10, max_words=120) == 120
    assert passage_word_limit(10, max_words=120, client="0.25.7") == 240


@pytest.mark.parametrize("client", CLIENT_VERSIONS)
def test_the_limit_to_give_shows_at_least_the_words(client):
    for num in NUMBERS:
        for words in (1, 7, 300, passage_word_limit(num, client=client)):
            given = given_word_limit(words, num, client)
            assert passage_word_limit(num, given, client) >= words > passage_word_limit(num, given - 1, client)
