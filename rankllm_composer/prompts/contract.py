"""The decoding contract: what whoever serves an exported model must do to read the ranking it was trained to give."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rankllm_composer import __version__
from rankllm_composer.errors import ModelError
from rankllm_composer.options import OBJECTIVES, ObjectiveName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTRACT_FILE = "reranker.json"


FORMAT = 1


CLIENT_TEMPLATES = {"letters": "rank_zephyr_alpha_template.yaml", "numbers": "rank_zephyr_template.yaml"}


@dataclass(frozen=True, slots=True)
class DecodingContract:
    """How a model is asked and how its answer is read; `reranker.json` of an exported folder.

    Attributes:
        objective: what was trained: generation, ranking or combined.
        prompt_template: name of the inference client's prompt template.
        chat_template_sha256: hash of the tokenizer's chat template, UTF-8.
        identifier_style: letters or numbers.
        identifiers: names of the candidates in presentation order.
        identifier_token_ids: their tokens inside the brackets; None where they are several tokens (generation only).
        append_bracket: True = the model never learned to write the opening bracket: append it to the prompt.
        score_token_index: place, after the prompt, of the token whose logits are the scores: 1 where the model
            writes the bracket itself, 0 where it is appended.
        num_bos: beginning-of-sequence tokens that begin a prompt, as the client tokenises it.
        eos_token_ids: tokens that end an answer.
        window_size: candidates in one prompt.
        stride: candidates a window moves up the list.
        context_size_tokens: prompt and answer together.
        max_passage_words: words kept of a passage in a window of 20.
        package_version: version that wrote the folder.
    """

    objective: ObjectiveName
    prompt_template: str
    chat_template_sha256: str
    identifier_style: Literal["letters", "numbers"]
    identifiers: tuple[str, ...]
    identifier_token_ids: tuple[int, ...] | None
    append_bracket: bool
    score_token_index: int
    num_bos: int
    eos_token_ids: tuple[int, ...]
    window_size: int = 20
    stride: int = 10
    context_size_tokens: int = 4096
    max_passage_words: int = 300
    package_version: str = __version__

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ModelError(f"objective: found {self.objective!r}, allowed are {', '.join(OBJECTIVES)}")
        if self.identifier_style not in CLIENT_TEMPLATES:
            raise ModelError(f"identifier_style: found {self.identifier_style!r}, allowed are letters, numbers")
        if not 1 <= self.stride <= self.window_size:
            raise ModelError(
                f"stride: found {self.stride} with a window of {self.window_size}, allowed is 1 to {self.window_size}, "
                "or candidates between two windows are never compared",
            )
        if self.window_size > len(self.identifiers):
            raise ModelError(
                f"window_size: found {self.window_size} with {len(self.identifiers)} identifiers, allowed is at most "
                "one candidate an identifier; make the window smaller",
            )
        if self.identifier_token_ids is None:
            if self.objective != "generation":
                raise ModelError(
                    f"identifier_token_ids: found none with the objective {self.objective}, which scores candidates by "
                    "them; allowed is none only for generation",
                )
        elif len(set(self.identifier_token_ids)) != len(self.identifiers):
            raise ModelError(
                f"identifier_token_ids: found {len(set(self.identifier_token_ids))} different tokens for "
                f"{len(self.identifiers)} identifiers, allowed is one token an identifier",
            )

    def to_json(self) -> str:
        """The text of `reranker.json`."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, place: str = CONTRACT_FILE) -> DecodingContract:
        """Contract from the text of `reranker.json`.

        Raises:
            ModelError: not JSON, another format, keys missing or unknown, or values that contradict each other;
                named after `place`.
        """
        try:
            values: Any = json.loads(text)
        except ValueError as error:
            raise ModelError(f"{place}: found no JSON ({error}); export the model again") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise ModelError(
                f"{place}: found format {found!r}, allowed is {FORMAT}; read it with the package version that wrote it",
            )
        names = {field.name for field in dataclasses.fields(cls)}
        given = set(values) - {"format"}
        if given != names:
            raise ModelError(
                f"{place}: missing {sorted(names - given)}, unknown {sorted(given - names)}; export the model again",
            )
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value := values[name], list) else value for name in names
        }
        try:
            return cls(**fields)
        except (ModelError, TypeError) as error:
            raise ModelError(f"{place}: {error}") from None


def read_contract(folder: str | Path) -> DecodingContract:
    """Decoding contract of an exported folder.

    Raises:
        ModelError: the folder has no `reranker.json`, or one that does not read.
    """
    path = Path(folder) / CONTRACT_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(
            f"{path}: found no contract ({error.strerror}); allowed is a folder this package exported, or give the "
            "decoding on the command line",
        ) from None
    return DecodingContract.from_json(text, str(path))


def decoding_contract(
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: ObjectiveName,
    identifier_style: Literal["letters", "numbers"],
    identifiers: Sequence[str],
    identifier_token_ids: Sequence[int] | None,
    window_size: int = 20,
    stride: int = 10,
    context_size_tokens: int = 4096,
    max_passage_words: int = 300,
) -> DecodingContract:
    """Contract of a model trained with this tokenizer and objective.

    Args:
        tokenizer: with the chat template of training.
        objective: what is trained.
        identifier_style: letters or numbers.
        identifiers: every name a candidate can have, in order.
        identifier_token_ids: a token an identifier, or None where they take several.
        window_size: candidates in one prompt.
        stride: candidates a window moves.
        context_size_tokens: prompt and answer together.
        max_passage_words: words kept of a passage in a window of 20.
    Raises:
        ModelError: no chat template, no end-of-sequence token for an objective that writes, or numbers that
            contradict each other.
    """
    append_bracket = objective == "ranking"
    eos = tokenizer.eos_token_id
    if eos is None and not append_bracket:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path}: found no end-of-sequence token, allowed is one that ends an answer; "
            "set tokenizer.eos_token",
        )
    return DecodingContract(
        objective=objective,
        prompt_template=CLIENT_TEMPLATES[identifier_style],
        chat_template_sha256=chat_template_sha256(tokenizer),
        identifier_style=identifier_style,
        identifiers=tuple(identifiers),
        identifier_token_ids=None if identifier_token_ids is None else tuple(map(int, identifier_token_ids)),
        append_bracket=append_bracket,
        score_token_index=0 if append_bracket else 1,
        num_bos=num_bos_tokens(tokenizer),
        eos_token_ids=() if eos is None else (int(eos),),
        window_size=window_size,
        stride=stride,
        context_size_tokens=context_size_tokens,
        max_passage_words=max_passage_words,
    )


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the default chat template: two tokenizers with the same hash write the same prompts.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path}: found no chat template, allowed is one that writes a user turn and a "
            "generation prompt; set tokenizer.chat_template to the template of the model's family",
        )
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()


def num_bos_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Beginning-of-sequence tokens at the head of a prompt.

    The client renders the chat template to text and tokenises that text with special tokens, so a template that
    writes the token itself and a tokenizer that adds one give two.
    """
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "query"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    count = 0
    for token in tokenizer(text)["input_ids"]:
        if token != tokenizer.bos_token_id:
            break
        count += 1
    return count
