"""What the lists of a set ask of a tokenizer and of a served model: identifiers, window and stride.

One rule for training, inspection, evaluation and the decoding contract, by the identifiers that the lists really use.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from rankllm_composer.errors import PromptError
from rankllm_composer.options import Decoding, ObjectiveName
from rankllm_composer.prompts.identifier_tokens import check_tokenizer, identifier_token_ids
from rankllm_composer.prompts.permutations import IdentifierStyle
from rankllm_composer.prompts.prompt_template import PromptTemplate
from rankllm_composer.prompts.record import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ListKind = tuple[IdentifierStyle, int]
"""Style of a list's identifiers, and its number of candidates."""

ListCounts = Mapping[ListKind, int]
"""Number of lists of each kind, over all streams of a set."""


class TrainedWindow(NamedTuple):
    """The window that a model was trained on: style of its identifiers, candidates, and step down a longer list."""

    style: IdentifierStyle
    size: int
    stride: int


def list_kind(record: Record, identifiers: IdentifierStyle | None = None) -> ListKind:
    """Kind of a list, as `identifiers` renames it; None = as it is written."""
    return identifiers or record.turn.style, len(record.turn.passages)


def trained_window(lists: ListCounts, strides: Collection[int] = ()) -> TrainedWindow:
    """Window to rerank with by default: every identifier it shows was trained, and every trained list fits.

    The style is that of most lists (letters if equal), the size that of the longest list of this style.

    Args:
        lists: the training lists.
        strides: strides by which the lists were cut from longer ones, as far as known; half the window unless they
            agree on one that is shorter than the window.
    Raises:
        PromptError: there are no lists.
    """
    if not any(lists.values()):
        raise PromptError("lists: none; expected at least one, whose identifiers the contract can name")
    num_lists: dict[IdentifierStyle, int] = {"letters": 0, "numbers": 0}
    for (style, _), number in lists.items():
        num_lists[style] += number
    style = max(num_lists, key=lambda name: num_lists[name])
    size = max(size for (name, size), number in lists.items() if name == style and number)
    chosen = set(strides)
    stride = chosen.pop() if len(chosen) == 1 else size
    return TrainedWindow(style, size, stride if stride < size else max(1, size // 2))


def check_lists(
    tokenizer: PreTrainedTokenizerBase,
    objective: ObjectiveName,
    lists: ListCounts,
    template: PromptTemplate | None = None,
) -> None:
    """Check that a tokenizer can train all these lists with an objective, and that a template reads their answers.

    Raises:
        PromptError: see `check_tokenizer` and `PromptTemplate.check_reads`; the message names the longest list of the
            style that fails.
    """
    for style, size in _longest(lists):
        if template is not None:
            template.check_reads(size, style)
        try:
            check_tokenizer(tokenizer, objective, style, size)
        except PromptError as error:
            raise PromptError(f"lists of {size} candidates named by {style}, objective {objective}: {error}") from error


def unreadable_decodings(
    tokenizer: PreTrainedTokenizerBase, objective: ObjectiveName, lists: ListCounts
) -> dict[Decoding, str]:
    """Decodings that cannot rank these lists with a model of this objective, each with the reason.

    Lists that `check_lists` accepts have at least one decoding left: generation for the objective generation, first
    token for the others.
    """
    reasons: dict[Decoding, str] = {}
    if objective == "ranking":
        reasons["generation"] = "a model trained by ranking alone never learned to write an answer"
    for style, size in _longest(lists):
        try:
            identifier_token_ids(tokenizer, size, style, objective)
        except PromptError as error:
            reasons["first_token"] = str(error)
    return reasons


def _longest(lists: ListCounts) -> list[ListKind]:
    """The longest list of each style, which decides what the shorter ones need too."""
    longest: dict[IdentifierStyle, int] = {}
    for (style, size), number in lists.items():
        if number:
            longest[style] = max(size, longest.get(style, 0))
    return sorted(longest.items())
