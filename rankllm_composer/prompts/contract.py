"""The decoding contract: how an exported model is prompted, and how its ranking is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankllm_composer import __version__
from rankllm_composer.errors import ModelError, PromptError, RankLLMComposerError
from rankllm_composer.options import DECODINGS, OBJECTIVES, Decoding, ObjectiveName
from rankllm_composer.prompts.chat import end_of_sequence, render_chat
from rankllm_composer.prompts.clients import (
    CLIENT_VERSIONS,
    CLIENTS,
    CURRENT_CLIENT,
    UNNAMED_CLIENT,
    Client,
    ClientVersion,
    passage_word_limit,
)
from rankllm_composer.prompts.identifier_tokens import identifier_token_ids, splits_after_bracket
from rankllm_composer.prompts.permutations import IdentifierStyle, identifiers
from rankllm_composer.prompts.prompt_template import TEMPLATE_FILE, Prompt, PromptTemplate, template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTRACT_FILE = "reranker.json"
FORMAT = 1
DEFAULT_WORDS = 300  # of a passage, in the client
_LATER_KEYS = {
    "client_version": UNNAMED_CLIENT,
    "bracket_merges": False,
    "template": None,
}  # of contracts that were written before them
CLIENT_TEMPLATES = {"letters": "rank_zephyr_alpha_template.yaml", "numbers": "rank_zephyr_template.yaml"}


@dataclass(frozen=True, slots=True)
class DecodingContract:
    """How a model is prompted and how its answer is read; `reranker.json` of an exported folder.

    Attributes:
        client_version: version of the inference client, rank_llm, that the prompts and the reading are those of.
        objective: what was trained: generation, ranking or combined.
        prompt_template: name of the inference client's prompt template, or of the file in the folder with `template`.
        template: what prompts say; None = the inference client's own template of that name.
        chat_template_sha256: hash of the tokenizer's chat template, UTF-8.
        identifier_style: letters or numbers.
        identifiers: names of the candidates in presentation order.
        identifier_token_ids: their tokens inside the brackets; None if they are several tokens, or merge with a bracket
            (generation only).
        append_bracket: True = first-token decoding appends the opening bracket to the prompt; False = the model writes
            it, as rank_llm 0.25.7 expects.
        score_token_index: index, after the prompt, of the token whose logits are the scores: 1 if the model writes
            the bracket itself, 0 if it is appended.
        bracket_merges: whether the tokenizer has one token for the bracket and an identifier behind it, `[A`. The
            objectives that score candidates are trained on the two as two tokens.
        num_bos: beginning-of-sequence tokens at the start of a prompt, as the client tokenizes it.
        eos_token_ids: tokens that end an answer.
        window_size: candidates in one prompt.
        stride: candidates a window moves up the list.
        context_size_tokens: prompt and answer together.
        max_passage_words: words kept of a passage; with rank_llm 0.25.7, in a window of 20 (`passage_word_limit`).
        package_version: version that wrote the folder.
    """

    objective: ObjectiveName
    prompt_template: str
    chat_template_sha256: str
    identifier_style: IdentifierStyle
    identifiers: tuple[str, ...]
    identifier_token_ids: tuple[int, ...] | None
    append_bracket: bool
    score_token_index: int
    num_bos: int
    eos_token_ids: tuple[int, ...]
    window_size: int = 20
    stride: int = 10
    context_size_tokens: int = 4096
    max_passage_words: int = DEFAULT_WORDS
    bracket_merges: bool = False
    template: PromptTemplate | None = None
    client_version: ClientVersion = CURRENT_CLIENT
    package_version: str = __version__

    def __post_init__(self) -> None:
        if self.client_version not in CLIENT_VERSIONS:
            raise ModelError(
                f"client_version is {self.client_version!r}; expected one of {', '.join(CLIENT_VERSIONS)}. Use a "
                "version of this package that supports it."
            )
        if self.objective not in OBJECTIVES:
            raise ModelError(f"objective is {self.objective!r}; expected one of {', '.join(OBJECTIVES)}")
        if self.identifier_style not in CLIENT_TEMPLATES:
            raise ModelError(f"identifier_style is {self.identifier_style!r}; expected letters or numbers")
        if self.template is not None:
            self.template.check_reads(len(self.identifiers), self.identifier_style)
        if not 1 <= self.stride <= self.window_size:
            raise ModelError(
                f"stride is {self.stride} with a window of {self.window_size}; expected 1 to {self.window_size}, so "
                "that no candidate falls between windows"
            )
        if self.window_size > len(self.identifiers):
            raise ModelError(
                f"window_size is {self.window_size} but there are only {len(self.identifiers)} identifiers. Make the "
                "window smaller."
            )
        if self.identifier_token_ids is None:
            if self.objective != "generation":
                raise ModelError(
                    f"identifier_token_ids is null, but the objective {self.objective} scores candidates by them; null "
                    "is valid only for generation"
                )
        elif len(set(self.identifier_token_ids)) != len(self.identifiers):
            raise ModelError(
                f"identifier_token_ids has {len(set(self.identifier_token_ids))} distinct tokens for "
                f"{len(self.identifiers)} identifiers; expected one token per identifier"
            )

    @property
    def prompt(self) -> Prompt:
        """How a list is written as a prompt."""
        return Prompt(self.identifier_style, self.template)

    @property
    def client(self) -> Client:
        """What the client's version does."""
        return CLIENTS[self.client_version]

    @property
    def shown_words(self) -> int:
        """Most words of a passage in the contract's window."""
        return passage_word_limit(self.window_size, self.max_passage_words, self.client_version)

    def unserved(self) -> dict[Decoding, str]:
        """Decodings by which the client cannot rank with the model, each with the reason; at most all of them."""
        reasons: dict[Decoding, str] = {}
        if self.objective == "ranking":
            reasons["generation"] = "a model trained by ranking alone never learned to write an answer"
        if self.identifier_token_ids is None:
            merges = "merges with its bracket, which generation trains as one token"
            reasons["first_token"] = f"an identifier {merges if self.bracket_merges else 'is several tokens'}"
        elif not self.client.reads_numbers and self.identifier_style == "numbers":
            reasons["first_token"] = f"rank_llm {self.client_version} reads letters only"
        elif not self.client.appends_bracket and self.objective == "ranking":
            reasons["first_token"] = (
                f"rank_llm {self.client_version} lets the model write the opening bracket, which a model trained by "
                "ranking alone never learned"
            )
        return reasons

    def unserved_words(self) -> str | None:
        """How the words of a passage differ between training and the client; None if they do not."""
        theirs = passage_word_limit(self.window_size, client=self.client_version)
        if self.client.has_word_option or theirs == self.shown_words:
            return None
        return (
            f"rank_llm {self.client_version} shows up to {theirs} words of a passage in windows of {self.window_size}, "
            f"where the model was trained with up to {self.shown_words}"
        )

    def served_decoding(self) -> Decoding | None:
        """Decoding by which the client serves the model: the one it was trained for if possible; None = by neither."""
        trained: Decoding = "generation" if self.objective == "generation" else "first_token"
        left = [decoding for decoding in (trained, *DECODINGS) if decoding not in self.unserved()]
        return left[0] if left else None

    def with_client(self, version: ClientVersion) -> DecodingContract:
        """The contract as another version of the client prompts and reads the model.

        The words of a passage in the contract's window stay the same where the version can show them.
        """
        client = CLIENTS[version]
        appends = client.appends_bracket or self.objective == "ranking"
        # The older version has no option for the words.
        words = self.shown_words if client.has_word_option else DEFAULT_WORDS
        return replace(
            self,
            client_version=version,
            append_bracket=appends,
            score_token_index=0 if appends else 1,
            max_passage_words=words,
        )

    def to_json(self) -> str:
        """The text of `reranker.json`."""
        values = dataclasses.asdict(self)
        if self.template is None:
            del values["template"]
        return json.dumps({"format": FORMAT, **values}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, place: str = CONTRACT_FILE) -> DecodingContract:
        """Contract from the text of `reranker.json`; if it is invalid, raises a ModelError that starts with `place`."""
        try:
            values: Any = json.loads(text)
        except ValueError as error:
            raise ModelError(f"{place} is not valid JSON ({error}). Export the model again.") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise ModelError(
                f"{place}: format is {found!r}; expected {FORMAT}. Read it with the package version that wrote it."
            )
        values = {**_LATER_KEYS, **values}
        names, given = {field.name for field in dataclasses.fields(cls)}, set(values) - {"format"}
        if given != names:
            raise ModelError(
                f"{place}: missing keys {sorted(names - given)}, unknown keys {sorted(given - names)}. Export the "
                "model again."
            )
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v := values[n], list) else v for n in names}
        try:
            if fields["template"] is not None:
                fields["template"] = template_of(dict(fields["template"]))
            return cls(**fields)
        except (RankLLMComposerError, TypeError, ValueError) as error:
            raise ModelError(f"{place}: {error}") from None


def read_contract(folder: str | Path) -> DecodingContract:
    """Decoding contract of an exported folder; raises ModelError without a valid `reranker.json`."""
    path = Path(folder) / CONTRACT_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(
            f"{path}: no contract ({error.strerror}); expected a folder that this package exported"
        ) from None
    return DecodingContract.from_json(text, str(path))


def decoding_contract(
    tokenizer: PreTrainedTokenizerBase,
    objective: ObjectiveName,
    style: IdentifierStyle = "letters",
    *,
    num_identifiers: int = 20,
    stride: int | None = None,
    context_size_tokens: int = 4096,
    client_version: ClientVersion = CURRENT_CLIENT,
    template: PromptTemplate | None = None,
) -> DecodingContract:
    """Contract of a model trained with this tokenizer and objective; for the arguments see `DecodingContract`.

    Args:
        num_identifiers: candidates of the longest list that was trained; also the window (see `lists.trained_window`).
        stride: None = half the window.
    Raises:
        ModelError: no chat template.
        PromptError: the tokenizer cannot be used for the objective (see `check_tokenizer`).
    """
    chat_template = chat_template_sha256(tokenizer)
    append_bracket = objective == "ranking" or CLIENTS[client_version].appends_bracket
    if objective != "ranking":
        end_of_sequence(tokenizer)
    token_ids: tuple[int, ...] | None = None
    bracket_merges = False
    try:
        bracket_merges = splits_after_bracket(tokenizer, num_identifiers, style)
        token_ids = identifier_token_ids(tokenizer, num_identifiers, style, objective)
    except PromptError:
        if objective != "generation":
            raise
    eos = tokenizer.eos_token_id
    return DecodingContract(
        objective=objective,
        prompt_template=CLIENT_TEMPLATES[style] if template is None else TEMPLATE_FILE,
        chat_template_sha256=chat_template,
        identifier_style=style,
        identifiers=identifiers(num_identifiers, style),
        identifier_token_ids=token_ids,
        append_bracket=append_bracket,
        score_token_index=0 if append_bracket else 1,
        num_bos=num_bos_tokens(tokenizer),
        eos_token_ids=() if eos is None else (int(eos),),
        window_size=num_identifiers,
        stride=max(1, num_identifiers // 2) if stride is None else stride,
        context_size_tokens=context_size_tokens,
        bracket_merges=bracket_merges,
        client_version=client_version,
        template=template,
    )


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the default chat template: equal hashes give equal prompts; raises ModelError if there is none."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path} has no chat template; expected one that writes a user turn and a "
            "generation prompt. Set tokenizer.chat_template to that of the model's family."
        )
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()


def num_bos_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of beginning-of-sequence tokens at the start of a prompt.

    The client renders the chat template to text and tokenizes that text with special tokens, so a template that
    writes the token itself and a tokenizer that adds one give two.
    """
    prompt = render_chat([{"role": "user", "content": "query"}], tokenizer)
    return count_bos(tokenizer(prompt)["input_ids"], tokenizer)


def count_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of beginning-of-sequence tokens at the start of a sequence."""
    return sum(1 for _ in takewhile(lambda token: token == tokenizer.bos_token_id, ids))
