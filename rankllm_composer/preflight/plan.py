"""What a recipe will cost before any GPU is rented: updates, learning rate, lengths, memory of a rank, hours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankllm_composer.errors import RunError
from rankllm_composer.model.flops import forward_flops, training_flops
from rankllm_composer.recipe.checks import check_world
from rankllm_composer.training.schedule import learning_rate_factor, updates_in

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rankllm_composer.preflight.memory import Memory, Workload
    from rankllm_composer.recipe.sections import Recipe


@dataclass(frozen=True)
class Gpu:
    """A card: its memory in bytes, and dense bfloat16 operations a second at most."""

    memory_bytes: int
    bf16_flops: float


# Operations: dense bfloat16 tensor-core peaks (no sparsity) of NVIDIA's data sheets of each card (H100 2023, H200 2024,
# A100 2021, L40S, L4 and A10), and of the GA102 and AD102 whitepapers for RTX 3090 and 4090 (float32 accumulation).
# Memory: GiB that PyTorch names as the card's total capacity in its out-of-memory message, rounded down; below the size
# a card is sold by.
GPUS = {
    name: Gpu(int(gibibytes * 2**30), teraflops * 1e12)
    for name, gibibytes, teraflops in (
        ("h100-80gb", 79.1, 989.4),
        ("h100-pcie-80gb", 79.1, 756.0),
        ("h200-141gb", 139.7, 989.4),
        ("a100-80gb", 79.1, 312.0),
        ("a100-40gb", 39.3, 312.0),
        ("l40s-48gb", 44.3, 362.0),
        ("a10-24gb", 21.9, 125.0),
        ("l4-24gb", 21.9, 121.0),
        ("rtx3090-24gb", 23.5, 71.0),
        ("rtx4090-24gb", 23.5, 165.2),
    )
}


DEFAULT_MFU = 0.4
"""An assumption, measured by nobody here: the share of the peak that useful operations reach."""


RESERVE = 0.1
"""An assumption: the share of a card that CUDA, NCCL and fragments take beside the tensors that are counted."""


ASSUMED_TARGETS = 81
"""Response tokens of a list of 20 where no list could be read: 20 identifiers with brackets and '>', and the end."""


@dataclass(frozen=True)
class ListLengths:
    """How long the lists are.

    Attributes:
        tokens: of each list that was looked at; empty = none could be read.
        num_targets: response tokens of each.
        num_lists: in the whole split; None = not known.
        told: where this is from, for people.
    """

    tokens: tuple[int, ...]
    num_targets: tuple[int, ...]
    num_lists: int | None
    told: str


@dataclass(frozen=True)
class Plan:
    """What a recipe will cost on a number of ranks. Counts that depend on an unknown number of lists are None."""

    recipe: Recipe
    num_ranks: int
    gpu_name: str
    gpu: Gpu
    mfu: float
    mfu_is_default: bool
    config: PretrainedConfig
    lengths: ListLengths
    work: Workload
    memory: Memory
    remedies: tuple[tuple[str, Memory], ...]
    steps_per_epoch: int | None
    num_steps: int | None
    num_warmup: int | None
    flops_per_list: int

    @property
    def usable_bytes(self) -> int:
        return int(self.gpu.memory_bytes * (1 - RESERVE))

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.usable_bytes

    @property
    def num_flops(self) -> int | None:
        """Operations of the whole run."""
        return None if self.num_steps is None else self.num_steps * self.recipe.batch.global_lists * self.flops_per_list

    @property
    def num_hours(self) -> float | None:
        """Hours of the whole run, at `mfu`; loading, checkpoints and evaluation are not counted."""
        if self.num_flops is None:
            return None
        return self.num_flops / (self.num_ranks * self.gpu.bf16_flops * self.mfu) / 3600

    def lines(self) -> Iterator[str]:
        """The plan for people."""
        batch, recipe = self.recipe.batch, self.recipe
        yield f"{recipe.run.name} on {self.num_ranks} x {self.gpu_name}"
        yield f"model         {recipe.model.name_or_path}: {self.memory.num_parameters:,} weights"
        if recipe.model.lora is not None:
            yield f"              LoRA trains {self.memory.num_trained:,} of them"
        yield f"lists         {self.lengths.told}"
        yield from self._histogram()
        each = batch.global_lists // self.num_ranks
        limit = f"{batch.microbatch_tokens:,} tokens" if batch.microbatch_tokens else f"{batch.microbatch_lists} lists"
        yield f"batch         {batch.global_lists} lists an update, {each} a rank, in microbatches of at most {limit}"
        yield from self._steps()
        yield from self._memory()
        yield from self._time()

    def _histogram(self, width: int = 40, num_bins: int = 8) -> Iterator[str]:
        tokens, limit = self.lengths.tokens, self.recipe.data.max_length_tokens
        if not tokens:
            return
        step = max(1, math.ceil((max(tokens) + 1) / num_bins))
        begins = range(0, max(tokens) + 1, step)
        counts = [sum(begin <= length < begin + step for length in tokens) for begin in begins]
        for begin, count in zip(begins, counts):
            yield f"  {begin:>6,}-{begin + step - 1:<6,} {'#' * round(width * count / max(counts))} {count}"
        too_long = sum(length > limit for length in tokens)
        mean = sum(tokens) / len(tokens)
        yield f"  mean {mean:,.0f}, longest {max(tokens):,}; {too_long} above the limit of {limit:,}"

    def _steps(self) -> Iterator[str]:
        if self.num_steps is None or self.num_warmup is None:
            yield "updates       not known without the number of lists: give --lists, or build the shards"
            return
        per_epoch = "" if self.steps_per_epoch is None else f", {self.steps_per_epoch:,} an epoch"
        yield f"updates       {self.num_steps:,}{per_epoch} ({self.recipe.run.max_duration})"
        points = [round(part * (self.num_steps - 1) / 31) for part in range(32)]
        factors = [self._factor(point) for point in points]
        yield f"lr            {''.join('▁▂▃▄▅▆▇█'[min(7, int(8 * factor))] for factor in factors)}"
        shown = sorted({0, min(self.num_warmup, self.num_steps - 1), self.num_steps // 2, self.num_steps - 1})
        lr = self.recipe.optimizer.lr
        yield "              " + ", ".join(f"update {at + 1:,}: {lr * self._factor(at):.3g}" for at in shown)

    def _factor(self, update: int) -> float:
        keys = self.recipe.schedule
        assert self.num_steps is not None and self.num_warmup is not None
        return learning_rate_factor(
            update,
            name=keys.name,
            num_updates=self.num_steps,
            num_warmup=self.num_warmup,
            final_fraction=keys.final_lr_fraction,
        )

    def _memory(self) -> Iterator[str]:
        work = self.work
        yield (
            f"memory        of one rank at its fullest: {len(work.lengths)} lists, {sum(work.lengths):,} tokens, "
            f"{work.attention}"
        )
        names = {"buffers": "gathered weights and communication", "logits": "logits and loss"}
        for part, size in self.memory.at_peak.items():
            yield f"  {names.get(part, part):<36} {_gib(size):>8}"
        yield f"  {'all at the peak':<36} {_gib(self.memory.peak):>8}"
        held = ", ".join(f"{part} {_gib(size).strip()}" for part, size in self.memory.held.items() if size)
        yield f"  at the update: {held}"
        card = f"{_gib(self.gpu.memory_bytes)} of the card, {RESERVE:.0%} of it kept back (assumed)"
        yield f"  {'fits' if self.fits else 'does not fit'} in {_gib(self.usable_bytes)}: {card}"
        loaded = work.frozen_precision
        host = {"fp32": 4, "bf16": 2}[loaded] * self.memory.num_parameters
        yield f"  main memory of the first rank: at least {_gib(host)}, the whole model in {loaded} while it loads"
        for change, memory in self.remedies:
            yield f"  would fit: {change} ({_gib(memory.peak)})"
        if not self.fits and not self.remedies:
            yield "  nothing tried makes it fit: use larger cards, shorter lists (data.max_length_tokens) or LoRA"

    def _time(self) -> Iterator[str]:
        word = "the default, an assumption" if self.mfu_is_default else "your assumption"
        yield f"operations    {self.flops_per_list:.3g} a list, forward and backward; recomputation is not counted"
        if self.num_flops is not None and self.num_hours is not None:
            hours = self.num_hours
            yield f"              {self.num_flops:.3g} in all"
            yield (
                f"time          {hours:,.2f} hours, {hours * self.num_ranks:,.1f} GPU hours, at an MFU of "
                f"{self.mfu:.0%} ({word}; nobody measured it) of {self.gpu.bf16_flops / 1e12:,.0f} TFLOP/s"
            )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def plan_recipe(
    recipe: Recipe,
    num_ranks: int,
    *,
    gpu: str = "h100-80gb",
    mfu: float | None = None,
    num_lists: int | None = None,
    sample: int = 500,
    report: Callable[[str], None] = print,
) -> Plan:
    """Plan a recipe.

    Args:
        recipe: a checked recipe. Its model may be a folder with nothing but config.json.
        num_ranks: GPUs it will train on.
        gpu: a key of GPUS.
        mfu: share of the peak that useful operations reach; None = DEFAULT_MFU. Nobody measured either.
        num_lists: lists of `data.train`, where neither its shards nor its source are on this machine.
        sample: lists that are tokenised, evenly spread, to know how long they are.
        report: takes a line of progress.
    Raises:
        RunError: unknown card, no configuration, or an MFU that is no share.
        RecipeError: the batch does not divide over the ranks.
    """
    if gpu not in GPUS:
        raise RunError(f"gpu: found {gpu}, allowed are {', '.join(GPUS)}; choose one with as much memory")
    if mfu is not None and not 0 < mfu <= 1:
        raise RunError(f"mfu: found {mfu}, allowed is a share above 0, up to 1")
    check_world(recipe, num_ranks)
    config = _config(recipe)
    lengths = look_at_lists(recipe, num_lists, sample)
    work = workload(recipe, config, lengths, num_ranks)
    report(f"a pass of {config.num_hidden_layers} layers without data")
    from rankllm_composer.preflight.memory import plan_memory
    from rankllm_composer.preflight.suggestions import remedies

    memory = plan_memory(work)
    usable = int(GPUS[gpu].memory_bytes * (1 - RESERVE))

    def measured(changed: Recipe, ranks: int) -> Memory:
        return plan_memory(workload(changed, config, lengths, ranks))

    found = () if memory.peak <= usable else tuple(remedies(recipe, num_ranks, usable, measured, report))
    per_epoch, num_steps, num_warmup = _steps(recipe, lengths.num_lists)
    return Plan(
        recipe=recipe,
        num_ranks=num_ranks,
        gpu_name=gpu,
        gpu=GPUS[gpu],
        mfu=DEFAULT_MFU if mfu is None else mfu,
        mfu_is_default=mfu is None,
        config=config,
        lengths=lengths,
        work=work,
        memory=memory,
        remedies=found,
        steps_per_epoch=per_epoch,
        num_steps=num_steps,
        num_warmup=num_warmup,
        flops_per_list=_flops_per_list(recipe, config, lengths),
    )


def _config(recipe: Recipe) -> PretrainedConfig:
    from transformers import AutoConfig

    from rankllm_composer.model.loading import warn_of_foreign_code

    keys = recipe.model
    if keys.trust_remote_code:
        warn_of_foreign_code(keys.name_or_path)
    try:
        config = AutoConfig.from_pretrained(
            keys.name_or_path, revision=keys.revision, trust_remote_code=keys.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RunError(
            f"model.name_or_path: found no configuration of {keys.name_or_path} here; the plan needs its config.json "
            "alone, no weights: download that file into a folder and give model.name_or_path=FOLDER"
        ) from error
    unknown = set(keys.config_overrides) - set(config.to_dict())
    if unknown:
        raise RunError(f"model.config_overrides: found {', '.join(sorted(unknown))}, no key of {type(config).__name__}")
    config.update(dict(keys.config_overrides))
    return config


def look_at_lists(recipe: Recipe, num_lists: int | None, sample: int) -> ListLengths:
    """Lengths of lists of `data.train`, as the tokenizer and the objective make them, where both are on this machine.

    Args:
        recipe: names data, tokenizer and objective.
        num_lists: given by the user; counts where the data is not here.
        sample: how many are tokenised.
    """
    from rankllm_composer.errors import ModelError
    from rankllm_composer.model.loading import load_tokenizer
    from rankllm_composer.prompts.encoding import encode_record
    from rankllm_composer.shards.read import RecordLookupError, SplitRecords

    split, keys = recipe.data.train, recipe.model
    sets = [(s.local, s.remote) for s in split.streams] or [(str(split.local), split.remote)]
    limit = f"taken to be {recipe.data.max_length_tokens:,} tokens each, the longest allowed (assumed)"
    try:
        records = SplitRecords(sets, split.source)
        found = len(records)
    except RecordLookupError:
        told = f"{num_lists:,} (given)" if num_lists is not None else "number not known"
        return ListLengths((), (), num_lists, f"{told}; no data here, {limit}")
    if any(stream.proportion is not None for stream in split.streams):
        found = sum(round((s.proportion or 0) * found) for s in split.streams)
    try:
        tokenizer = load_tokenizer(recipe.tokenizer, revision=keys.revision, trust_remote_code=keys.trust_remote_code)
    except ModelError:
        return ListLengths((), (), found, f"{found:,} in {records.place}; no tokenizer here, {limit}")
    every = max(1, found // sample)
    tokens, targets = [], []
    for number, record in enumerate(records):
        if number % every == 0:
            encoded = encode_record(record, tokenizer, recipe.objective.name)
            tokens.append(len(encoded.input_ids))
            targets.append(max(1, len(encoded.input_ids) - encoded.response_start))
    told = f"{found:,} in {records.place}; lengths of {len(tokens):,} of them"
    return ListLengths(tuple(tokens), tuple(targets), found, told)


def workload(recipe: Recipe, config: PretrainedConfig, lengths: ListLengths, num_ranks: int) -> Workload:
    """What a rank computes at its fullest: a microbatch up to its limit, of lists of mean length where it is known."""
    from rankllm_composer.model.objective import Objective
    from rankllm_composer.preflight.memory import Workload
    from rankllm_composer.training.assembly import build_peft_config

    batch, limit = recipe.batch, recipe.data.max_length_tokens
    each = batch.global_lists // num_ranks
    trained = [length for length in lengths.tokens if length <= limit]
    if batch.microbatch_lists is not None:
        longest = max(trained, default=limit)
        lists = (longest,) * batch.microbatch_lists
        accumulates = batch.microbatch_lists < each
    else:
        assert batch.microbatch_tokens is not None
        mean = round(sum(trained) / len(trained)) if trained else limit
        number = min(each, max(1, batch.microbatch_tokens // mean))
        lists = (mean,) * number
        accumulates = number < each
        if accumulates:
            lists = (*lists[:-1], mean + batch.microbatch_tokens - mean * number)
    on_cpu = recipe.parallelism.device == "cpu"
    attention = "packed_sdpa" if on_cpu or recipe.model.attention == "packed_sdpa" else "flash_attention_2"
    return Workload(
        config=config,
        objective=Objective(
            recipe.objective.name,
            ranking_loss=recipe.objective.ranking_loss,
            ranking_loss_options=recipe.objective.ranking_loss_options,
        ),
        lengths=lists,
        num_targets=max(lengths.num_targets, default=min(ASSUMED_TARGETS, limit // 2)),
        num_ranks=num_ranks,
        accumulates=accumulates,
        fsdp=recipe.parallelism.fsdp,
        reshard_after_forward=recipe.parallelism.reshard_after_forward,
        mixed_precision=recipe.parallelism.mixed_precision,
        precision=recipe.parallelism.precision,
        activation_checkpointing=recipe.model.activation_checkpointing,
        attention=attention,  # type: ignore[arg-type]
        optimizer=recipe.optimizer.name,
        peft_config=build_peft_config(recipe),
        frozen_precision="fp32" if recipe.model.lora is None else recipe.model.lora.frozen_precision,
    )


def _steps(recipe: Recipe, num_lists: int | None) -> tuple[int | None, int | None, int | None]:
    """Updates of an epoch, of the run, of the warmup; None where they are not known."""
    lists = recipe.batch.global_lists
    per_epoch = None if num_lists is None else math.ceil(num_lists / lists)
    needs_epochs = recipe.run.max_duration.endswith("ep") or recipe.schedule.warmup.endswith("ep")
    if per_epoch is None and needs_epochs:
        return None, None, None
    known: dict[str, int] = {"updates_per_epoch": per_epoch or 0, "lists_per_update": lists}
    num_steps = updates_in(recipe.run.max_duration, **known)
    return per_epoch, num_steps, updates_in(recipe.schedule.warmup, num_updates=num_steps, **known)


def _flops_per_list(recipe: Recipe, config: PretrainedConfig, lengths: ListLengths) -> int:
    """Mean operations of training on a list; under LoRA without the gradients of frozen weights: twice a forward."""
    limit = recipe.data.max_length_tokens
    pairs: Sequence[tuple[int, int]] = [
        (length, rows) for length, rows in zip(lengths.tokens, lengths.num_targets) if length <= limit
    ] or [(limit, min(ASSUMED_TARGETS, limit // 2))]
    total = 0
    for length, rows in pairs:
        if recipe.objective.name == "ranking":
            rows = 1
        if recipe.model.lora is None:
            total += training_flops(config, [length], rows)
        else:
            total += 2 * forward_flops(config, [length], rows)
    return total // len(pairs)
