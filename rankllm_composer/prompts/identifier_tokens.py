"""Identifiers as tokens: which token scores a candidate, and the requirements on a tokenizer.

The inference client (from 0.26.0 on) ends its prompt with `[` and reads the scores of the token that follows. Many
tokenizers (Qwen, Llama 3, tekken) write `[A` as one token where nothing splits it; training splits it there, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from rankllm_composer.errors import PromptError
from rankllm_composer.options import OBJECTIVES, ObjectiveName
from rankllm_composer.prompts.chat import (
    TokenizerFacts,
    check_prompt_end,
    end_of_sequence,
    name_of,
    tokenize,
    tokenizer_facts,
)
from rankllm_composer.prompts.permutations import MAX_CANDIDATES, IdentifierStyle, identifiers

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import BatchEncoding, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Identifier:
    """How a tokenizer writes an identifier.

    Attributes:
        token: the identifier without its brackets, as it follows a prompt that ends in `[`; None if that is not one
            token.
        pieces: texts of its tokens there.
        first: texts of the tokens that join it with a bracket at the beginning of an answer, such as `[A`.
        later: the same, further on in an answer.
    """

    token: int | None
    pieces: tuple[str, ...]
    first: tuple[str, ...]
    later: tuple[str, ...]

    def obstacle(self, objective: ObjectiveName) -> str | None:
        """Why a model of an objective has no score for the identifier at one position; None if it has.

        The prompt ends with `[`, so that a bracket that would join the identifier does not matter: `combined` splits
        the answer behind it. A model trained by generation alone only knows answers as the tokenizer writes them.
        """
        if self.token is None and len(self.pieces) > 1:
            pieces = ", ".join(map(repr, self.pieces))
            return f"is several tokens ({pieces}); expected one, so that one position scores all candidates"
        joined = [*self.first, *self.later]
        if self.token is not None and objective == "ranking":
            joined = []
        elif self.token is not None and objective == "combined":
            joined = [text for text in self.first if "]" in text]
        return f"merges with its bracket in the token {joined[0]!r}; expected a separate token" if joined else None


_KNOWN: WeakKeyDictionary[TokenizerFacts, dict[str, Identifier]] = WeakKeyDictionary()


def read_identifiers(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> tuple[Identifier, ...]:
    """How the tokenizer writes each identifier after a prompt.

    Raises:
        PromptError: an identifier is unknown to the tokenizer, or the end of the prompt depends on what follows.
    """
    facts = tokenizer_facts(tokenizer)
    known = _KNOWN.setdefault(facts, {})
    for name in names:
        if name not in known:
            known[name] = _read_identifier(name, facts, tokenizer)
    return tuple(known[name] for name in names)


def splits_after_bracket(
    tokenizer: PreTrainedTokenizerBase, num_candidates: int, style: IdentifierStyle = "letters"
) -> bool:
    """Whether the tokenizer joins `[` and the first identifier of an answer, which scoring needs as two tokens.

    The inference client (from 0.26.0 on) ends the prompt with `[` and requests the token that follows, so that a model
    has to be trained on these two.
    """
    return any(found.first for found in read_identifiers(tokenizer, identifiers(num_candidates, style)))


def identifier_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    num_candidates: int,
    style: IdentifierStyle = "letters",
    objective: ObjectiveName = "ranking",
) -> tuple[int, ...]:
    """Tokens of a list's identifiers, for objectives and decodings that read a score per identifier.

    Args:
        objective: what the model is trained for. A model trained by generation alone knows identifiers only as the
            tokenizer writes them in an answer.
    Raises:
        PromptError: an identifier takes several tokens, merges with a bracket where the model writes it, or is unknown
            to the tokenizer; or there are more candidates than the style can name.
    """
    names = identifiers(num_candidates, style)
    found = read_identifiers(tokenizer, names)
    for place, one in enumerate(found):
        obstacle = one.obstacle(objective)
        if obstacle is not None:
            raise PromptError(
                f"{name_of(tokenizer)}: identifier [{names[place]}] {obstacle}. "
                f"{_alternatives(tokenizer, num_candidates, style, objective, place)}"
            )
    return tuple(one.token for one in found if one.token is not None)


def separator_token_ids(tokenizer: PreTrainedTokenizerBase, style: IdentifierStyle = "letters") -> list[int]:
    """Tokens between two identifiers of an answer, neither of which is the first.

    Raises:
        PromptError: an identifier merges with a bracket there.
    """
    names = identifiers(2, style)
    found = read_identifiers(tokenizer, names)
    for name, one in zip(names, found):
        if one.token is None or one.later:
            raise PromptError(
                f"{name_of(tokenizer)}: identifier [{name}] merges with its bracket in the middle of an answer, so "
                "that brackets cannot be fixed there. Generate without constraints, or rank by the first token."
            )
    answer = tokenizer(f"[{names[1]}] > [{names[0]}] > [{names[1]}]")["input_ids"]
    start = answer.index(found[0].token) + 1
    return list(answer[start : answer.index(found[1].token, start)])


def _alternatives(
    tokenizer: PreTrainedTokenizerBase, num_candidates: int, style: IdentifierStyle, objective: ObjectiveName, fit: int
) -> str:
    """What can be used instead of identifiers of a style of which only the first `fit` can be scored."""

    def are_scored(style: IdentifierStyle, objective: ObjectiveName) -> bool:
        return num_candidates <= MAX_CANDIDATES[style] and not any(
            found.obstacle(objective) for found in read_identifiers(tokenizer, identifiers(num_candidates, style))
        )

    other: IdentifierStyle = "numbers" if style == "letters" else "letters"
    ways: list[str] = [other] if are_scored(other, objective) else []
    if fit >= 2:
        ways.append(f"lists of at most {fit}")
    objectives = [
        name for name in OBJECTIVES if name != objective and (name == "generation" or are_scored(style, name))
    ]
    if objective == "generation":
        ways.append("generation without constraints")
    elif not ways and objectives == ["generation"]:
        ways = ["another tokenizer"]
    if objectives:
        ways.append(f"the objective {' or '.join(objectives)}")
    return f"Use {', '.join(ways[:-1])}{', or ' if ways[1:] else ''}{ways[-1]}."


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    objective: ObjectiveName,
    style: IdentifierStyle = "letters",
    num_candidates: int = 20,
) -> None:
    """Check, before any record is read, that a tokenizer supports an objective and lists of `num_candidates`.

    A pad token is not required: sequences are packed and never padded.

    Raises:
        PromptError: slow tokenizer; no chat template; no end-of-sequence token (except for `ranking`); a prompt whose
            last token depends on the response; identifiers that are unknown or (except for `generation`) are several
            tokens or (for `combined`) merge with their closing bracket; more candidates than the style can name.
    """
    read_identifiers(tokenizer, identifiers(num_candidates, style))
    if objective != "generation":
        identifier_token_ids(tokenizer, num_candidates, style, objective)
    if objective != "ranking":
        end_of_sequence(tokenizer)


def _read_identifier(name: str, facts: TokenizerFacts, tokenizer: PreTrainedTokenizerBase) -> Identifier:
    text = f"{facts.prompt}[{name}] > [{name}]"  # the first identifier of an answer, and any other
    encoding = tokenize(text, tokenizer)
    check_prompt_end(encoding, facts.prompt, facts.prompt_ids, tokenizer)
    places = (len(facts.prompt) + 1, len(text) - 1 - len(name))
    written = [_tokens_of(name, text, place, encoding) for place in places]
    separate = [tuple(token for token, _ in tokens) for tokens, joined in written if not joined]
    if len(set(separate)) > 1 or any(
        len(tokens) == 1 and tokenizer.convert_ids_to_tokens(tokens[0]) != name for tokens in separate
    ):
        raise PromptError(
            f"{name_of(tokenizer)}: identifier [{name}] is not the token {name!r} everywhere in a response. Use a "
            "tokenizer whose vocabulary contains it."
        )
    # After a line break nothing joins it, and SentencePiece puts no space in front.
    tokens, _ = next((one for one in written if not one[1]), None) or _tokens_of(
        name, f"\n{name}", 1, tokenize(f"\n{name}", tokenizer)
    )
    is_known = len(tokens) == 1 and tokenizer.convert_ids_to_tokens(tokens[0][0]) == name
    return Identifier(
        token=tokens[0][0] if is_known else None,
        pieces=tuple(piece for _, piece in tokens),
        first=written[0][1],
        later=written[1][1],
    )


def _tokens_of(
    name: str, text: str, start: int, encoding: BatchEncoding
) -> tuple[list[tuple[int, str]], tuple[str, ...]]:
    """Tokens, with their texts, of an identifier at character `start`, and those texts that go beyond it."""
    end = start + len(name)
    places = [encoding.char_to_token(char) for char in range(start, end)]
    tokens, joined = [], []
    for index in dict.fromkeys(place for place in places if place is not None):
        span = encoding.token_to_chars(index)
        if span is None:
            continue
        tokens.append((int(encoding["input_ids"][index]), text[span.start : span.end]))
        if span.start < start or span.end > end:
            joined.append(tokens[-1][1])
    return tokens, tuple(joined)
