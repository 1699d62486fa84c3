"""One record as the model will see it: its tokens, what supervises, what the limit does, and what is wrong.

rankllm-composer inspect RECIPE [--record K] [--loss]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rankllm_composer.errors import PromptError
from rankllm_composer.export.serving_check import serving_differences
from rankllm_composer.options import ObjectiveName
from rankllm_composer.prompts.contract import count_bos
from rankllm_composer.prompts.encoding import EncodedRecord, encode_record
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankllm_composer.model.reranker import ListwiseReranker

Kind = Literal["prompt", "supervised", "score", "identifier"]


# Kind: what the legend says, colour (ANSI), marks where there is no colour.
KINDS: dict[Kind, tuple[str, str, tuple[str, str]]] = {
    "prompt": ("prompt", "\033[2m", ("", "")),
    "supervised": ("supervised", "\033[32m", ("⟨", "⟩")),
    "score": ("score position", "\033[1;7;33m", ("⟪", "⟫")),
    "identifier": ("identifier, supervised", "\033[1;36m", ("⟦", "⟧")),
}


_PLAIN = "\033[0m"


@dataclass
class Inspection:
    """What was found in a record.

    Attributes:
        record: the record, laid out as training lays it out.
        max_length_tokens: longest list that is trained.
        encoded: its tokens; None where it cannot be encoded.
        tokens: text of each token, as the tokenizer writes it.
        kinds: kind of each token.
        problems: what is wrong, each as where, what was found, what to do; empty = all is well.
        notes: what is right but may surprise.
        losses: loss parts of the record, if they were computed.
        scores: (N,) identifier scores, if they were computed.
    """

    record: Record
    max_length_tokens: int
    encoded: EncodedRecord | None = None
    tokens: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    scores: np.ndarray | None = None

    @property
    def length(self) -> int:
        return len(self.tokens)

    def lines(self, colour: bool) -> Iterator[str]:
        """The inspection for people.

        Args:
            colour: True = ANSI colours, False = marks around tokens that are no prompt.
        """
        yield f"record {self.record.id}"
        if self.encoded is not None:
            yield "legend " + ", ".join(_mark(kind, text, colour) for kind, (text, _, _) in KINDS.items())
            yield ""
            yield from _marked_lines(self.tokens, self.kinds, colour)
            yield ""
            yield from self._facts(self.encoded)
            yield from self._candidates(self.encoded)
        yield from (f"loss {name:<18} {value:.6f}" for name, value in self.losses.items())
        yield from (f"note: {text}" for text in self.notes)
        yield from (f"problem: {text}" for text in self.problems)

    def _facts(self, encoded: EncodedRecord) -> Iterator[str]:
        fits = self.length <= self.max_length_tokens
        fate = "trained whole" if fits else "not trained; a list is never cut"
        yield f"length          {self.length:,} tokens of at most {self.max_length_tokens:,}: {fate}"
        supervised = self.length - encoded.response_start
        if supervised:
            yield f"prompt          {encoded.response_start:,} tokens"
            yield f"supervised      {supervised:,} tokens, {self.kinds.count('identifier')} of them identifiers"
        else:
            yield f"prompt          {self.length:,} tokens, '[' appended; no token is supervised, scores are"
        yield f"score position  token {encoded.score_position:,}; the logits after it are the identifiers' scores"

    def _candidates(self, encoded: EncodedRecord) -> Iterator[str]:
        record, ids = self.record, encoded.identifier_token_ids
        columns: dict[str, Sequence[Any] | None] = {
            "identifier token": None if ids is None else ids.tolist(),
            "teacher's rank": encoded.ranks.tolist(),
            "score": None if self.scores is None else [f"{score:.4f}" for score in self.scores],
            "grade": record.grades,
            "docid": record.docids,
        }
        shown = {name: [name, *map(str, values)] for name, values in columns.items() if values is not None}
        yield ""
        for row in zip(*shown.values()):
            yield "  ".join(f"{cell:>{max(map(len, column))}}" for cell, column in zip(row, shown.values()))


def inspect_record(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    objective: ObjectiveName,
    *,
    max_length_tokens: int,
    too_long: Literal["drop", "refuse"] = "drop",
) -> Inspection:
    """A record through the tokenizer, and everything that would keep it from being trained or served as it is meant.

    Args:
        record: as training lays it out.
        tokenizer: fast HF tokenizer.
        objective: "generation", "ranking" or "combined".
        max_length_tokens: longest list that is trained.
        too_long: what becomes of a longer one.
    Returns:
        Inspection; what is wrong is in `problems`.
    """
    found = Inspection(record, max_length_tokens)
    try:
        found.encoded = encoded = encode_record(record, tokenizer, objective)
    except PromptError as error:
        found.problems.append(str(error))
        return found
    found.tokens = tuple(tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist()))
    found.kinds = tuple(_kinds(encoded))
    if found.length > max_length_tokens:
        fate = "dropped and counted" if too_long == "drop" else "refused, and the run stops"
        found.problems.append(
            f"data.max_length_tokens: found a list of {found.length:,} tokens, allowed are {max_length_tokens:,}; it "
            f"is {fate}. Raise the limit, or build shards with fewer words a passage"
        )
    found.problems += serving_differences(record, tokenizer)
    found.notes += _surprises(record, tokenizer, encoded)
    return found


def _kinds(encoded: EncodedRecord) -> Iterator[Kind]:
    identifiers = set() if encoded.identifier_token_ids is None else set(encoded.identifier_token_ids.tolist())
    for place, token in enumerate(encoded.input_ids.tolist()):
        if place == encoded.score_position:
            yield "score"
        elif place < encoded.response_start:
            yield "prompt"
        else:
            yield "identifier" if token in identifiers else "supervised"


def _surprises(record: Record, tokenizer: PreTrainedTokenizerBase, encoded: EncodedRecord) -> Iterator[str]:
    count = count_bos(encoded.input_ids.tolist(), tokenizer)
    if count > 1:
        yield f"{count} beginning-of-sequence tokens; the inference client's prompts have as many"
    if record.system != SYSTEM_MESSAGE:
        yield f"the system text is not the inference client's, which is {SYSTEM_MESSAGE!r}"
    if not record.has_standard_prompt:
        yield (
            "the user turn is in another wording than the inference client's; it trains as it stands, the client will "
            "ask otherwise"
        )
    written = Counter(tokenizer(record.user, add_special_tokens=False)["input_ids"])
    special = sorted(set(tokenizer.all_special_ids) & set(written))
    if special:
        names = ", ".join(tokenizer.convert_ids_to_tokens(special))
        yield f"the text of query or passages holds {names}, which becomes a special token, in serving too"
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield "pad and end of sequence are one token; nothing is padded here, so it is harmless"
    if encoded.identifier_token_ids is None:
        yield "identifiers take several tokens: this list can be generated, not scored at its first token"


def add_losses(found: Inspection, model: ListwiseReranker) -> None:
    """Compute the loss parts of an inspected record, without dropout and noise, and its identifier scores.

    Args:
        found: takes them; a record that could not be encoded gets none.
        model: on the CPU.
    """
    import torch

    from rankllm_composer.data import packing
    from rankllm_composer.model.objective import identifier_scores
    from rankllm_composer.prompts.record import record_key

    if found.encoded is None:
        return
    row = packing.TokenizedList(found.encoded, found.record.id, record_key(found.record.id))
    (batch,) = packing.split_batch({"sequences": [row]}, max_lists=1)
    model.eval()
    with torch.no_grad():
        outputs = model.forward(batch)
        found.losses = {name: float(value) for name, value in model.loss(outputs, batch).items()}
        if found.encoded.identifier_token_ids is not None:
            found.scores = identifier_scores(outputs["logits"], batch)[0].numpy()
    not_finite = [name for name, value in found.losses.items() if not np.isfinite(value)]
    if not_finite:
        found.problems.append(f"loss: found {', '.join(not_finite)} not finite; look at the weights of the model")


def _mark(kind: Kind, text: str, colour: bool) -> str:
    _, code, (begin, end) = KINDS[kind]
    return f"{code}{text}{_PLAIN}" if colour else f"{begin}{text}{end}"


def _marked_lines(tokens: Sequence[str], kinds: Sequence[Kind], colour: bool, width: int = 110) -> Iterator[str]:
    """Tokens parted by spaces, in lines of about `width` characters; the prompt's own line breaks begin new ones."""
    line: list[str] = []
    used = 0
    for kind, run in groupby(zip(kinds, tokens), key=lambda pair: pair[0]):
        for _, token in run:
            text = token.replace("\n", "↵").replace("Ċ", "↵").replace("<0x0A>", "↵")
            line.append(_mark(kind, text, colour))
            used += len(text) + 1
            if used >= width or "↵" in text:
                yield " ".join(line)
                line, used = [], 0
    if line:
        yield " ".join(line)


def inspect_recipe(recipe: Any, number: int, *, loss: bool) -> Inspection:
    """Record `number` of `data.train` as a recipe trains it in its first epoch.

    Args:
        recipe: a `recipe.Recipe`.
        number: counted from 0, in the order of the shards (or of the source, where there are none yet).
        loss: load the model into main memory and compute the record's loss parts on the CPU.
    Raises:
        ShardError, RecordError, ModelError, PromptError: what stands in the way.
    """
    from dataclasses import replace

    from rankllm_composer.model.loading import load_tokenizer
    from rankllm_composer.prompts.record import augment_record
    from rankllm_composer.shards.read import SplitRecords
    from rankllm_composer.training.assembly import build_model

    split = recipe.data.train
    sets = [(s.local, s.remote) for s in split.streams] or [(split.local, split.remote)]
    records = SplitRecords(sets, split.source)
    record = records[number]
    if split.shuffle_passages or split.identifiers is not None:
        record = augment_record(
            record,
            seed=recipe.run.seed,
            epoch=0,
            shuffle_passages=split.shuffle_passages,
            identifiers=split.identifiers,
        )
    tokenizer = load_tokenizer(recipe.model)
    found = inspect_record(
        record,
        tokenizer,
        recipe.objective.name,
        max_length_tokens=recipe.data.max_length_tokens,
        too_long=recipe.data.too_long,
    )
    found.notes.insert(0, f"record {number} of {records.place}")
    if loss:
        here = replace(recipe, model=replace(recipe.model, attention="auto"))  # flash-attn does not run on a CPU
        add_losses(found, build_model(here, tokenizer, "cpu"))
    return found
