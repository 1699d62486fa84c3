"""Prompts: a teacher-ranked list → prompt text → token ids and where they supervise.

The parts are `user_turn` (query and passages ⇄ text) and `chat` (messages → text → tokens); what other rooms need of
them is importable from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from rankllm_composer.chat import (
    Objective,
    bracket_position,
    build_messages,
    check_tokenizer,
    end_of_sequence,
    identifier_token_ids,
    identifier_tokens,
    render_chat,
    tokenise,
)
from rankllm_composer.permutations import (
    PermutationError,
    identifier_style,
    identifiers,
    parse_permutation,
    ranks_from_permutation,
)
from rankllm_composer.user_turn import (
    SYSTEM_MESSAGE,
    PromptError,
    UserTurn,
    clean_query,
    document_text,
    is_client_wording,
    num_announced,
    parse_user_turn,
    passage_word_limit,
    read_user_turn,
    render_user_turn,
    truncate_passage,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

__all__ = [
    "SYSTEM_MESSAGE",
    "EncodedRecord",
    "Objective",
    "PromptError",
    "Record",
    "UserTurn",
    "build_messages",
    "check_tokenizer",
    "clean_query",
    "document_text",
    "encode_prompt",
    "encode_record",
    "identifier_token_ids",
    "is_client_wording",
    "parse_user_turn",
    "passage_word_limit",
    "read_user_turn",
    "render_prompt",
    "render_user_turn",
    "truncate_passage",
]


@dataclass(frozen=True, slots=True)
class Record:
    """One teacher-ranked list: the three turns of a training conversation, and what is known about its candidates.

    Attributes:
        id: names the record in errors and logs.
        system, user, response: the turns; `response` is the teacher's permutation as text.
        qid: query id, None if not known.
        docids: document id of each candidate in presentation order.
        grades: relevance grade of each candidate in presentation order.
    """

    id: str
    system: str
    user: str
    response: str
    qid: str | None = None
    docids: tuple[str, ...] | None = None
    grades: tuple[int, ...] | None = None

    @classmethod
    def from_conversations(cls, mapping: Mapping[str, Any]) -> Record:
        """Record from the published layout: `{"id": …, "conversations": [system, human, gpt]}`.

        The order of the turns is the contract, of each only `value` counts. `qid`, `docids` and `grades` are taken
        where they are given.

        Raises:
            PromptError: no id, not exactly three turns, a turn without text, docids or grades that are no lists.
        """
        if not isinstance(mapping, Mapping):
            raise PromptError(f"record: found {type(mapping).__name__}, allowed is a mapping with id and conversations")
        name = mapping.get("id")
        if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
            raise PromptError(f"record: id is {name!r}, allowed is a text or a whole number; give every record its own")
        where = f"record {name!r}"
        turns = mapping.get("conversations")
        if not isinstance(turns, Sequence) or isinstance(turns, str) or len(turns) != 3:
            found = f"{len(turns)} turns" if isinstance(turns, Sequence) and not isinstance(turns, str) else repr(turns)
            raise PromptError(
                f"{where}: conversations: found {found}, allowed is exactly three: system, human, gpt; "
                "write an empty system text as an empty value"
            )
        for place, turn in zip(("system", "human", "gpt"), turns):
            if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
                raise PromptError(
                    f"{where}: conversations: the {place} turn has no text under 'value'; write each turn as "
                    "{'from': …, 'value': text}"
                )
        docids, grades = mapping.get("docids"), mapping.get("grades")
        if docids is not None and not _is_list_of(docids, (str, int)):
            raise PromptError(f"{where}: docids: found {docids!r}, allowed is a list of texts, one a passage")
        if grades is not None and not _is_list_of(grades, (int,)):
            raise PromptError(f"{where}: grades: found {grades!r}, allowed is a list of whole numbers, one a passage")
        return cls(
            id=str(name),
            system=turns[0]["value"],
            user=turns[1]["value"],
            response=turns[2]["value"],
            qid=None if mapping.get("qid") is None else str(mapping["qid"]),
            docids=None if docids is None else tuple(str(docid) for docid in docids),
            grades=None if grades is None else tuple(grades),
        )


@dataclass(eq=False, slots=True)
class EncodedRecord:
    """A record as the model sees it.

    Attributes:
        input_ids: (L,) int32. For `ranking` the prompt and a `[`; otherwise prompt, response, end of sequence.
        response_start: index of the first token that is not prompt; L for `ranking`.
        score_position: index of the `[` whose next-token logits score the candidates.
        identifier_token_ids: (N,) int32, the token of each candidate's identifier in presentation order; None only for
            `generation` where an identifier takes several tokens.
        ranks: (N,) int64, the teacher's 0-based place of each candidate.
    """

    input_ids: NDArray[np.int32]
    response_start: int
    score_position: int
    identifier_token_ids: NDArray[np.int32] | None
    ranks: NDArray[np.int64]


def render_prompt(record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt text of a record, up to where the response begins: chat template, then `ftfy.fix_text`.

    Raises:
        PromptError: the tokenizer cannot be used (see `check_tokenizer`).
    """
    return render_chat(build_messages(record.system, record.user, tokenizer), tokenizer)


def encode_prompt(
    system: str,
    user: str,
    tokenizer: PreTrainedTokenizerBase,
    append_bracket: bool,
) -> NDArray[np.int32]:
    """Token ids of a prompt, for inference.

    Args:
        system, user: the turns.
        tokenizer: a fast HF tokenizer with a chat template.
        append_bracket: end with `[`, so that the next-token logits of the last position score the candidates.
    Returns:
        (L,) int32.
    Raises:
        PromptError: the tokenizer cannot be used (see `check_tokenizer`).
    """
    prompt = render_chat(build_messages(system, user, tokenizer), tokenizer)
    encoding = tokenise(prompt + "[" if append_bracket else prompt, tokenizer)
    if append_bracket:
        bracket_position(encoding, len(prompt))
    return np.array(encoding["input_ids"], dtype=np.int32)


def encode_record(
    record: Record | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
) -> EncodedRecord:
    """Token ids and supervision of a record.

    The text is tokenised once, prompt and response together; character offsets say where the response begins.

    Args:
        record: a Record, or a mapping of the published layout.
        tokenizer: a fast HF tokenizer with a chat template.
        objective: "ranking" ends the prompt with `[` and holds no response; "generation" and "combined" hold it.
    Returns:
        EncodedRecord.
    Raises:
        PromptError: the record is not of the layout, its response is no permutation of its passages, or the tokenizer
            cannot be used (see `check_tokenizer`).
    """
    if objective not in get_args(Objective):
        raise PromptError(f"objective: found {objective!r}, allowed are {', '.join(get_args(Objective))}")
    if not isinstance(record, Record):
        record = Record.from_conversations(record)
    where = f"record {record.id!r}"
    try:
        style = identifier_style(record.response)
        # A turn that is not of the client's layout announces nothing: then the response says how many there are.
        num_candidates = num_announced(record.user) or record.response.count("[")
        permutation = parse_permutation(record.response, num_candidates, style)
    except PermutationError as error:
        raise PromptError(f"{where}: response: {error}") from error
    names = identifiers(num_candidates, style)
    ranks = np.array(ranks_from_permutation(permutation), dtype=np.int64)  # (N,)
    tokens = identifier_tokens(tokenizer, names)
    candidate_tokens: NDArray[np.int32] | None = None  # (N,)
    if objective != "generation" or None not in tokens:
        candidate_tokens = np.array(identifier_token_ids(tokenizer, num_candidates, style), dtype=np.int32)

    prompt = render_prompt(record, tokenizer)
    encoding = tokenise(prompt + ("[" if objective == "ranking" else record.response), tokenizer)
    score_position = bracket_position(encoding, len(prompt))
    ids = encoding["input_ids"]
    if objective == "ranking":
        return EncodedRecord(np.array(ids, dtype=np.int32), len(ids), score_position, candidate_tokens, ranks)

    start = len(prompt) + 1  # character of the first identifier
    for index in permutation:
        token = tokens[index]
        if token is not None and ids[encoding.char_to_token(start)] != token:
            raise PromptError(
                f"{where}: response: identifier [{names[index]}] is not the token {token} that it is elsewhere; use a "
                "tokenizer whose identifiers do not merge with what stands beside them"
            )
        start += len(names[index]) + len("] > [")
    input_ids = np.array([*ids, end_of_sequence(tokenizer)], dtype=np.int32)
    return EncodedRecord(input_ids, score_position, score_position, candidate_tokens, ranks)


def _is_list_of(values: object, kinds: tuple[type, ...]) -> bool:
    return (
        isinstance(values, Sequence)
        and not isinstance(values, (str, bytes))
        and all(isinstance(value, kinds) and not isinstance(value, bool) for value in values)
    )
