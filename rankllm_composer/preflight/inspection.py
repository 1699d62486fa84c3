"""Show one record as the model will see it: its tokens, which of them are supervised, and problems.

rankllm-composer inspect RECIPE [--record K] [--loss]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rankllm_composer.errors import PromptError, ShardError
from rankllm_composer.escaping import for_screen
from rankllm_composer.export.serving_check import serving_differences, shown_token
from rankllm_composer.options import ObjectiveName
from rankllm_composer.preflight.hub import is_cached, require_hub
from rankllm_composer.prompts.chat import control_tokens_in, template_notes
from rankllm_composer.prompts.clients import CURRENT_CLIENT, ClientVersion
from rankllm_composer.prompts.contract import count_bos
from rankllm_composer.prompts.encoding import EncodedRecord, encode_record
from rankllm_composer.prompts.identifier_tokens import identifier_token_ids
from rankllm_composer.prompts.permutations import identifier_style
from rankllm_composer.prompts.prompt_template import Prompt
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.relevance import LEFT_OUT, Preferences, Relevance, draw_ties, relevance_of, tied_share
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, UserTurn
from rankllm_composer.prompts.windows import fit_window

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from rankllm_composer.model.reranker import ListwiseReranker
    from rankllm_composer.recipe.sections import Recipe

Kind = Literal["prompt", "supervised", "score", "identifier"]

# Kind → legend, ANSI color, marks in output without color.
KINDS: dict[Kind, tuple[str, str, tuple[str, str]]] = {
    "prompt": ("prompt", "\033[2m", ("", "")),
    "supervised": ("supervised", "\033[32m", ("⟨", "⟩")),
    "score": ("score position", "\033[1;7;33m", ("⟪", "⟫")),
    "identifier": ("identifier, supervised", "\033[1;36m", ("⟦", "⟧")),
}
_PLAIN = "\033[0m"


@dataclass
class Inspection:
    """A record as training presents it, with its tokens, problems and notes that do not prevent training."""

    record: Record
    max_length_tokens: int
    encoded: EncodedRecord | None = None  # None if it cannot be encoded
    tokens: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    scores: NDArray[np.float32] | None = None  # (N,)
    preferences: Preferences = field(default_factory=Preferences)

    def relevance(self, encoded: EncodedRecord) -> Relevance:
        """What a ranking loss learns from the record."""
        return relevance_of(self.record, encoded.ranks, self.preferences)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def lines(self, color: bool) -> Iterator[str]:
        """Yield the lines to print, escaped for a terminal, with ANSI colors or with marks around supervised tokens."""
        yield f"record {for_screen(self.record.id, one_line=True)}"
        if self.encoded is not None:
            yield "legend " + ", ".join(_mark(kind, text, color) for kind, (text, _, _) in KINDS.items())
            yield ""
            yield from _marked_lines(self.tokens, self.kinds, color)
            yield ""
            yield from self._summary(self.encoded)
            yield from self._candidates(self.encoded)
        yield from (f"loss {name:<18} {value:.6f}" for name, value in self.losses.items())
        yield from (f"note: {for_screen(text)}" for text in self.notes)
        yield from (f"problem: {for_screen(text)}" for text in self.problems)

    def _summary(self, encoded: EncodedRecord) -> Iterator[str]:
        fits = self.length <= self.max_length_tokens
        outcome = "fits" if fits else "too long, and lists are never truncated"
        yield f"length          {self.length:,} tokens of at most {self.max_length_tokens:,}: {outcome}"
        supervised = self.length - encoded.response_start
        if supervised:
            yield f"prompt          {encoded.response_start:,} tokens"
            yield f"supervised      {supervised:,} tokens, {self.kinds.count('identifier')} of them identifiers"
        else:
            yield f"prompt          {self.length:,} tokens, with '[' appended; supervises the scores, no tokens"
        yield f"score position  token {encoded.score_position:,}; the logits after it are the identifiers' scores"
        if encoded.split_token is not None:
            yield (
                f"boundary        after token {encoded.score_position:,}: the tokenizer alone would join "
                f"{for_screen(encoded.split_token, one_line=True)!r}; training and rank_llm (0.26) split it"
            )

    def _candidates(self, encoded: EncodedRecord) -> Iterator[str]:
        record, ids = self.record, encoded.identifier_token_ids
        columns: dict[str, Sequence[Any] | None] = {
            "identifier token": None if ids is None else ids.tolist(),
            "teacher's rank": ["-" if rank == LEFT_OUT else rank for rank in self.relevance(encoded).ranks.tolist()],
            "score": None if self.scores is None else [f"{score:.4f}" for score in self.scores],
            "grade": _values(record.grades),
            "teacher's score": _values(record.scores),
            "docid": record.docids,
        }
        known = {name: values for name, values in columns.items() if values is not None}
        shown = {name: [name, *(for_screen(one, one_line=True) for one in values)] for name, values in known.items()}
        yield ""
        for row in zip(*shown.values()):
            yield "  ".join(f"{cell:>{max(map(len, column))}}" for cell, column in zip(row, shown.values()))


def _values(known: Sequence[float | None] | None) -> list[str] | None:
    return None if known is None else ["-" if value is None else f"{value:g}" for value in known]


def inspect_record(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    objective: ObjectiveName,
    *,
    max_length_tokens: int,
    too_long: Literal["drop", "refuse"] = "drop",
    client: ClientVersion = CURRENT_CLIENT,
    preferences: Preferences | None = None,
) -> Inspection:
    """Encode a record, as training presents it, and find what prevents training on it or serving it as intended."""
    found = Inspection(record, max_length_tokens, preferences=preferences or Preferences())
    try:
        found.encoded = encoded = encode_record(record, tokenizer, objective)
    except PromptError as error:
        found.problems.append(str(error))
        return found
    found.tokens = tuple(tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist()))
    found.kinds = tuple(_kinds(encoded))
    if found.length > max_length_tokens:
        outcome = "drops and counts it" if too_long == "drop" else "stops with an error"
        found.problems.append(
            f"data.max_length_tokens is {max_length_tokens:,} but the list has {found.length:,} tokens; training "
            f"{outcome}. Raise the limit, or build shards with fewer words per passage."
        )
    found.problems += serving_differences(record, tokenizer)
    found.notes += _notes(record, tokenizer, encoded)
    found.notes += _passage_notes(record, tokenizer, max_length_tokens, client)
    return found


def _passage_notes(
    record: Record, tokenizer: PreTrainedTokenizerBase, max_length_tokens: int, client: ClientVersion
) -> Iterator[str]:
    """What of the passages is not shown, here or by the inference client in the same context."""
    try:
        turn = record.turn
        prompt = Prompt(turn.style, record.template)
        shared: dict[str, Any] = {"prompt": prompt, "context_size_tokens": max_length_tokens, "client": client}
        served = fit_window(record.id, turn.query, turn.passages, tokenizer, **shared)
    except PromptError:
        return
    empty = sum(not passage.strip() for passage in turn.passages)
    if empty:
        yield f"{empty} of {len(turn.passages)} passages are empty"
    if served.client_empties:
        yield (
            f"rank_llm would show every passage of this list empty in a context of {max_length_tokens:,} tokens: it "
            "cuts at spaces, which long parts of these passages lack; `rerank` cuts them between characters"
        )


def _kinds(encoded: EncodedRecord) -> Iterator[Kind]:
    identifiers = set() if encoded.identifier_token_ids is None else set(encoded.identifier_token_ids.tolist())
    for place, token in enumerate(encoded.input_ids.tolist()):
        if place == encoded.score_position:
            yield "score"
        elif place < encoded.response_start:
            yield "prompt"
        else:
            yield "identifier" if token in identifiers else "supervised"


def _notes(record: Record, tokenizer: PreTrainedTokenizerBase, encoded: EncodedRecord) -> Iterator[str]:
    count = count_bos(encoded.input_ids.tolist(), tokenizer)
    if count > 1:
        yield f"{count} beginning-of-sequence tokens, as in the inference client's prompts"
    if record.template is None and record.system != SYSTEM_MESSAGE:
        yield f"the system message differs from the inference client's, {SYSTEM_MESSAGE!r}"
    turn: UserTurn | None = None
    with suppress(PromptError):
        turn = record.turn
    if record.template is not None:
        yield "the prompt is that of data.prompt_template, written from the record's query and passages"
    elif turn is not None and turn.has_several_readings:
        yield (
            "a line in a passage opens like the next passage, so the user turn has several readings; training uses it "
            "as it is, but its passages cannot be shuffled or renamed"
        )
    elif not record.has_standard_prompt:
        difference = "the user turn differs from the inference client's"
        yield f"{difference}; training uses it as it is, but the client will send its own"
    control = control_tokens_in(record.prompt_turns[1], tokenizer)
    if control:
        where = "the query or a passage" if record.template is None else "the query, a passage or the prompt template"
        yield f"{where} contains {', '.join(control)}, which becomes a special token, also when serving"
    yield from template_notes(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield "the padding token is the end-of-sequence token; harmless, because training does not pad"
    if share := tied_share(record):
        yield f"{share:.0%} of the pairs of candidates are tied by {record.ordered_by}, which ordered the list"
    if encoded.identifier_token_ids is None:
        try:
            identifier_token_ids(tokenizer, len(encoded.ranks), identifier_style(record.response), "generation")
        except PromptError as error:
            yield f"the list can be generated, but not scored by its first token: {error}"


def add_losses(found: Inspection, model: ListwiseReranker) -> None:
    """Add the parts of an encoded record's loss, without dropout and noise, and its identifier scores, on the CPU."""
    import torch

    from rankllm_composer.data import packing
    from rankllm_composer.model.objective import identifier_scores
    from rankllm_composer.prompts.record import record_key

    if found.encoded is None:
        return
    relevance = found.relevance(found.encoded)
    row = packing.TokenizedList(found.encoded, found.record.id, record_key(found.record.id), relevance)
    (batch,) = packing.split_batch({"sequences": [row]}, max_lists=1)
    model.eval()
    with torch.no_grad():
        outputs = model.forward(batch)
        found.losses = {name: float(value) for name, value in model.loss(outputs, batch).items()}
        if found.encoded.identifier_token_ids is not None:
            found.scores = identifier_scores(outputs["logits"], batch)[0].numpy()
    not_finite = [name for name, value in found.losses.items() if not np.isfinite(value)]
    if not_finite:
        found.problems.append(f"the loss is not finite ({', '.join(not_finite)}). Check the weights of the model.")


def _mark(kind: Kind, text: str, color: bool) -> str:
    _, code, (begin, end) = KINDS[kind]
    return f"{code}{text}{_PLAIN}" if color else f"{begin}{text}{end}"


def _marked_lines(tokens: Sequence[str], kinds: Sequence[Kind], color: bool, width: int = 110) -> Iterator[str]:
    """Join tokens with spaces, in lines of about `width` characters that also end at line breaks of the prompt."""
    line: list[str] = []
    used = 0
    for kind, run in groupby(zip(kinds, tokens), key=lambda pair: pair[0]):
        for _, token in run:
            text = shown_token(token)
            line.append(_mark(kind, text, color))
            used += len(text) + 1
            if used >= width or "↵" in text:
                yield " ".join(line)
                line, used = [], 0
    if line:
        yield " ".join(line)


def inspect_recipe(recipe: Recipe, number: int, *, loss: bool) -> Inspection:
    """Inspect a record of `data.train` as the recipe presents it in the first epoch.

    Args:
        number: index from 0, in the order of the shards, or of the source if there are no shards yet.
        loss: whether to load the model on the CPU and compute the parts of the loss.
    Raises:
        RankLLMComposerError: record, tokenizer or model cannot be loaded.
    """
    from dataclasses import replace

    from rankllm_composer.model.loading import load_tokenizer
    from rankllm_composer.prompts.record import augment_record
    from rankllm_composer.shards.contents import SetContents, count_lists, read_contents
    from rankllm_composer.shards.read import SplitRecords
    from rankllm_composer.training.assembly import build_contract, build_model, sets_of

    split = recipe.data.train
    fetch = partial(require_hub, "data.train.source.input")
    records = SplitRecords(sets_of(split), split.source, split.rebuild, recipe.data.client_version, fetch)
    stored = records[number]
    record = replace(stored, template=recipe.data.prompt_template)
    shuffle, style = split.shuffle_passages, split.identifiers
    preferences = Preferences(recipe.objective.ties, recipe.objective.unjudged)
    if shuffle or style is not None:
        record = augment_record(record, seed=recipe.run.seed, epoch=0, shuffle_passages=shuffle, identifiers=style)
    if preferences.ties == "tied":
        record = draw_ties(record, seed=recipe.run.seed, epoch=0)
    if not is_cached(recipe.tokenizer, "tokenizer_config.json"):
        require_hub("model.tokenizer", recipe.tokenizer)
    tokenizer = load_tokenizer(recipe.model)
    limit, too_long = recipe.data.max_length_tokens, recipe.data.too_long
    found = inspect_record(
        record,
        tokenizer,
        recipe.objective.name,
        max_length_tokens=limit,
        too_long=too_long,
        client=recipe.data.client_version,
        preferences=preferences,
    )
    found.notes.insert(0, f"record {number} of {records.place}")
    try:  # the lists of the whole set; of a source without shards, this record
        contents = read_contents(sets_of(split)) if records.has_shards else SetContents(count_lists([stored]))
        build_contract(recipe, tokenizer, contents)
    except (PromptError, ShardError) as error:
        found.problems.append(str(error))
    if loss:
        on_cpu = replace(recipe, model=replace(recipe.model, attention="auto"))  # flash-attn does not run on a CPU
        add_losses(found, build_model(on_cpu, tokenizer, "cpu"))
    return found
