"""The versions of the inference client, rank_llm, that a model can be made for, and what they do differently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ClientVersion = Literal["0.26.0", "0.25.7"]
"""A release of rank_llm on PyPI."""

CLIENT_VERSIONS: tuple[ClientVersion, ...] = get_args(ClientVersion)
CURRENT_CLIENT: ClientVersion = "0.26.0"
UNNAMED_CLIENT: ClientVersion = "0.25.7"
"""The version of sets and models that name none: they were made before there was another."""

CLIENT_TOP_K = 30
"""Number of likeliest tokens among which first-token decoding looks for identifiers."""


@dataclass(frozen=True, slots=True)
class Client:
    """What depends on the version.

    Attributes:
        has_word_option: a passage keeps as many words as `--max-passage-words` says (300), whatever the window;
            otherwise 300 in a window of 20 and 300 · 20 / n in one of n.
        appends_bracket: first-token decoding appends `[` to the prompt and asks for one token; otherwise the model
            writes its first token itself and the second is read.
        reads_numbers: numbers are read by first token, of one digit or of several; otherwise a token of several digits
            among the likeliest stops the client.
        keeps_largest: of several tokens for one identifier the likeliest counts; otherwise the last one.
        counts_all_tokens: a generated answer gets all the tokens that it needs; otherwise the client takes one off for
            a beginning-of-sequence token, which not every tokenizer adds.
    """

    has_word_option: bool
    appends_bracket: bool
    reads_numbers: bool
    keeps_largest: bool
    counts_all_tokens: bool


CLIENTS: dict[ClientVersion, Client] = {
    "0.26.0": Client(True, True, True, True, True),
    "0.25.7": Client(False, False, False, False, False),
}


def passage_word_limit(num_passages: int, max_words: int = 300, client: ClientVersion = CURRENT_CLIENT) -> int:
    """Most words of a passage in a window of `num_passages`.

    Args:
        max_words: the limit that the client is given; of 0.25.7, that of a window of 20.
    """
    return max_words if CLIENTS[client].has_word_option else int(max_words * (20 / num_passages))


def given_word_limit(shown_words: int, num_passages: int, client: ClientVersion) -> int:
    """The limit to give so that at least `shown_words` are shown in a window; inverse of `passage_word_limit`."""
    return shown_words if CLIENTS[client].has_word_option else -(-shown_words * num_passages // 20)
