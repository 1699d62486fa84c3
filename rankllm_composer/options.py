"""Options that the recipe, the command line and Python share, each defined once: type, default, unit, bounds, meaning.

The classes are frozen pydantic dataclasses, so a value out of bounds is refused wherever it comes from. A recipe holds
them as sections, `rankllm-composer` makes its `--options` from them, and functions take them whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from rankllm_composer.errors import Problem, SourceError
from rankllm_composer.prompts.permutations import MAX_CANDIDATES, IdentifierStyle

ObjectiveName = Literal["generation", "ranking", "combined"]
"""What a model is trained for: language modeling of the permutation, a ranking loss, or both."""

OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)

CONFIG = ConfigDict(extra="forbid")
"""For every class of options: unknown names are refused."""

PathText = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]
"""A path or URL as text; a `pathlib.Path` is taken too."""


Decoding = Literal["first_token", "generation"]
"""How a ranking is read from a model: from the logits of the first identifier, or from a generated answer."""

DECODINGS: tuple[Decoding, ...] = get_args(Decoding)


def option(meaning: str, default: Any = ..., *, unit: str = "", **rules: Any) -> Any:
    """A field of a class of options.

    Args:
        meaning: one sentence for `--help`, docs/recipe.md and the JSON Schema.
        default: the value where nothing is given; an option without one has to be given.
        unit: of the number, or what the text names.
        rules: pydantic's bounds (`gt`, `ge`, `lt`, `le`) and `pattern`; `examples` holds texts that fit a pattern.
    """
    extra: dict[str, Any] | None = {"unit": unit} if unit else None
    if isinstance(default, dict | list):
        return Field(default_factory=default.copy, description=meaning, json_schema_extra=extra, **rules)
    return Field(default, description=meaning, json_schema_extra=extra, **rules)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SourceOptions:
    """Where teacher-ranked lists come from: records, or a first-stage run with judgments or a teacher's run."""

    input: PathText | None = option(
        "Training records: .json, .jsonl or a HF dataset id; null = make them from `run`.", None, unit="path or id"
    )
    split: str = option("Split of a HF dataset; files have none.", "train", unit="name")
    run: PathText | None = option("First-stage run in TREC format.", None, unit="path")
    judgments: PathText | None = option("TREC judgments that order the lists of `run`.", None, unit="path")
    teacher_run: PathText | None = option("TREC run of a teacher that orders the lists of `run`.", None, unit="path")
    queries: PathText | None = option("Queries for `run`, one JSON object per line.", None, unit="path")
    docs: PathText | None = option("Documents for `run`, one JSON object per line.", None, unit="path")
    window: int = option("Candidates in a list made from `run`.", 20, unit="candidates", ge=2)
    stride: int = option("Step from one list to the next down `run`.", 10, unit="candidates", ge=1, le=1_000_000)
    lists_per_query: int = option(
        "Lists made for each query of `run`; 0 = one for each window.", 1, unit="lists", ge=0, le=10_000
    )
    depth: int = option("Candidates of `run` that are used, from the top.", 100, unit="candidates", ge=2, le=1_000_000)
    max_passage_words: int | None = option(
        "Words kept of a passage; null = the inference client's rule: 300, and 300 * 20 / n in lists of n < 20.",
        None,
        unit="words",
        ge=1,
        le=1_000_000,
    )
    identifiers: IdentifierStyle = option("Identifiers of the candidates of lists made from `run`.", "letters")
    seed: int = option("Seed of the choice of lists.", 42, ge=0)
    require_relevant: bool | None = option(
        "Leave out lists without a relevant candidate; null = where judgments give the order.", None
    )
    on_error: Literal["stop", "quarantine"] = option(
        "At a bad record: stop the build, or write it to quarantine.jsonl and count it.", "stop"
    )

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong between these options; each key is the name of an option."""
        if (self.input is None) == (self.run is None):
            found = "neither it nor run" if self.input is None else "it and run both"
            yield Problem(
                "input", found, "one of the two", "name the records in input, or the first-stage run in run", ("run",)
            )
        if self.run is None:
            for name in ("judgments", "teacher_run", "queries", "docs"):
                if getattr(self, name) is not None:
                    yield Problem(name, "a path", "null without run", "remove it or give the run", ("run",))
            return
        for name in ("queries", "docs"):
            if getattr(self, name) is None:
                yield Problem(name, "null", "a path, as run is given", f"name the {name}", ("run",))
        if self.judgments is None and self.teacher_run is None:
            yield Problem(
                "judgments",
                "neither it nor teacher_run",
                "at least one of the two",
                "name what orders the candidates",
                ("teacher_run",),
            )
        if self.require_relevant and self.judgments is None:
            yield Problem(
                "require_relevant",
                "true without judgments",
                "false or null",
                "without judgments nothing is relevant: give them",
                ("judgments",),
            )
        most = MAX_CANDIDATES[self.identifiers]
        if self.window > most:
            remedy = "use numbers or a smaller window" if self.identifiers == "letters" else "use a smaller window"
            found = f"{self.window} with identifiers: {self.identifiers}"
            yield Problem("window", found, f"at most {most}", remedy, ("identifiers",))

    def check(self) -> None:
        """Raise SourceError with all `problems`, one per line, if there are any."""
        problems = "\n".join(str(problem) for problem in self.problems())
        if problems:
            raise SourceError(problems)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class BuildOptions:
    """How a set of shards is written."""

    part: str | None = option(
        "Build only part I of N; `shards merge` joins them.", None, pattern=r"^[1-9]\d*/[1-9]\d*$"
    )
    num_processes: int | None = option(
        "Processes that parse, validate and compress; null = one per CPU once a source proves large.",
        None,
        unit="processes",
        ge=1,
    )
    shard_bytes: int = option("Size of a shard before compression.", 16 << 20, unit="bytes", ge=1, lt=1 << 30)
    compression: str | None = option("zstd, zstd:LEVEL, gz, br, bz2, snappy; null = none.", "zstd")
    hashes: tuple[str, ...] = option(
        "Hashes of each shard that the index holds, by streaming's names.", ("xxh64",), min_length=1
    )
    overwrite: bool = option("Replace another set at the same place.", False)
    staging: PathText | None = option(
        "Local folder where an upload is prepared; null = one in the temporary folder.", None, unit="path"
    )


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class StreamOptions:
    """How sets of shards are read while training."""

    shuffle: bool = option("Read the lists in a random order.", True)
    cache_limit: str | None = option(
        "Most that `local` may hold of `remote`; at least 4 times the largest shard; null = no limit.",
        None,
        unit="bytes",
        pattern=r"^(?i:\d+(\.\d+)?\s?[kmgt]b)$",
        examples=["100gb"],
    )
    num_canonical_nodes: int | None = option(
        "Nodes that the data order is laid out for; keep it to resume on another number; null = streaming's choice.",
        None,
        unit="nodes",
        ge=1,
    )
    download_retry: int = option("How often a failed download is retried.", 2, unit="times", ge=0)
    download_timeout_seconds: int = option("Longest download of one shard.", 60, unit="seconds", ge=1)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ModelOptions:
    """Which causal LM, from where, and how it computes."""

    name_or_path: PathText = option("HF model id, or a folder with config and safetensors.", unit="id or path")
    tokenizer: PathText | None = option("HF tokenizer id or folder; null = name_or_path.", None, unit="id or path")
    revision: str | None = option(
        "Branch, tag or commit of the HF model id; null = its default.", None, unit="revision"
    )
    trust_remote_code: bool = option("Run code that comes with the model.", False)
    random_weights: bool = option("Build from the config only, with fresh weights, instead of loading them.", False)
    config_overrides: dict[str, Any] = option("Values that override the HF config, under its own names.", {})
    attention: Literal["auto", "flash_attention_2", "packed_sdpa"] = option(
        "Attention over packed sequences; auto = flash_attention_2 on a GPU that has it, else packed_sdpa.", "auto"
    )
    activation_checkpointing: float = option(
        "Share of the decoder layers whose activations are recomputed in the backward pass.",
        0.0,
        unit="fraction of layers",
        ge=0,
        le=1,
    )
    compile: bool = option("Compile the model with torch.compile.", False)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class RerankOptions:
    """How candidates are reranked with a model, and how its answers are read."""

    window_size: int | None = option("Candidates shown at once; null = the contract's.", None, unit="candidates", ge=2)
    stride: int | None = option("Step of the window; null = the contract's.", None, unit="candidates", ge=1)
    passes: int = option("Times the window slides over each list.", 1, unit="passes", ge=1)
    top_k: int = option("Candidates reranked; the rest follow in their order.", 100, unit="candidates", ge=2)
    decoding: Decoding | None = option("How rankings are read; null = as the model was trained.", None)
    constrained: bool = option("Let generation write well-formed answers only.", False)
    batch_tokens: int = option("Most tokens in one forward pass.", 16384, unit="tokens", ge=1)
    queries_at_once: int = option("Queries whose windows are packed together.", 32, unit="queries", ge=1)
    attention: Literal["auto", "flash_attention_2", "packed_sdpa"] = option(
        "Attention over packed sequences; auto = flash_attention_2 on a GPU that has it, else packed_sdpa.", "auto"
    )
    device: str | None = option("torch's name of a device; null = cuda where there is one, else cpu.", None)
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        "Type of the weights; null = as stored on cuda, float32 on cpu.", None
    )
