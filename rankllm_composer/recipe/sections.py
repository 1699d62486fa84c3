"""What a recipe can say: one frozen dataclass a section, each key with its type, default, unit and meaning.

These classes are the only place where defaults live. `recipe_merge.load_recipe` fills them from a YAML file and the
command line, `recipe_check` holds the rules between keys.
"""
# ruff: noqa: RUF009

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rankllm_composer.model.loss_table import RankingLoss
from rankllm_composer.options import ObjectiveName
from rankllm_composer.prompts.permutations import IdentifierStyle
from rankllm_composer.recipe.schema import KeyDescription, describe_section, key, section

LOGGERS = ("tensorboard", "wandb", "mlflow")


CALLBACKS = ("speed_monitor", "memory_monitor", "lr_monitor", "optimizer_monitor", "nan_monitor")


INTERVAL_UNITS = ("ep", "ba", "sp", "tok", "dur")


DURATION_UNITS = ("ep", "ba", "sp")


WARMUP_UNITS = ("ep", "ba", "sp", "dur")


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str = key(
        "Name of the run; checkpoints and logs carry it.", pattern=r"[\w.-]+", example="first_mistral", unit="name"
    )
    folder: str | None = key("Where the run leaves its files; null = runs/<name>.", None, unit="path")
    seed: int = key("Seed of weights, data order and noise.", 42, at_least=0)
    max_duration: str = key("How long to train.", "3ep", unit="Composer time", time_units=DURATION_UNITS, nonzero=True)
    autoresume: bool = key("Continue from the run's latest checkpoint if there is one.", True)


@dataclass(frozen=True, kw_only=True)
class Lora:
    rank: int = key("Rank of the adapters.", 16, unit="dimensions", at_least=1)
    alpha: float = key("Scale of the adapters: alpha / rank.", 32.0, above=0)
    dropout: float = key("Dropout before the adapters.", 0.05, unit="fraction", at_least=0, below=1)
    frozen_precision: Literal["fp32", "bf16"] = key(
        "What the weights that are not trained are held in; bf16 takes half the memory, on one GPU or with DDP.", "fp32"
    )
    target_modules: tuple[str, ...] = key(
        "Linear layers that get an adapter.",
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        unit="module names",
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    name_or_path: str = key("HF model id, or a folder with config and safetensors.", unit="id or path")
    tokenizer: str | None = key("HF tokenizer id or folder; null = name_or_path.", None, unit="id or path")
    revision: str | None = key("Branch, tag or commit of the HF model id; null = its default.", None, unit="revision")
    trust_remote_code: bool = key("Run code that comes with the model.", False)
    random_weights: bool = key("Build from the config only, with fresh weights, instead of loading them.", False)
    config_overrides: dict[str, Any] = key("Arguments laid over the HF config, under its own names.", {})
    attention: Literal["auto", "flash_attention_2", "packed_sdpa"] = key(
        "Attention over packed sequences; auto = flash_attention_2 on a GPU that has it, else packed_sdpa.", "auto"
    )
    activation_checkpointing: float = key(
        "Share of the decoder layers whose activations are computed again in the backward pass.",
        0.0,
        unit="fraction of layers",
        at_least=0,
        at_most=1,
    )
    compile: bool = key("Compile the model with torch.compile.", False)
    lora: Lora | None = key("Train low-rank adapters only; null = train all weights.", None)


@dataclass(frozen=True, kw_only=True)
class Source:
    input: str | None = key(
        "Training records: .json, .jsonl or a HF dataset id; null = make them from `run`.", None, unit="path or id"
    )
    split: str = key("Split of a HF dataset; files have none.", "train", unit="name")
    run: str | None = key("First-stage run in TREC format.", None, unit="path")
    judgments: str | None = key("TREC judgments that order the lists of `run`.", None, unit="path")
    teacher_run: str | None = key("TREC run of a teacher that orders the lists of `run`.", None, unit="path")
    queries: str | None = key("Queries for `run`, a JSON object a line.", None, unit="path")
    docs: str | None = key("Documents for `run`, a JSON object a line.", None, unit="path")
    window: int = key("Candidates in a list made from `run`.", 20, unit="candidates", at_least=2)
    stride: int = key("Step from one list to the next down `run`.", 10, unit="candidates", at_least=1)
    lists_per_query: int = key(
        "Lists made for each query of `run`; 0 = one for each window.", 1, unit="lists", at_least=0
    )
    depth: int = key("Candidates of `run` that are used, from the top.", 100, unit="candidates", at_least=2)
    max_passage_words: int | None = key(
        "Words kept of a passage; null = the inference client's rule: 300, and 300 * 20 / n in lists of n < 20.",
        None,
        unit="words",
        at_least=1,
    )
    identifiers: IdentifierStyle = key("Identifiers of the candidates of lists made from `run`.", "letters")
    seed: int = key("Seed of the choice of lists.", 42, at_least=0)
    require_relevant: bool | None = key(
        "Leave out lists without a relevant candidate; null = where judgments give the order.", None
    )
    on_error: Literal["stop", "quarantine"] = key(
        "At a bad record: stop the build, or write it aside and count it.", "stop"
    )


@dataclass(frozen=True, kw_only=True)
class Stream:
    remote: str | None = key("Where the shards are; null = already in `local`.", None, unit="URL")
    local: str = key("Where the shards are read from, or cached.", unit="path")
    proportion: float | None = key(
        "Share of this stream in an epoch; null for all = every stream once.",
        None,
        unit="fraction of lists",
        above=0,
        at_most=1,
    )


@dataclass(frozen=True, kw_only=True)
class Split:
    remote: str | None = key("Where the shards are; null = already in `local`.", None, unit="URL")
    local: str | None = key("Where the shards are read from, or cached; null with `streams`.", None, unit="path")
    source: Source | None = key("What the shards are built from where they are absent; null = never built.", None)
    streams: tuple[Stream, ...] = key("Several sets of shards mixed, instead of `remote` and `local`.", ())
    shuffle: bool = key("Read the lists in a random order.", True)
    shuffle_passages: bool = key("Permute the passages of each list and assign the identifiers anew.", False)
    identifiers: IdentifierStyle | None = key("Identifiers the model sees; null = those of the shards.", None)
    cache_limit: str | None = key(
        "Most that `local` may hold of `remote`; at least 4 times the largest shard; null = no limit.",
        None,
        unit="bytes",
        pattern=r"\d+(\.\d+)?\s?[kmgt]b",
        example="100gb",
    )
    num_canonical_nodes: int | None = key(
        "Nodes that the data order is laid out for; keep it to resume on another number; null = streaming's choice.",
        None,
        unit="nodes",
        at_least=1,
    )
    download_retry: int = key("How often a failed download is tried again.", 2, unit="times", at_least=0)
    download_timeout_seconds: int = key("Longest download of one shard.", 60, unit="seconds", at_least=1)


@dataclass(frozen=True, kw_only=True)
class Data:
    max_length_tokens: int = key("Longest prompt + response.", 4096, unit="tokens", at_least=2)
    too_long: Literal["drop", "refuse"] = key("Records above that length: drop and count them, or stop.", "drop")
    num_workers: int = key("Processes that read and tokenise, a rank.", 2, unit="processes", at_least=0)
    prefetch_factor: int = key("Batches each of them keeps ready.", 2, unit="batches", at_least=1)
    loader_timeout_seconds: int = key(
        "Longest wait for a batch before the run stops; 0 = wait forever.", 600, unit="seconds", at_least=0
    )
    train: Split = section("Lists to train on.")
    eval: Split | None = key("Lists to evaluate on; null = none.", None)


@dataclass(frozen=True, kw_only=True)
class Objective:
    name: ObjectiveName = key(
        "generation = language modelling of the permutation; ranking = a ranking loss on the identifier scores; "
        "combined = both.",
        "combined",
    )
    language_modelling_weight: float = key("Factor of the language-modelling part.", 1.0, at_least=0)
    ranking_weight: float = key("Factor of the ranking part.", 10.0, at_least=0)
    ranking_loss: RankingLoss = key("Ranking loss on the identifier scores.", "ranknet")
    ranking_loss_options: dict[str, Any] = key("Arguments of that loss, such as {weighted: true}.", {})


@dataclass(frozen=True, kw_only=True)
class Neftune:
    alpha: float = key("Noise on the embeddings: uniform in ±alpha / sqrt(tokens * hidden size).", 5.0, above=0)


@dataclass(frozen=True, kw_only=True)
class Batch:
    global_lists: int = key("Lists in an optimizer step, over all ranks.", 128, unit="lists", at_least=1)
    microbatch_lists: int | None = key(
        "Lists in a forward pass of one rank; give this or microbatch_tokens.", None, unit="lists", at_least=1
    )
    microbatch_tokens: int | None = key(
        "Most tokens in a forward pass of one rank; give this or microbatch_lists.", None, unit="tokens", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    name: Literal["adamw", "adamw_8bit"] = key("AdamW of torch, or with 8-bit state of bitsandbytes.", "adamw")
    lr: float = key("Highest learning rate.", above=0)
    betas: tuple[float, float] = key(
        "Decay of the averages of gradient and squared gradient.", (0.9, 0.999), at_least=0, below=1
    )
    eps: float = key("Added to the denominator.", 1e-8, above=0)
    weight_decay: float = key("Decoupled weight decay.", 0.0, at_least=0)
    gradient_clip_norm: float | None = key(
        "Largest norm of the whole gradient; null = unbounded.", 1.0, unit="L2 norm", above=0
    )
    max_skipped_updates: int = key(
        "Updates left out and counted where loss or gradient is not finite, before the run stops.",
        0,
        unit="updates",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    name: Literal["cosine", "linear", "constant"] = key("Learning rate after the warmup.", "cosine")
    warmup: str = key(
        "Linear rise from 0; batches are optimizer updates.", "50ba", unit="Composer time", time_units=WARMUP_UNITS
    )
    final_lr_fraction: float = key(
        "Learning rate at the end, of the highest.", 0.0, unit="fraction of lr", at_least=0, at_most=1
    )


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    fsdp: bool = key("Shard weights, gradients and optimizer over the ranks (FSDP2); false = copies (DDP).", True)
    reshard_after_forward: bool = key("Free gathered weights between forward and backward pass.", True)
    mixed_precision: Literal["DEFAULT", "PURE", "FULL"] = key(
        "What FSDP2 computes and reduces in: DEFAULT = compute low, reduce high; PURE = both low; FULL = both fp32.",
        "DEFAULT",
    )
    precision: Literal["fp32", "amp_bf16"] = key("Arithmetic of the forward pass; weights are fp32.", "amp_bf16")
    device: Literal["gpu", "cpu", "auto"] = key("Where to train; auto = GPU if there is one.", "auto")
    dist_timeout_seconds: int = key(
        "Longest wait of one rank for another; covers rank 0 building shards.", 1800, unit="seconds", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class Export:
    interval: str = key(
        "How often a HF folder is written.", "1ep", unit="Composer time", time_units=INTERVAL_UNITS, nonzero=True
    )
    folder: str | None = key("Where the HF folders go; null = <run folder>/hf.", None, unit="path")
    merge_lora: bool = key("Add the adapters to the weights they change; false = export them apart.", True)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    interval: str = key(
        "How often a checkpoint is written.", "1ep", unit="Composer time", time_units=INTERVAL_UNITS, nonzero=True
    )
    keep: int = key("Newest checkpoints kept on local disk; -1 = all.", 3, unit="checkpoints", at_least=-1)
    folder: str | None = key("Where checkpoints go; null = <run folder>/checkpoints.", None, unit="path or URL")
    export: Export | None = section("HF folders for inference; null = none.", Export)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    interval: str = key(
        "How often data.eval is ranked.", "1ep", unit="Composer time", time_units=("ep", "ba", "dur"), nonzero=True
    )
    decodings: tuple[Literal["first_token", "generation"], ...] = key(
        "How rankings are read: from one forward pass, from generated text, or both.", ("first_token", "generation")
    )
    constrained: bool = key("Let generation write well-formed answers only.", False)
    num_shuffles: int = key(
        "Random orders each window is shown in besides, to measure position bias by the first token; 0 = none.",
        0,
        unit="orders",
        at_least=0,
    )
    best_by: str | None = key(
        "Figure by which <export folder>/best points to the best export, such as first_token/ndcg@10; null = none.",
        None,
        unit="figure",
    )


@dataclass(frozen=True, kw_only=True)
class Logging:
    progress: bool = key("Print a progress line on rank 0.", True)
    metrics_file: bool = key("Write metrics.jsonl in the run folder, a line a batch.", True)
    loggers: dict[str, dict[str, Any]] = key(
        "Composer loggers by name, each with its own arguments.", {}, names=LOGGERS
    )
    callbacks: dict[str, dict[str, Any]] = key(
        "Composer callbacks by name, each with its own arguments.", {}, names=CALLBACKS
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training run. Made by `recipe_merge.load_recipe`, which checks it."""

    run: Run = section("The run itself.")
    model: Model = section("What is trained.")
    data: Data = section("What it is trained on.")
    objective: Objective = section("What it is trained for.", Objective)
    neftune: Neftune | None = key("Noise on the embeddings while training; null = none.", None)
    batch: Batch = section("How many lists at once.", Batch)
    optimizer: Optimizer = section("How weights are updated.")
    schedule: Schedule = section("How the learning rate moves.", Schedule)
    parallelism: Parallelism = section("How the work is spread over ranks.", Parallelism)
    checkpoint: Checkpoint = section("What is saved to resume from and to serve.", Checkpoint)
    evaluation: Evaluation | None = key("Ranking measured while training; null = none.", None)
    logging: Logging = section("What is reported.", Logging)

    @property
    def tokenizer(self) -> str:
        """HF tokenizer id or folder."""
        return self.model.tokenizer or self.model.name_or_path

    @property
    def run_folder(self) -> str:
        return self.run.folder or f"runs/{self.run.name}"

    @property
    def checkpoint_folder(self) -> str:
        """Folder or URL of the checkpoints."""
        return self.checkpoint.folder or f"{self.run_folder}/checkpoints"

    @property
    def export_folder(self) -> str | None:
        """Folder of the exported HF folders; None where the recipe exports nothing."""
        if self.checkpoint.export is None:
            return None
        return self.checkpoint.export.folder or f"{self.run_folder}/hf"


def describe_keys() -> list[KeyDescription]:
    """Every key a recipe may hold, in order: what `--help` and the documentation print."""
    return describe_section(Recipe)
