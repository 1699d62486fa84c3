"""Options that the recipe, the command line and Python share, each defined once: type, default, unit, bounds, meaning.

The classes are frozen pydantic dataclasses, so a value out of bounds is refused wherever it comes from. A recipe holds
them as sections, `rankllm-composer` generates its `--options` from them, and functions accept them as objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, Strict, StringConstraints, WrapValidator
from pydantic.dataclasses import dataclass

from rankllm_composer.environment import expand_path, keep_reference
from rankllm_composer.errors import Problem, SourceError, counted, worded
from rankllm_composer.prompts.clients import CURRENT_CLIENT, ClientVersion
from rankllm_composer.prompts.permutations import MAX_CANDIDATES, IdentifierStyle

IRDS = "irds:"
"""How the id of a data set of ir_datasets begins."""

ObjectiveName = Literal["generation", "ranking", "combined"]
"""What a model is trained for: language modeling of the permutation, a ranking loss, or both."""

OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
FROM_RUN = (
    "window",
    "stride",
    "lists_per_query",
    "depth",
    "max_passage_words",
    "identifiers",
    "seed",
    "require_relevant",
    "duplicates",
)
"""Options of a source that matter only for lists whose prompts it writes: those made from a first-stage run."""

FOR_PASSAGES = ("window", "max_passage_words", "identifiers", "seed")
"""Those of them that also matter for an `input` of queries with graded passages."""

MAX_SEED = 2**31 - 1
"""NumPy takes seeds of 32 bits; ranks and epochs add their number to that of a run."""

CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
"""For every class of options: unknown names, NaN and infinities are refused."""


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, Strict(), BeforeValidator(_whole)]
"""A whole number: 3 or 3.0, but neither "3" nor true."""

Number = Annotated[float, Strict()]
"""A number, but neither text nor true."""

Flag = Annotated[bool, Strict()]
"""True or false, but neither text nor a number."""


Word = Annotated[str, StringConstraints(strict=True, min_length=1)]
"""Text that is not empty and fits a pattern."""

Text = Annotated[Word, WrapValidator(keep_reference)]
"""Text that is not empty."""

PathText = Annotated[Text, BeforeValidator(expand_path)]
"""A path or URL as text, or a `pathlib.Path`, in which `~` and `$HOME` are expanded."""

AttentionName = Literal["auto", "packed_varlen", "packed_sdpa", "flash_attention_2"]
ATTENTION_NAMES: tuple[AttentionName, ...] = get_args(AttentionName)
Decoding = Literal["first_token", "generation"]
"""How a ranking is read from a model: from the logits of the first identifier, or from a generated answer."""

DECODINGS: tuple[Decoding, ...] = get_args(Decoding)
Ties = Literal["tied", "ordered"]
Unjudged = Literal["irrelevant", "left_out"]
TokenWeights = Literal["equal", "by_rank"]


def option(meaning: str, default: Any = ..., *, unit: str = "", **rules: Any) -> Any:
    """A field of a class of options.

    Args:
        meaning: one sentence for `--help`, docs/recipe.md and the JSON Schema.
        default: the default value, or a class of options that is created with its defaults; an option
            without a default is required.
        unit: of the number, or what the text names.
        rules: pydantic's bounds (`gt`, `ge`, `lt`, `le`) and `pattern`; `examples` holds texts that fit a pattern.
    """
    rules |= {"description": meaning, "json_schema_extra": {"unit": unit} if unit else None}
    if isinstance(default, dict | list):
        return Field(default_factory=default.copy, **rules)
    return Field(default_factory=default, **rules) if isinstance(default, type) else Field(default, **rules)


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SourceOptions:
    """Where teacher-ranked lists come from: records, or a first-stage run with judgments or a teacher's run."""

    input: PathText | None = option(
        "Training records: a file or a HF dataset id, see docs/what-it-reads.md; null = make them from `run`.",
        None,
        unit="path or id",
    )
    split: Text = option("Split of a HF dataset; files have none.", "train", unit="name")
    config: Text | None = option("Configuration of a HF dataset, if it has several.", None, unit="name")
    answers: Literal["strict", "lenient"] = option(
        "Answers of `input`: strict = complete permutations; lenient = whatever the inference client reads.", "strict"
    )
    run: PathText | None = option(
        "First-stage run: TREC, requests or results of rank_llm, or irds:ID.", None, unit="path or id"
    )
    judgments: PathText | None = option(
        "Judgments that order the lists of `run`: a file, a BEIR folder or irds:ID.", None, unit="path or id"
    )
    teacher_run: PathText | None = option(
        "Run of a teacher that orders the lists of `run`, in the same layouts.", None, unit="path or id"
    )
    queries: PathText | None = option(
        "Queries for `run`: a file, a BEIR folder or irds:ID; null = those that `run` holds.", None, unit="path or id"
    )
    docs: PathText | None = option(
        "Documents for `run`: a file, a BEIR folder or irds:ID; null = those that `run` holds.", None, unit="path or id"
    )
    window: Whole = option("Candidates in a list made from `run`.", 20, unit="candidates", ge=2)
    stride: Whole | None = option(
        "Step from one list to the next down `run`; null = half of the window.",
        None,
        unit="candidates",
        ge=1,
        le=1_000_000,
    )
    lists_per_query: Whole = option(
        "Lists made for each query of `run`; 0 = one for each window.", 1, unit="lists", ge=0, le=10_000
    )
    depth: Whole = option(
        "Candidates of `run` that are used, from the top.", 100, unit="candidates", ge=2, le=1_000_000
    )
    max_passage_words: Whole | None = option(
        "Words kept of a passage; null = as rank_llm: 300, and up to version 0.25.7 300 * 20 / n in lists of n.",
        None,
        unit="words",
        ge=1,
        le=1_000_000,
    )
    identifiers: IdentifierStyle = option("Identifiers of the candidates of lists made from `run`.", "letters")
    seed: Whole = option("Seed of the choice of lists.", 42, ge=0, le=MAX_SEED)
    require_relevant: Flag | None = option(
        "Leave out lists without a relevant candidate; null = where judgments give the order.", None
    )
    duplicates: Literal["stop", "first"] = option(
        "At a document that a query has twice in a run: an error, or keep the one with the highest score.", "stop"
    )
    on_error: Literal["stop", "quarantine"] = option(
        "At a bad record: stop the build, or write it to quarantine.jsonl and count it.", "stop"
    )

    @property
    def step(self) -> int:
        """Step from one list to the next, in candidates."""
        return self.stride or max(1, self.window // 2)

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong between these options; each key is the name of an option."""
        if (self.input is None) == (self.run is None):
            found = "null, as is run" if self.input is None else "set, and so is run"
            remedy = "Name the records in input, or the first-stage run in run."
            yield Problem("input", found, "exactly one of the two", remedy, ("run",))
        if self.run is None:
            for name in ("judgments", "teacher_run", "queries", "docs"):
                if getattr(self, name) is not None:
                    yield Problem(name, "set", "null without run", "Remove it, or set run.", ("run",))
            return
        if self.judgments is None and self.teacher_run is None:
            remedy = "Name the file that orders the candidates."
            yield Problem("judgments", "null, as is teacher_run", "at least one of the two", remedy, ("teacher_run",))
        if self.require_relevant and self.judgments is None:
            remedy = "Without judgments no candidate is relevant: name them."
            yield Problem("require_relevant", "true without judgments", "false or null", remedy, ("judgments",))
        most = MAX_CANDIDATES[self.identifiers]
        if self.window > most:
            remedy = "Use numbers or a smaller window." if self.identifiers == "letters" else "Use a smaller window."
            found = f"{self.window} with identifiers: {self.identifiers}"
            yield Problem("window", found, f"at most {most}", remedy, ("identifiers",))

    def check(self) -> None:
        """Raise SourceError with all `problems`, one per line, if there are any."""
        problems = "\n".join(map(str, self.problems()))
        if problems:
            raise SourceError(problems)


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ClientOptions:
    """What will serve the model."""

    client_version: ClientVersion = option("Version of rank_llm that is to serve the model.", CURRENT_CLIENT)


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class BuildOptions(ClientOptions):
    """How a set of shards is written."""

    part: Word | None = option(
        "Build only part I of N, such as 3/8; `shards merge` merges the parts.",
        None,
        pattern=r"^[1-9]\d*/[1-9]\d*$",
        examples=["3/8"],
    )
    num_processes: Whole | None = option(
        "Processes that parse, validate and compress; null = one per CPU once a source proves large.",
        None,
        unit="processes",
        ge=1,
    )
    hold_out: Number = option(
        "Share of the queries whose lists become a second set, OUTPUT-held-out, for data.eval; 0 = none.",
        0.0,
        unit="fraction of queries",
        ge=0,
        lt=1,
    )
    shard_bytes: Whole = option("Size of a shard before compression.", 16 << 20, unit="bytes", ge=1, lt=1 << 30)
    compression: Text | None = option(
        "Compression: zstd, zstd:LEVEL, gz, br, bz2 or snappy; null = not compressed.", "zstd"
    )
    hashes: tuple[Text, ...] = option(
        "Hashes of each shard that the index holds, by streaming's names.", ("xxh64",), min_length=1
    )
    overwrite: Flag = option("Replace another set at the same place.", False)
    staging: PathText | None = option(
        "Local folder where an upload is prepared; null = one in the temporary folder.", None, unit="path"
    )


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class StreamOptions:
    """How sets of shards are read while training."""

    shuffle: Flag = option("Read the lists in a random order.", True)
    cache_limit: Word | None = option(
        "Most bytes of `remote` cached in `local`; at least 4 times the largest shard; null = no limit.",
        None,
        unit="bytes",
        pattern=r"^(?i:\d+(\.\d+)?\s?[kmgt]b)$",
        examples=["100gb"],
    )
    num_canonical_nodes: Whole | None = option(
        "Nodes that the data order is made for; keep it to resume on another number; null = streaming's choice.",
        None,
        unit="nodes",
        ge=1,
    )
    store_patience_seconds: Whole = option(
        "How long a request to a store that fails for the moment is repeated before the run stops.",
        300,
        unit="seconds",
        ge=0,
    )
    download_timeout_seconds: Whole = option("Longest download of one shard.", 60, unit="seconds", ge=1)


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class BatchOptions:
    """Lists per update and per forward pass."""

    global_lists: Whole = option("Lists per optimizer step, over all ranks.", 128, unit="lists", ge=1)
    microbatch_lists: Whole | None = option(
        "Lists per forward pass of one rank; set this or microbatch_tokens.", None, unit="lists", ge=1
    )
    microbatch_tokens: Whole | None = option(
        "Most tokens per forward pass of one rank; set this or microbatch_lists.", None, unit="tokens", ge=1
    )
    packing: Flag = option(
        "Several lists in one forward pass; false = one, with the model's own attention, for models that mix the lists "
        "of a pack.",
        True,
    )

    @property
    def limits(self) -> tuple[int | None, int | None]:
        """Most lists and most tokens per forward pass of one rank; None = this limit is not set."""
        return (self.microbatch_lists, self.microbatch_tokens) if self.packing else (1, None)

    def problems(self, max_length_tokens: int) -> Iterator[Problem]:
        """Yield what is wrong with the microbatches for lists of up to `max_length_tokens`."""
        by_lists, by_tokens = "batch.microbatch_lists", "batch.microbatch_tokens"
        if self.packing and (self.microbatch_lists is None) == (self.microbatch_tokens is None):
            found = f"null, as is {by_tokens}" if self.microbatch_lists is None else f"set, and so is {by_tokens}"
            remedy = "Set one and leave the other at null."
            yield Problem(by_lists, found, "exactly one of the two", remedy, (by_tokens,))
        if self.packing and self.microbatch_tokens is not None and self.microbatch_tokens < max_length_tokens:
            expected = f"at least data.max_length_tokens={max_length_tokens}, so that every list fits"
            remedy = "Raise it or lower data.max_length_tokens."
            yield Problem(by_tokens, str(self.microbatch_tokens), expected, remedy, ("data.max_length_tokens",))

    def rank_problems(self, num_ranks: int) -> Iterator[Problem]:
        """Yield a problem with the nearest possible sizes if the lists do not divide over the ranks."""
        microbatch = self.limits[0] or 1
        step = num_ranks * microbatch
        if self.global_lists % step:
            factors = counted(num_ranks, "rank") + (f" of {microbatch} lists" if microbatch > 1 else "")
            below = self.global_lists // step * step
            sizes = " or ".join(str(size) for size in (below, below + step) if size)
            remedy = f"Set batch.global_lists={sizes}, or change the number of ranks."
            yield Problem("batch.global_lists", str(self.global_lists), f"a multiple of {step} ({factors})", remedy)


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ModelOptions:
    """Which causal LM, from where, and how it computes."""

    name_or_path: PathText = option("HF model id, or a folder with config and safetensors.", unit="id or path")
    tokenizer: PathText | None = option("HF tokenizer id or folder; null = name_or_path.", None, unit="id or path")
    revision: Text | None = option(
        "Branch, tag or commit of the HF model id; null = its default.", None, unit="revision"
    )
    trust_remote_code: Flag = option("Run code that comes with the model.", False)
    template_date: Text | None = option(
        "Date in place of today's in prompts whose chat template prints it; exports write it into their template.",
        None,
        unit="date",
        pattern=r"^[12]\d{3}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])$",
        examples=["2024-07-26"],
    )
    random_weights: Flag = option("Build from the config only, with fresh weights, instead of loading them.", False)
    config_overrides: dict[str, Any] = option("Values that override the HF config, under its own names.", {})
    attention: AttentionName = option(
        "Attention over packed sequences; auto = packed_varlen, torch's own kernel, on a GPU, else packed_sdpa.", "auto"
    )
    activation_checkpointing: Number = option(
        "Share of the decoder layers whose activations are recomputed in the backward pass.",
        0.0,
        unit="fraction of layers",
        ge=0,
        le=1,
    )
    keep_attention: Flag = option(
        "In these layers, keep the output of attention and recompute the rest: more memory, less time.", False
    )
    compile: Flag = option("Compile the model with torch.compile.", False)


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class RerankOptions:
    """How candidates are reranked with a model, and how its answers are decoded."""

    window_size: Whole | None = option("Candidates per window; null = the contract's.", None, unit="candidates", ge=2)
    stride: Whole | None = option("Step of the window; null = the contract's.", None, unit="candidates", ge=1)
    passes: Whole = option("Times the window slides over each list.", 1, unit="passes", ge=1)
    top_k: Whole = option("Candidates reranked; the rest follow in their order.", 100, unit="candidates", ge=2)
    decoding: Decoding | None = option("How rankings are decoded; null = as the model was trained.", None)
    objective: ObjectiveName | None = option(
        "What a model without reranker.json was trained for; null = the contract's, or by `decoding`.", None
    )
    identifiers: IdentifierStyle | None = option(
        "Identifiers that a model without reranker.json was trained with; null = the contract's.", None
    )
    prompt_template: PathText | None = option(
        "Prompt template of rank_llm of the training of a model without reranker.json; null = the contract's, or the "
        "published one.",
        None,
        unit="path",
    )
    client_version: ClientVersion | None = option(
        "Version of rank_llm whose prompts and reading are used; null = the contract's, or the current one.", None
    )
    context_size_tokens: Whole | None = option(
        "Most tokens of prompt and answer together; null = the contract's, or at most 4096.", None, unit="tokens", ge=1
    )
    constrained: Flag = option("Restrict generation to well-formed answers.", False)
    batch_tokens: Whole = option("Most tokens in one forward pass.", 16384, unit="tokens", ge=1)
    queries_at_once: Whole = option("Queries whose windows are packed together.", 32, unit="queries", ge=1)
    attention: AttentionName = option(
        "Attention over packed sequences; auto = packed_varlen, torch's own kernel, on a GPU, else packed_sdpa.", "auto"
    )
    revision: Text | None = option(
        "Branch, tag or commit of the HF model id; null = its default.", None, unit="revision"
    )
    trust_remote_code: Flag = option("Run code that comes with the model.", False)
    device: Text | None = option("torch's name of a device; null = cuda where there is one, else cpu.", None)
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        "Type of the weights; null = as stored on cuda, float32 on cpu.", None
    )
