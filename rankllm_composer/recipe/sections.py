"""What a recipe can say: one frozen pydantic dataclass per section, each key with type, default, unit and meaning.

Defaults stand here and in `options.py` only. `load.load_recipe` fills the sections from a YAML file and the command
line, `checks` holds the rules between keys.
"""

from __future__ import annotations

from os import PathLike
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from rankllm_composer.environment import expand_path
from rankllm_composer.errors import worded
from rankllm_composer.model.loss_table import RankingLoss, default_weight
from rankllm_composer.options import (
    CONFIG,
    MAX_SEED,
    BatchOptions,
    ClientOptions,
    Decoding,
    Flag,
    ModelOptions,
    Number,
    ObjectiveName,
    PathText,
    SourceOptions,
    StreamOptions,
    Text,
    Ties,
    TokenWeights,
    Unjudged,
    Whole,
    Word,
    option,
)
from rankllm_composer.prompts.permutations import IdentifierStyle
from rankllm_composer.prompts.prompt_template import PromptTemplate, read_prompt_template
from rankllm_composer.recipe.times import EXAMPLES, UNITS, time_pattern


def _read_template(value: Any) -> Any:
    return read_prompt_template(expand_path(value)) if isinstance(value, str | PathLike) else value


LoggerName = Literal["tensorboard", "wandb", "mlflow"]
CallbackName = Literal["speed_monitor", "memory_monitor", "lr_monitor", "optimizer_monitor", "nan_monitor"]
Arguments = Annotated[
    dict[str, Any],
    BeforeValidator(lambda value: {} if value is None else value, json_schema_input_type=dict[str, Any] | None),
]
"""Arguments of a Composer class; null = none."""

TemplateFile = Annotated[PromptTemplate, BeforeValidator(_read_template, json_schema_input_type=PromptTemplate | str)]
"""A prompt template: the path of its file, which is read, or its keys."""

Share = Annotated[Number, Ge(0), Lt(1)]


def time(key: str, meaning: str, default: str) -> Any:
    """The key of a Composer time string, in the units of `times.UNITS`."""
    examples = [EXAMPLES[unit] for unit in UNITS[key]]
    return option(meaning, default, unit="Composer time", pattern=time_pattern(key), examples=examples)


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Run:
    """Name, folder and length of a run."""

    name: Word = option(
        "Name of the run, used in checkpoints and logs.",
        unit="name",
        pattern=r"^\w[\w.-]*$",
        examples=["first_mistral"],
    )
    folder: PathText | None = option("Folder of the files that the run writes; null = runs/<name>.", None, unit="path")
    seed: Whole = option("Seed of weights, data order and noise.", 42, ge=0, le=MAX_SEED)
    max_duration: Word = time("run.max_duration", "How long to train.", "3ep")
    autoresume: Flag = option("Continue from the run's latest checkpoint if there is one.", True)
    accept_changes: tuple[Text, ...] = option(
        "Keys whose change is accepted when the run is resumed; recorded in recipe.yaml and on the model card.",
        (),
        unit="dotted keys",
    )


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Lora:
    """Low-rank adapters."""

    rank: Whole = option("Rank of the adapters.", 16, unit="dimensions", ge=1)
    alpha: Number = option("Scale of the adapters: alpha / rank.", 32.0, gt=0)
    dropout: Number = option("Dropout before the adapters.", 0.05, unit="fraction", ge=0, lt=1)
    frozen_precision: Literal["fp32", "bf16"] = option(
        "Type of the frozen weights; bf16 needs half the memory, and one GPU or DDP (FSDP2 needs one type).", "fp32"
    )
    target_modules: tuple[Text, ...] = option(
        "Layers that get an adapter, each of which must exist; [all-linear] = all linear layers but the output layer.",
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        unit="module names",
    )
    modules_to_save: tuple[Text, ...] = option(
        "Modules whose weights are trained as a whole beside the adapters.", (), unit="module names"
    )
    rslora: Flag = option("Scale the adapters by alpha / sqrt(rank) instead of alpha / rank (rsLoRA).", False)
    dora: Flag = option("Train the magnitude of each adapted weight apart from its direction (DoRA).", False)
    start_from: PathText | None = option(
        "Folder of an exported adapter of the same kind to start from; null = a new one.", None, unit="path"
    )


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Model(ModelOptions):
    """The model to train."""

    lora: Lora | None = option("Train low-rank adapters only; null = train all weights.", None)


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Stream:
    """One of several sets of shards that are mixed."""

    remote: PathText | None = option("Where the shards are; null = already in `local`.", None, unit="URL")
    local: PathText = option("Where the shards are read or cached.", unit="path")
    proportion: Number | None = option(
        "Share of this stream in an epoch; null for all = every stream once.",
        None,
        unit="fraction of lists",
        gt=0,
        le=1,
    )


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Sets:
    """Where the shards of a split are, and what they are built from."""

    remote: PathText | None = option("Where the shards are; null = already in `local`.", None, unit="URL")
    local: PathText | None = option("Where the shards are read or cached; null with `streams`.", None, unit="path")
    source: SourceOptions | None = option("What absent shards are built from; null = they are never built.", None)
    rebuild: Flag = option(
        "Build the shards again if they were built from another `source` or with other options; false = stop.", False
    )
    streams: tuple[Stream, ...] = option("Several sets of shards mixed, instead of `remote` and `local`.", ())


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Split(StreamOptions, Sets):  # the keys of Sets come first
    """Lists to train or to evaluate on."""

    shuffle_passages: Flag = option("Permute the passages of each list and reassign the identifiers.", False)
    identifiers: IdentifierStyle | None = option("Identifiers in the prompt; null = those of the shards.", None)


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Data(ClientOptions):
    """The lists, and how they are read."""

    prompt_template: TemplateFile | None = option(
        "What prompts say: the file that rank_llm takes by --prompt-template-path; null = the published prompt.",
        None,
        unit="path",
    )
    max_length_tokens: Whole = option("Most tokens in prompt and response together.", 4096, unit="tokens", ge=2)
    too_long: Literal["drop", "refuse"] = option("Longer records: drop and count them, or stop.", "drop")
    num_workers: Whole = option("Processes per rank that read and tokenize.", 2, unit="processes", ge=0)
    prefetch_factor: Whole = option("Batches that each of these processes keeps ready.", 2, unit="batches", ge=1)
    loader_timeout_seconds: Whole = option(
        "Longest wait for a batch before the run stops; 0 = wait forever.", 600, unit="seconds", ge=0
    )
    expected_lists: Whole | None = option(
        "About how many lists `train` holds, for `plan` where neither its shards nor its source are; null = unknown.",
        None,
        unit="lists",
        ge=1,
    )
    train: Split = option("Lists to train on.", Split)
    eval: Split | None = option("Lists to evaluate on; null = none.", None)


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Objective:
    """What the model is trained for."""

    name: ObjectiveName = option(
        "generation = language modeling of the permutation; ranking = a ranking loss on the identifier scores; "
        "combined = both.",
        "combined",
    )
    language_modelling_weight: Number = option("Factor of the language-modeling loss.", 1.0, ge=0)
    token_weights: TokenWeights = option(
        "Tokens of the answer in the language-modeling loss: equal, or by_rank = an identifier at place r counts "
        "1 + 1 / log2(r + 1).",
        "equal",
    )
    ranking_weight: Number | None = option(
        "Factor of the ranking loss; null = that of the loss, 10 for weighted RankNet, see docs/losses.md.", None, ge=0
    )
    ranking_loss: RankingLoss = option(
        "Ranking loss on the identifier scores; your own is package.module:function, see docs/losses.md.", "ranknet"
    )
    ranking_loss_options: dict[str, Any] = option("Arguments of that loss, such as {weighted: true}.", {})
    ties: Ties = option(
        "Candidates of equal grade or score: tied = no preference, and an answer may name them in any order; "
        "ordered = as the answer lists them.",
        "tied",
    )
    unjudged: Unjudged = option(
        "Candidates without a grade or score: irrelevant = grade 0, or behind every score; left_out = not compared by "
        "the ranking loss.",
        "irrelevant",
    )

    @property
    def ranking_factor(self) -> float:
        """Factor of the ranking loss, chosen or by default."""
        default = default_weight(self.ranking_loss, self.ranking_loss_options)
        return default if self.ranking_weight is None else self.ranking_weight


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Neftune:
    """Noise on the embeddings while training."""

    alpha: Number = option("Noise on the embeddings: uniform in ±alpha / sqrt(tokens * hidden size).", 5.0, gt=0)


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Optimizer:
    """The optimizer and its settings."""

    name: Literal["adamw", "adamw_8bit"] = option(
        "AdamW: of torch, or of bitsandbytes with 8-bit state, which needs a GPU and parallelism.fsdp: false.", "adamw"
    )
    lr: Number = option("Highest learning rate.", gt=0)
    betas: tuple[Share, Share] = option("Decay of the averages of gradient and squared gradient.", (0.9, 0.999))
    eps: Number = option("Added to the denominator.", 1e-8, gt=0)
    weight_decay: Number = option("Decoupled weight decay.", 0.0, ge=0)
    gradient_clip_norm: Number | None = option(
        "Norm to which the gradient is clipped; null = not clipped.", 1.0, unit="L2 norm", gt=0
    )
    max_skipped_updates: Whole = option(
        "Updates with a loss or gradient that is not finite that are skipped and counted before the run stops.",
        0,
        unit="updates",
        ge=0,
    )


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Schedule:
    """The learning rate over the run."""

    name: Literal["cosine", "linear", "constant"] = option("Learning rate after the warmup.", "cosine")
    warmup: Word = time("schedule.warmup", "Linear rise from 0; batches are optimizer updates.", "50ba")
    final_lr_fraction: Number = option(
        "Learning rate at the end, as a fraction of the highest.", 0.0, unit="fraction of lr", ge=0, le=1
    )


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Parallelism:
    """How a run is distributed over ranks, and its precision."""

    fsdp: Flag = option("Shard weights, gradients and optimizer over the ranks (FSDP2); false = copies (DDP).", True)
    reshard_after_forward: Flag = option("Free gathered weights between the forward and the backward pass.", True)
    mixed_precision: Literal["DEFAULT", "PURE", "FULL"] = option(
        "Precision of FSDP2: DEFAULT = compute low, reduce in fp32; PURE = both low; FULL = both fp32.", "DEFAULT"
    )
    precision: Literal["fp32", "amp_bf16"] = option("Precision of the forward pass; weights are fp32.", "amp_bf16")
    device: Literal["gpu", "cpu", "auto"] = option("Where to train; auto = GPU if there is one.", "auto")
    dist_timeout_seconds: Whole = option(
        "Longest wait of one rank for another, such as for rank 0 to build shards.", 1800, unit="seconds", ge=1
    )


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Export:
    """HF folders that are written while training."""

    interval: Word = time("checkpoint.export.interval", "How often an HF folder is written.", "1ep")
    folder: PathText | None = option("Where the HF folders go; null = <run folder>/hf.", None, unit="path")
    keep: Whole = option(
        "Number of newest HF folders kept, besides the one behind `best`; -1 = all.", -1, unit="folders", ge=-1
    )
    merge_lora: Flag = option("Merge the adapters into the weights; false = export them separately.", True)


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Checkpoint:
    """What is saved, to resume from and to serve."""

    interval: Word = time("checkpoint.interval", "How often a checkpoint is written.", "1ep")
    keep: Whole = option("Number of newest checkpoints kept on local disk; -1 = all.", 3, unit="checkpoints", ge=-1)
    folder: PathText | None = option("Where checkpoints go; null = <run folder>/checkpoints.", None, unit="path or URL")
    store_patience_seconds: Whole = option(
        "How long a failing request to the object store of `folder` is repeated before the run stops.",
        300,
        unit="seconds",
        ge=0,
    )
    export: Export | None = option("HF folders for inference; null = none.", Export)


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Evaluation:
    """Rankings measured while training."""

    interval: Word = time("evaluation.interval", "How often data.eval is ranked.", "1ep")
    decodings: tuple[Decoding, ...] = option(
        "How rankings are decoded: from one forward pass, from generated text, or both.", ("first_token", "generation")
    )
    constrained: Flag = option("Restrict generation to well-formed answers.", False)
    num_shuffles: Whole = option(
        "Random orders of each window that are also ranked by first token, to measure position bias; 0 = none.",
        0,
        unit="orders",
        ge=0,
    )
    best_by: Text | None = option(
        "Metric that selects the export behind <export folder>/best, such as first_token/ndcg@10; null = none.",
        None,
        unit="metric",
    )
    patience: Whole | None = option(
        "Evaluations in a row without a new best `best_by` after which the run ends; null = it trains to its end.",
        None,
        unit="evaluations",
        ge=1,
    )


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Logging:
    """What is printed and logged."""

    progress: Flag = option("Print a progress line on rank 0.", True)
    metrics_file: Flag = option("Write metrics.jsonl in the run folder, one line per batch.", True)
    loggers: dict[LoggerName, Arguments] = option("Composer loggers by name, with their arguments.", {})
    callbacks: dict[CallbackName, Arguments] = option("Composer callbacks by name, with their arguments.", {})


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Recipe:
    """A complete training run. `load.load_recipe` creates and checks it."""

    run: Run = option("The run itself.")
    model: Model = option("What is trained.")
    data: Data = option("What it is trained on.")
    objective: Objective = option("What it is trained for.", Objective)
    neftune: Neftune | None = option("Noise on the embeddings while training; null = none.", None)
    batch: BatchOptions = option("How many lists are processed at once.", BatchOptions)
    optimizer: Optimizer = option("How weights are updated.")
    schedule: Schedule = option("How the learning rate changes.", Schedule)
    parallelism: Parallelism = option("How the work is distributed over ranks.", Parallelism)
    checkpoint: Checkpoint = option("What is saved, to resume from and to serve.", Checkpoint)
    evaluation: Evaluation | None = option("Ranking measured while training; null = none.", None)
    logging: Logging = option("What is reported.", Logging)

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
        """Folder of the exported HF folders; None if the recipe exports nothing."""
        if self.checkpoint.export is None:
            return None
        return self.checkpoint.export.folder or f"{self.run_folder}/hf"
