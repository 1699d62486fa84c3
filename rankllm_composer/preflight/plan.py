"""Estimate a run before a GPU is rented: updates, learning rate, list lengths, memory per rank, FLOPs and hours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankllm_composer.errors import RunError, counted
from rankllm_composer.model.flops import forward_flops, training_flops
from rankllm_composer.preflight.gpus import GPUS, RESERVE, Gpu
from rankllm_composer.preflight.hub import is_cached, published_shape, require_hub
from rankllm_composer.preflight.list_lengths import ListLengths, measure_lists
from rankllm_composer.recipe.advice import data_advice
from rankllm_composer.recipe.checks import check_world
from rankllm_composer.recipe.names import did_you_mean
from rankllm_composer.recipe.packages import check_packages
from rankllm_composer.recipe.times import explain_warmup, updates_in
from rankllm_composer.screen import say
from rankllm_composer.training.schedule import learning_rate_factor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rankllm_composer.preflight.memory import Memory, Workload
    from rankllm_composer.recipe.sections import Recipe

DEFAULT_MFU = 0.4
"""Assumed model FLOPs utilization: the share of the GPU's peak that training reaches. Not measured."""


@dataclass(frozen=True)
class Plan:
    """Estimate of a run on a number of ranks, one GPU each; steps are updates.

    Numbers of steps are None if they depend on an unknown number of lists, `mfu` is None for DEFAULT_MFU.
    """

    recipe: Recipe
    num_ranks: int
    gpu_name: str
    mfu: float | None
    lengths: ListLengths
    work: Workload
    memory: Memory
    suggestions: tuple[tuple[str, Memory], ...]  # changes that make the run fit, with the memory that it then needs
    steps_per_epoch: int | None
    num_steps: int | None
    num_warmup: int | None
    flops_per_list: int

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.gpu_name]

    @property
    def fits(self) -> bool:
        """Whether the peak fits into the usable memory."""
        return self.memory.peak <= self.gpu.usable_bytes

    @property
    def num_flops(self) -> int | None:
        """FLOPs of the run."""
        return None if self.num_steps is None else self.num_steps * self.recipe.batch.global_lists * self.flops_per_list

    @property
    def num_hours(self) -> float | None:
        """Hours of training, without loading, checkpoints and evaluation."""
        return None if self.num_flops is None else self._hours(self.num_flops)

    def _hours(self, num_flops: int) -> float:
        return num_flops / (self.num_ranks * self.gpu.bf16_flops * (self.mfu or DEFAULT_MFU)) / 3600

    def fields(self) -> dict[str, Any]:
        """The plan for JSON, see docs/commands.md; bytes are per rank."""
        tokens = self.lengths.tokens
        return {
            "recipe": self.recipe.run.name,
            "num_ranks": self.num_ranks,
            "gpu": self.gpu_name,
            "fits": self.fits,
            "num_parameters": self.memory.num_parameters,
            "num_trained": self.memory.num_trained,
            "num_lists": self.lengths.num_lists,
            "lists": self.lengths.description,
            "mean_tokens": sum(tokens) / len(tokens) if tokens else None,
            "longest_tokens": max(tokens, default=None),
            "updates_per_epoch": self.steps_per_epoch,
            "updates": self.num_steps,
            "warmup_updates": self.num_warmup,
            "peak_bytes": self.memory.peak,
            "usable_bytes": self.gpu.usable_bytes,
            "at_peak_bytes": self.memory.at_peak,
            "at_update_bytes": self.memory.held,
            "suggestions": [{"change": change, "peak_bytes": memory.peak} for change, memory in self.suggestions],
            "flops_per_list": self.flops_per_list,
            "flops": self.num_flops,
            "mfu": self.mfu or DEFAULT_MFU,
            "is_mfu_given": self.mfu is not None,
            "hours": self.num_hours,
            "gpu_hours": None if self.num_hours is None else self.num_hours * self.num_ranks,
        }

    def lines(self) -> Iterator[str]:
        """Yield the lines to print."""
        batch, recipe = self.recipe.batch, self.recipe
        yield f"{recipe.run.name} on {self.num_ranks} x {self.gpu_name}"
        yield f"model         {recipe.model.name_or_path}: {self.memory.num_parameters:,} parameters"
        if recipe.model.lora is not None:
            yield f"              LoRA trains {self.memory.num_trained:,} of them"
        yield f"lists         {self.lengths.description}"
        yield from self._histogram()
        yield from (f"  advice: {sentence}" for sentence in data_advice(recipe, self.lengths.pairs))
        per_rank = batch.global_lists // self.num_ranks
        max_lists, max_tokens = batch.limits
        limit = f"{max_tokens:,} tokens" if max_tokens else counted(max_lists or 0, "list")
        per_update = f"{counted(batch.global_lists, 'list')} per update, {per_rank} per rank"
        yield f"batch         {per_update}, in microbatches of at most {limit}"
        yield from self._step_lines()
        yield from self._memory_lines()
        yield from self._time_lines()

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

    def _step_lines(self) -> Iterator[str]:
        if self.num_steps is None or self.num_warmup is None:
            yield "updates       unknown without the number of lists: pass --lists, or build the shards"
            return
        per_epoch = "" if self.steps_per_epoch is None else f", {self.steps_per_epoch:,} per epoch"
        yield f"updates       {self.num_steps:,}{per_epoch} ({self.recipe.run.max_duration})"
        points = [round(part * (self.num_steps - 1) / 31) for part in range(32)]
        curve = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * self._learning_rate_factor(point)))] for point in points)
        yield f"lr            {curve}"
        shown = sorted({0, min(self.num_warmup, self.num_steps - 1), self.num_steps // 2, self.num_steps - 1})
        lr = self.recipe.optimizer.lr
        rates = (f"update {update + 1:,}: {lr * self._learning_rate_factor(update):.3g}" for update in shown)
        yield "              " + ", ".join(rates)
        warmup = explain_warmup(
            self.recipe.schedule.warmup,
            self.recipe.run.max_duration,
            lists_per_update=self.recipe.batch.global_lists,
            updates_per_epoch=self.steps_per_epoch,
        )
        if warmup is not None:
            yield f"  warning: {warmup}"

    def _learning_rate_factor(self, update: int) -> float:
        schedule = self.recipe.schedule
        assert self.num_steps is not None and self.num_warmup is not None
        counts = {"num_updates": self.num_steps, "num_warmup": self.num_warmup}
        return learning_rate_factor(update, name=schedule.name, final_fraction=schedule.final_lr_fraction, **counts)

    def _memory_lines(self) -> Iterator[str]:
        work, gpu = self.work, self.gpu
        microbatch = (
            f"a microbatch of {counted(len(work.lengths), 'list')}, {sum(work.lengths):,} tokens; {work.attention}"
        )
        yield f"memory        per rank, at its peak: {microbatch}"
        names = {"buffers": "gathered weights and communication", "logits": "logits and loss"}
        for part, size in self.memory.at_peak.items():
            yield f"  {names.get(part, part):<36} {_gib(size):>8}"
        yield f"  {'total':<36} {_gib(self.memory.peak):>8}"
        held = ", ".join(f"{part} {_gib(size)}" for part, size in self.memory.held.items() if size)
        yield f"  during the optimizer's step: {held}"
        card = f"{_gib(gpu.memory_bytes)} less a reserve of {RESERVE:.0%} (assumed)"
        yield f"  {'fits' if self.fits else 'does not fit'} in {_gib(gpu.usable_bytes)}: {card}"
        host = {"fp32": 4, "bf16": 2}[work.frozen_precision] * self.memory.num_parameters
        yield f"  host memory of rank 0: at least {_gib(host)}, to load the model in {work.frozen_precision}"
        for change, memory in self.suggestions:
            yield f"  fits with {change} (about {_gib(memory.peak)})"
        if not self.fits and not self.suggestions:
            lora = "" if self.recipe.model.lora is not None else " or LoRA (model.lora)"
            yield f"  no suggestion makes it fit: use larger GPUs, shorter lists (data.max_length_tokens){lora}"

    def _time_lines(self) -> Iterator[str]:
        per_list = f"{_flop(self.flops_per_list)} per list"
        yield f"FLOPs         {per_list}, forward and backward, without recomputation"
        if self.num_flops is None or self.num_hours is None:
            per = _time(self._hours(10_000 * self.flops_per_list))
            yield f"time          {per} for each 10,000 lists: pass --lists, or set data.expected_lists"
            return
        yield f"              {_flop(self.num_flops)} in total"
        mfu = f"{DEFAULT_MFU:.0%} (the default, not measured)" if self.mfu is None else f"{self.mfu:.0%} (given)"
        gpu_hours = self.num_hours * self.num_ranks
        gpu_time = f"{gpu_hours:,.1f} GPU hours" if gpu_hours >= 0.1 else "less than 0.1 GPU hours"
        speed = f"an MFU of {mfu} of {self.gpu.bf16_flops / 1e12:,.0f} TFLOP/s"
        yield f"time          {_time(self.num_hours)}, {gpu_time}, at {speed}"


def _gib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB" if 0 < size < 2**30 / 100 else f"{size / 2**30:,.2f} GiB"


def _flop(number: float) -> str:
    """185e12 → "185.0 TFLOP"."""
    power = min(6, max(2, int(math.log10(max(1, number))) // 3))
    return f"{number / 1000**power:,.1f} {' kMGTPE'[power]}FLOP"


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.2f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else "less than a minute"


def plan_recipe(
    recipe: Recipe,
    num_ranks: int,
    *,
    gpu: str = "h100-80gb",
    mfu: float | None = None,
    num_lists: int | None = None,
    sample: int = 500,
    report: Callable[[str], None] = say,
) -> Plan:
    """Plan a run.

    Args:
        recipe: its model may be a folder that contains only config.json.
        num_ranks, gpu: number of GPUs to train on, and a key of GPUS.
        mfu: model FLOPs utilization; None = DEFAULT_MFU.
        num_lists: lists of `data.train`, if its shards and source are elsewhere; None = `data.expected_lists`.
        sample: lists to tokenize, to measure their lengths.
        report: called with a line of progress.
    Raises:
        RunError: unknown GPU, invalid MFU, or no model configuration.
        RecipeError: the batch is not a multiple of the number of ranks.
        ModelError: lists of a pack would see each other in this model.
    """
    from rankllm_composer.model.self_check import check_model

    if gpu not in GPUS:
        remedy = did_you_mean(gpu, GPUS, "Choose one with the same memory.")
        raise RunError(f"gpu is {gpu}; expected one of {', '.join(GPUS)}. {remedy}")
    if mfu is not None and not 0 < mfu <= 1:
        raise RunError(f"mfu is {mfu}; expected a share above 0 and up to 1. Write 40 % as 0.4.")
    check_world(recipe, num_ranks)
    check_packages(recipe, "model.lora")
    config = _load_config(recipe)
    check_model(
        config,
        packing=recipe.batch.packing,
        ranking_alone=recipe.objective.name == "ranking",
        max_length_tokens=recipe.data.max_length_tokens,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    lengths = measure_lists(recipe, num_lists, sample)
    work = workload(recipe, config, lengths, num_ranks)
    report("runs an update on tensors without data")
    from rankllm_composer.preflight.memory import plan_memory
    from rankllm_composer.preflight.suggestions import suggest

    def plan_changed(changed: Recipe, ranks: int) -> Memory:
        return plan_memory(workload(changed, config, lengths, ranks))

    memory, usable = plan_memory(work), GPUS[gpu].usable_bytes
    suggestions = () if memory.peak <= usable else suggest(recipe, num_ranks, usable, plan_changed, report)
    steps_per_epoch, num_steps, num_warmup = _count_steps(recipe, lengths.num_lists)
    return Plan(
        recipe=recipe,
        num_ranks=num_ranks,
        gpu_name=gpu,
        mfu=mfu,
        lengths=lengths,
        work=work,
        memory=memory,
        suggestions=tuple(suggestions),
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        num_warmup=num_warmup,
        flops_per_list=_flops_per_list(recipe, config, lengths),
    )


def _load_config(recipe: Recipe) -> PretrainedConfig:
    from transformers import AutoConfig

    from rankllm_composer.model.loading import warn_trust_remote_code

    model = recipe.model
    if model.trust_remote_code:
        warn_trust_remote_code(model.name_or_path)
    known = None if Path(model.name_or_path).exists() else published_shape(model)
    try:
        if known is None and not is_cached(model.name_or_path, "config.json"):
            require_hub("model.name_or_path", model.name_or_path)
        config: PretrainedConfig = known or AutoConfig.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except RunError as error:
        raise RunError(f"{error} A plan needs only config.json, no weights.") from error
    except (OSError, ValueError) as error:
        found = f"model.name_or_path is {model.name_or_path}, whose config.json is not on this machine"
        remedy = "download it into a folder and pass model.name_or_path=FOLDER"
        raise RunError(f"{found}. A plan needs only config.json, no weights: {remedy}.") from error
    unknown = set(model.config_overrides) - set(config.to_dict())
    if unknown:
        names = ", ".join(sorted(unknown))
        raise RunError(f"model.config_overrides contains {names}; expected keys of {type(config).__name__}.")
    config.update(dict(model.config_overrides))
    return config


def workload(recipe: Recipe, config: PretrainedConfig, lengths: ListLengths, num_ranks: int) -> Workload:
    """The largest microbatch of one rank: of lists of mean length, or of `batch.microbatch_lists` longest lists."""
    from rankllm_composer.model.objective import Objective
    from rankllm_composer.preflight.memory import Workload
    from rankllm_composer.training.assembly import build_peft_config

    batch, limit = recipe.batch, recipe.data.max_length_tokens
    chosen, loss_options = recipe.objective, recipe.objective.ranking_loss_options
    lists_per_rank = batch.global_lists // num_ranks
    trained = [length for length, _ in lengths.pairs_to_train(limit)]
    max_lists, max_tokens = batch.limits
    if max_lists is not None:
        lists = (max(trained),) * max_lists
    else:
        assert max_tokens is not None
        mean = round(sum(trained) / len(trained))
        num_lists = min(lists_per_rank, max(1, max_tokens // mean))
        lists = (mean,) * num_lists
        if num_lists < lists_per_rank:
            lists = (*lists[:-1], mean + max_tokens - mean * num_lists)
    attention = recipe.model.attention
    if attention == "auto":
        attention = "packed_sdpa" if recipe.parallelism.device == "cpu" else "packed_varlen"
    return Workload(
        config=config,
        objective=Objective(chosen.name, ranking_loss=chosen.ranking_loss, ranking_loss_options=loss_options),
        lengths=lists,
        num_targets=max(lengths.num_targets, default=lengths.pairs_to_train(limit)[0][1]),
        num_ranks=num_ranks,
        accumulates=len(lists) < lists_per_rank,
        fsdp=recipe.parallelism.fsdp,
        reshard_after_forward=recipe.parallelism.reshard_after_forward,
        mixed_precision=recipe.parallelism.mixed_precision,
        precision=recipe.parallelism.precision,
        activation_checkpointing=recipe.model.activation_checkpointing,
        keeps_attention=recipe.model.keep_attention,
        attention=attention,
        optimizer=recipe.optimizer.name,
        peft_config=build_peft_config(recipe),
        frozen_precision="fp32" if recipe.model.lora is None else recipe.model.lora.frozen_precision,
    )


def _count_steps(recipe: Recipe, num_lists: int | None) -> tuple[int | None, int | None, int | None]:
    """Updates per epoch, of the run and of the warmup; None if unknown."""
    lists = recipe.batch.global_lists
    per_epoch = None if num_lists is None else math.ceil(num_lists / lists)
    known: dict[str, Any] = {"updates_per_epoch": per_epoch, "lists_per_update": lists}
    num_steps = updates_in(recipe.run.max_duration, **known)
    num_warmup = updates_in(recipe.schedule.warmup, num_updates=num_steps, **known)
    return (None, None, None) if num_steps is None or num_warmup is None else (per_epoch, num_steps, num_warmup)


def _flops_per_list(recipe: Recipe, config: PretrainedConfig, lengths: ListLengths) -> int:
    """Mean FLOPs of training on a list; under LoRA, without gradients of frozen weights, twice the forward pass."""
    pairs = lengths.pairs_to_train(recipe.data.max_length_tokens)
    rows = [(length, 1 if recipe.objective.name == "ranking" else num_targets) for length, num_targets in pairs]
    if recipe.model.lora is None:
        return sum(training_flops(config, [length], num_logits) for length, num_logits in rows) // len(pairs)
    return sum(2 * forward_flops(config, [length], num_logits) for length, num_logits in rows) // len(pairs)
