"""The rules between the keys of a recipe: what contradicts, what does not divide, what is not there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rankllm_composer.errors import Problem, RecipeError
from rankllm_composer.model.loss_table import RANKING_LOSSES
from rankllm_composer.options import SourceOptions
from rankllm_composer.recipe.build import parse_time
from rankllm_composer.recipe.schema import plain_tree, repr_yaml, show
from rankllm_composer.recipe.sections import Evaluation, Export, Recipe, Source, Split
from rankllm_composer.redaction import redact

_SECRET_NAME = re.compile(r"(?:key|token|secret|password|passphrase|credentials?)$", re.IGNORECASE)
"""Names of arguments that hold a secret; compared with the last word of a key."""


def secrets_in(tree: Any, dotted: str = "") -> Iterator[Problem]:
    """Credentials of a recipe as a plain tree, a problem each; `dotted` is the key of the tree."""
    remedy = "remove it, and give it where its client looks for it: the environment, or the client's own file"
    if isinstance(tree, dict):
        for name, value in tree.items():
            below = f"{dotted}.{name}".lstrip(".")
            if isinstance(value, str) and value and _SECRET_NAME.search(name):
                yield Problem(below, "a value that looks like a secret", "no secrets in recipes", remedy)
            else:
                yield from secrets_in(value, below)
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from secrets_in(value, f"{dotted}.{index}")
    elif isinstance(tree, str):
        try:
            parts = urlsplit(tree if "://" in tree else "")
        except ValueError:
            return
        text = tree if parts.scheme != "sftp" else tree.replace("@", "/", 1)  # whose user is no secret
        if parts.password or parts.query:
            yield Problem(dotted, "a URL with credentials", "a URL without password or query", remedy)
        elif redact(text) != text:
            yield Problem(dotted, "a value that looks like a secret", "no secrets in recipes", remedy)


def is_secret(key: str, value: Any) -> bool:
    """Whether a key of a recipe holds what no recipe may hold, and nobody should be shown."""
    return any(secrets_in({key.rpartition(".")[2]: value}))


def contradictions(recipe: Recipe) -> list[Problem]:
    """Everything that cannot be right, whatever the machine and the number of ranks."""
    return [
        *_batch(recipe),
        *_objective(recipe),
        *_times(recipe),
        *_hardware(recipe),
        *_frozen_weights(recipe),
        *_splits(recipe),
        *_outputs(recipe),
        *secrets_in(plain_tree(recipe)),
    ]


def check_world(recipe: Recipe, world_size: int) -> None:
    """Whether the global batch divides over the ranks.

    Args:
        recipe: a checked recipe.
        world_size: number of ranks that train.
    Raises:
        RecipeError: it does not; the message names the nearest batch sizes that do.
    """
    lists, microbatch = recipe.batch.global_lists, recipe.batch.microbatch_lists or 1
    step = world_size * microbatch
    if lists % step == 0:
        return
    each = f"{world_size} ranks" + (f" of {microbatch} lists" if microbatch > 1 else "")
    sizes = [str(size) for size in (lists // step * step, (lists // step + 1) * step) if size]
    problem = Problem(
        "batch.global_lists",
        f"{lists}, which does not divide over {each}",
        f"a multiple of {step}",
        f"set batch.global_lists={' or '.join(sizes)}, or change the number of ranks",
    )
    raise RecipeError(f"recipe {recipe.run.name} on {world_size} ranks", [problem])


def _batch(recipe: Recipe) -> Iterator[Problem]:
    batch, by_lists, by_tokens = recipe.batch, "batch.microbatch_lists", "batch.microbatch_tokens"
    if (batch.microbatch_lists is None) == (batch.microbatch_tokens is None):
        found = (
            "neither it nor microbatch_tokens" if batch.microbatch_lists is None else "it and microbatch_tokens both"
        )
        yield Problem(by_lists, found, "one of the two", f"set one and leave {by_tokens} or it at null", (by_tokens,))
    if batch.microbatch_tokens is not None and batch.microbatch_tokens < recipe.data.max_length_tokens:
        yield Problem(
            by_tokens,
            f"{batch.microbatch_tokens}, too few for a list of data.max_length_tokens={recipe.data.max_length_tokens}",
            f"at least {recipe.data.max_length_tokens}",
            "raise it or lower data.max_length_tokens",
            ("data.max_length_tokens",),
        )
    if batch.microbatch_lists is not None and batch.global_lists % batch.microbatch_lists:
        yield Problem(
            by_lists,
            f"{batch.microbatch_lists}, which does not divide batch.global_lists={batch.global_lists}",
            f"a divisor of {batch.global_lists}",
            "choose both so that ranks * microbatch_lists * steps = global_lists",
            ("batch.global_lists",),
        )


def _objective(recipe: Recipe) -> Iterator[Problem]:
    objective = recipe.objective
    if objective.name != "ranking" and objective.language_modelling_weight == 0:
        remedy = "use objective.name: ranking" if objective.name == "combined" else "raise it"
        yield Problem(
            "objective.language_modelling_weight",
            f"0 with objective.name: {objective.name}",
            "number above 0",
            remedy,
            ("objective.name",),
        )
    if objective.name != "generation" and objective.ranking_weight == 0:
        remedy = "use objective.name: generation" if objective.name == "combined" else "raise it"
        yield Problem(
            "objective.ranking_weight",
            f"0 with objective.name: {objective.name}",
            "number above 0",
            remedy,
            ("objective.name",),
        )
    yield from _loss_options(objective.ranking_loss, objective.ranking_loss_options)


def _loss_options(loss: str, options: dict[str, Any]) -> Iterator[Problem]:
    section, table = "objective.ranking_loss_options", RANKING_LOSSES[loss]
    for name, value in options.items():
        if name not in table:
            near = difflib.get_close_matches(name, table, 1)
            others = [other for other, known in RANKING_LOSSES.items() if name in known]
            remedy = f"did you mean {section}.{near[0]}?" if near else "remove it"
            if not near and others:
                remedy = f"it is an option of {', '.join(others)}: remove it or change objective.ranking_loss"
            yield Problem(
                f"{section}.{name}",
                f"an option that {loss} does not know",
                ", ".join(table) or f"none, {loss} has no options",
                remedy,
                ("objective.ranking_loss",),
            )
        elif table[name] is bool and not isinstance(value, bool):
            yield Problem(f"{section}.{name}", repr_yaml(value), "true or false", "write one of them")
        elif isinstance(allowed := table[name], tuple) and value not in allowed:
            yield Problem(f"{section}.{name}", repr_yaml(value), f"one of {', '.join(allowed)}", "write one of them")
    if options.get("detach_target") is True and "target" in table and options.get("target") != "self_sorted":
        yield Problem(
            f"{section}.detach_target",
            "true without target: self_sorted",
            "false, or true with target: self_sorted",
            "remove it: a target made from ranks carries no gradient",
            ("objective.ranking_loss",),
        )


def _times(recipe: Recipe) -> Iterator[Problem]:
    warmup, duration = parse_time(recipe.schedule.warmup), parse_time(recipe.run.max_duration)
    assert warmup is not None and duration is not None  # both were read by recipe_schema.build
    if warmup[0] >= (1 if warmup[1] == "dur" else duration[0]) and warmup[1] in (duration[1], "dur"):
        yield Problem(
            "schedule.warmup",
            f"'{recipe.schedule.warmup}', the whole run of run.max_duration={recipe.run.max_duration}",
            "less than the run",
            "shorten it or train longer",
            ("run.max_duration",),
        )


def _hardware(recipe: Recipe) -> Iterator[Problem]:
    device, precision = recipe.parallelism.device, recipe.parallelism.precision
    for_gpu = {
        "model.attention": (recipe.model.attention, "flash_attention_2", "auto or packed_sdpa"),
        "optimizer.name": (recipe.optimizer.name, "adamw_8bit", "adamw"),
    }
    for dotted, (value, needs_gpu, instead) in for_gpu.items():
        if device == "cpu" and value == needs_gpu:
            yield Problem(
                dotted, f"{value} with parallelism.device: cpu", instead, "it needs a GPU", ("parallelism.device",)
            )
    if recipe.model.attention == "flash_attention_2" and precision == "fp32":
        yield Problem(
            "model.attention",
            "flash_attention_2 with parallelism.precision: fp32",
            "auto or packed_sdpa",
            "flash-attn computes in bf16 only: change one of the two",
            ("parallelism.precision",),
        )


def _frozen_weights(recipe: Recipe) -> Iterator[Problem]:
    if recipe.model.lora is None or recipe.model.lora.frozen_precision == "fp32":
        return
    for dotted, value, allowed in (
        ("parallelism.fsdp", recipe.parallelism.fsdp, False),
        ("parallelism.precision", recipe.parallelism.precision, "amp_bf16"),
    ):
        if value != allowed:
            yield Problem(
                "model.lora.frozen_precision",
                f"bf16 with {dotted}: {show(value)}",
                f"fp32, or {dotted}: {show(allowed)}",
                "change one of the two",
                (dotted,),
            )


def _splits(recipe: Recipe) -> Iterator[Problem]:
    yield from _split(recipe.data.train, "data.train")
    if recipe.data.eval is not None:
        yield from _split(recipe.data.eval, "data.eval")
        shared = set(_local_folders(recipe.data.train)) & set(_local_folders(recipe.data.eval))
        for local in sorted(shared):
            yield Problem(
                "data.eval",
                f"'{local}', which data.train caches its shards in",
                "a folder of its own",
                "give every set of shards its own local",
                ("data.train",),
            )
    elif recipe.evaluation is not None:
        yield Problem(
            "evaluation",
            "a section, but data.eval is null",
            "null, or a section with data.eval",
            "name the lists to evaluate on in data.eval",
            ("data.eval",),
        )


def _local_folders(split: Split) -> list[str]:
    """Folders that are a cache of something remote; streaming refuses to share one of those."""
    return [str(Path(local)) for remote, local in _folders(split) if remote is not None]


def _folders(split: Split) -> list[tuple[str | None, str]]:
    """(remote, local) of every set of shards."""
    if split.local is not None:
        return [(split.remote, split.local)]
    return [(stream.remote, stream.local) for stream in split.streams]


def _split(split: Split, section: str) -> Iterator[Problem]:
    if (split.local is None) == (not split.streams):
        found = "neither it nor streams" if split.local is None else "it and streams both"
        yield Problem(
            f"{section}.local",
            found,
            "one of the two",
            f"name the folder of the shards in {section}.local, or several in {section}.streams",
            (f"{section}.streams",),
        )
    if split.streams:
        for name in ("remote", "source"):
            if getattr(split, name) is not None:
                yield Problem(
                    f"{section}.{name}",
                    "a value beside streams",
                    "null with streams",
                    f"move it into {section}.streams, or build those shards with `rankllm-composer shards build`",
                    (f"{section}.streams",),
                )
        given = [stream.proportion for stream in split.streams if stream.proportion is not None]
        if given and (len(given) != len(split.streams) or abs(sum(given) - 1) > 1e-6):
            yield Problem(
                f"{section}.streams",
                f"proportions {show([stream.proportion for stream in split.streams])}",
                "a proportion for every stream, which sum to 1, or for none",
                "give all, or remove all",
            )
    has_remote = split.remote is not None or any(stream.remote is not None for stream in split.streams)
    if split.cache_limit is not None and not has_remote:
        yield Problem(
            f"{section}.cache_limit",
            f"'{split.cache_limit}' without a remote",
            "null where the shards exist only locally",
            "remove it: it would delete the only copy",
            (f"{section}.remote", f"{section}.streams"),
        )
    if split.source is not None:
        yield from _source(split.source, f"{section}.source")


def _source(source: Source, section: str) -> Iterator[Problem]:
    for problem in SourceOptions(**asdict(source)).problems():
        involved = tuple(f"{section}.{name}" for name in problem.involved)
        yield problem._replace(key=f"{section}.{problem.key}", involved=involved)
    if source.run is not None and source.stride > source.window:
        yield Problem(
            f"{section}.stride",
            f"{source.stride}, more than {section}.window={source.window}",
            f"at most {source.window}",
            "lower it, or candidates between two lists are never shown",
            (f"{section}.window",),
        )


def _outputs(recipe: Recipe) -> Iterator[Problem]:
    if recipe.checkpoint.keep == 0:
        yield Problem(
            "checkpoint.keep",
            "0",
            "-1 for all, or at least 1",
            "keep one, or the run cannot resume",
            ("run.autoresume",),
        )
    if recipe.model.lora is not None and not recipe.model.lora.target_modules:
        remedy = "name the layers, or set model.lora: null"
        yield Problem("model.lora.target_modules", "[]", "at least one module name", remedy)
    if recipe.evaluation is not None:
        yield from _evaluation(recipe.evaluation, recipe.checkpoint.export)


def _evaluation(evaluation: Evaluation, export: Export | None) -> Iterator[Problem]:
    if not evaluation.decodings:
        remedy = "name one, or set evaluation: null"
        yield Problem("evaluation.decodings", "[]", "first_token, generation or both", remedy)
    for name, value in (("num_shuffles", evaluation.num_shuffles), ("constrained", evaluation.constrained)):
        needed = "first_token" if name == "num_shuffles" else "generation"
        if value and needed not in evaluation.decodings:
            yield Problem(
                f"evaluation.{name}",
                f"{repr_yaml(value)} without {needed} in evaluation.decodings",
                "0" if name == "num_shuffles" else "false",
                f"remove it, or add {needed}",
                ("evaluation.decodings",),
            )
    if evaluation.best_by is None:
        return
    figures = [f"{name}/{figure}" for name in evaluation.decodings for figure in ("ndcg@10", "mrr@10", "tau")]
    if evaluation.best_by not in figures:
        yield Problem(
            "evaluation.best_by",
            f"'{evaluation.best_by}'",
            " or ".join(figures) or "null",
            "name one of them, or null",
            ("evaluation.decodings",),
        )
    if export is None or export.interval != evaluation.interval:
        yield Problem(
            "evaluation.best_by",
            "exports at other times than evaluations" if export else "a figure, but checkpoint.export is null",
            "checkpoint.export.interval equal to evaluation.interval",
            "export when it is evaluated",
            ("checkpoint.export.interval", "evaluation.interval"),
        )


def missing_files(recipe: Recipe) -> list[Problem]:
    """Local files and folders that the recipe names and that are not there."""
    problems = []
    for dotted, path in _named_files(recipe):
        if not Path(path).exists():
            problems.append(Problem(dotted, f"'{path}', which does not exist", "a path", "correct it or create it"))
    for section, split in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        if split is None or split.source is not None:
            continue
        for remote, local in _folders(split):
            if remote is None and not (Path(local) / "index.json").exists():
                remedy = f"run `rankllm-composer shards build --output {local}` with the records, or name a source"
                problems.append(Problem(f"{section}.local", f"'{local}', which holds no shards", "shards", remedy))
    return problems


def _named_files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for name in ("name_or_path", "tokenizer"):
        value = getattr(recipe.model, name)
        if value is not None and value.startswith(("/", "./", "../", "~")):
            yield f"model.{name}", value
    for section, split in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        source = split.source if split is not None else None
        for name in ("input", "run", "judgments", "teacher_run", "queries", "docs"):
            value = getattr(source, name, None)
            is_id = name == "input" and value is not None and not value.endswith((".json", ".jsonl"))
            if value is not None and "://" not in value and not is_id:
                yield f"{section}.source.{name}", value
