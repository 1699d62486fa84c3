"""The rules between the keys of a recipe: what contradicts, what does not divide, which files are missing.

Also what is allowed but deserves a warning: keys without effect, and what causes trouble later.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rankllm_composer.environment import FromEnvironment, as_written
from rankllm_composer.errors import Problem, RecipeError, counted, shell_line
from rankllm_composer.model.loss_table import RANKING_LOSSES
from rankllm_composer.options import FOR_PASSAGES, FROM_RUN, IRDS, SourceOptions
from rankllm_composer.prompts.client_names import describe_misread
from rankllm_composer.prompts.clients import CLIENTS, CURRENT_CLIENT
from rankllm_composer.recipe.evaluation_rules import evaluation_problems
from rankllm_composer.recipe.keys import plain_tree, show
from rankllm_composer.recipe.packages import SOURCE_FILES
from rankllm_composer.recipe.places import argument_problems, place_problems, template_problems
from rankllm_composer.recipe.resume import acceptance_problems
from rankllm_composer.recipe.sections import Recipe, Split
from rankllm_composer.recipe.times import explain_warmup, parse_time
from rankllm_composer.recipe.validate import shown
from rankllm_composer.redaction import redact

_SECRET_NAME = re.compile(r"(?:key|token|secret|password|passphrase|credentials?)$", re.IGNORECASE)
"""Names of arguments that hold a secret; compared with the end of a key."""


def secrets_in(tree: Any, dotted: str = "") -> Iterator[Problem]:
    """The credentials in a recipe as a plain tree; `dotted` is the key of the tree."""
    remedy = "Remove it, and give it where its client looks for it, or write ${oc.env:NAME} instead."
    if isinstance(tree, FromEnvironment):  # the reference is written, not the value
        return
    if isinstance(tree, dict):
        for name, value in tree.items():
            below = f"{dotted}.{name}".lstrip(".")
            is_text = isinstance(value, str) and not isinstance(value, FromEnvironment)
            if is_text and value and _SECRET_NAME.search(name):
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
    """Whether a key of a recipe holds a secret, which must not be printed."""
    return any(secrets_in({key.rpartition(".")[2]: value}))


def contradictions(recipe: Recipe) -> list[Problem]:
    """Everything that cannot be right, whatever the machine and the number of ranks."""
    rules = [_batch, _objective, _loss_options, _warmup, _hardware, _frozen_weights, _splits, _outputs]
    rules += [place_problems, argument_problems, template_problems]
    return [*(problem for rule in rules for problem in rule(recipe)), *secrets_in(plain_tree(recipe))]


def check_world(recipe: Recipe, world_size: int) -> None:
    """Raise RecipeError, with the nearest possible sizes, if the global batch does not divide over the ranks."""
    problems = [*recipe.batch.rank_problems(world_size)]
    if problems:
        raise RecipeError(f"recipe {recipe.run.name} on {counted(world_size, 'rank')}", problems)


def _batch(recipe: Recipe) -> Iterator[Problem]:
    batch = recipe.batch
    yield from batch.problems(recipe.data.max_length_tokens)
    if batch.packing and batch.microbatch_lists is not None and batch.global_lists % batch.microbatch_lists:
        key, expected = "batch.microbatch_lists", f"a divisor of batch.global_lists={batch.global_lists}"
        remedy = "Choose both so that global_lists is a multiple of ranks * microbatch_lists."
        yield Problem(key, str(batch.microbatch_lists), expected, remedy, ("batch.global_lists",))


def _objective(recipe: Recipe) -> Iterator[Problem]:
    objective = recipe.objective
    for weight, value, other in (
        ("language_modelling_weight", objective.language_modelling_weight, "ranking"),
        ("ranking_weight", objective.ranking_factor, "generation"),
    ):
        if objective.name != other and value == 0:
            remedy = f"Use objective.name: {other}." if objective.name == "combined" else "Raise it."
            found = f"0 with objective.name: {objective.name}"
            yield Problem(f"objective.{weight}", found, "a number above 0", remedy, ("objective.name",))


def _loss_options(recipe: Recipe) -> Iterator[Problem]:
    section, involved = "objective.ranking_loss_options", ("objective.ranking_loss",)
    loss, options = recipe.objective.ranking_loss, recipe.objective.ranking_loss_options
    if loss not in RANKING_LOSSES:  # a function of the user's own checks its options itself
        return
    table = RANKING_LOSSES[loss]
    for name, value in options.items():
        key, allowed = f"{section}.{name}", table.get(name)
        if allowed is None:
            near = difflib.get_close_matches(name, table, 1)
            others = [other for other, known in RANKING_LOSSES.items() if name in known]
            remedy = f"Did you mean {section}.{near[0]}?" if near else "Remove it."
            if not near and others:
                remedy = f"It is an option of {', '.join(others)}: remove it or change objective.ranking_loss."
            expected = f"one of {', '.join(table)}" if table else f"no options, as {loss} has none"
            yield Problem(key, f"not an option of {loss}", expected, remedy, involved)
        elif allowed is bool and not isinstance(value, bool):
            yield Problem(key, shown(value), "true or false", "Write one of them.")
        elif allowed is float and not (isinstance(value, int | float) and not isinstance(value, bool) and value > 0):
            yield Problem(key, shown(value), "a number above 0", "Write one.")
        elif isinstance(allowed, tuple) and value not in allowed:
            yield Problem(key, shown(value), f"one of {', '.join(allowed)}", "Write one of them.")
    if options.get("detach_target") is True and "target" in table and options.get("target") != "self_sorted":
        found, expected = "true without target: self_sorted", "false, or true with target: self_sorted"
        remedy = "Remove it: a target made from ranks has no gradient."
        yield Problem(f"{section}.detach_target", found, expected, remedy, involved)


def _warmup(recipe: Recipe) -> Iterator[Problem]:
    key, text, duration = "schedule.warmup", recipe.schedule.warmup, recipe.run.max_duration
    warmup, length = parse_time(text), parse_time(duration)
    if warmup is None or length is None:  # stand-ins for what is wrong
        return
    # Of epochs, the number of updates is unknown here; `warmup_warning` compares it if the lists are on this machine.
    per_epoch = 1 if warmup[1] == length[1] == "ep" else None
    is_long = explain_warmup(
        text, duration, lists_per_update=recipe.batch.global_lists, updates_per_epoch=per_epoch
    ) or (warmup[1] == "dur" and warmup[0] >= 1)
    if is_long:
        expected = f"shorter than the run, run.max_duration={duration}"
        yield Problem(key, f"'{text}'", expected, "Shorten it or train longer.", ("run.max_duration", "batch"))


def warmup_warning(recipe: Recipe) -> str | None:
    """A sentence about a warmup that is as long as the run, if the number of lists can be counted on this machine."""
    split = recipe.data.train
    if any(stream.proportion is not None for stream in split.streams):
        return None
    try:
        num_lists = _count_lists(split)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    lists = recipe.batch.global_lists
    updates_per_epoch = -(-num_lists // lists)
    return explain_warmup(
        recipe.schedule.warmup, recipe.run.max_duration, lists_per_update=lists, updates_per_epoch=updates_per_epoch
    )


def _count_lists(split: Split) -> int:
    """The lists of a split: of its local shards, by their index, or of its records, one per line or in one array."""
    indexes = [Path(local, "index.json") for _, local in _sets(split)]
    if split.source is None or split.source.input is None or indexes[0].exists():
        indices = (json.loads(index.read_bytes())["shards"] for index in indexes)
        return sum(int(shard["samples"]) for shards in indices for shard in shards)
    content = Path(split.source.input).read_bytes().strip()
    return len(json.loads(content)) if content.startswith(b"[") else content.count(b"\n") + 1


def _hardware(recipe: Recipe) -> Iterator[Problem]:
    attention, keys = recipe.model.attention, recipe.parallelism
    is_kernel, instead = attention in ("packed_varlen", "flash_attention_2"), "auto or packed_sdpa"
    if is_kernel and keys.device == "cpu":
        found = f"{attention} with parallelism.device: cpu"
        yield Problem("model.attention", found, instead, "It needs a GPU.", ("parallelism.device",))
    if recipe.optimizer.name == "adamw_8bit" and keys.device == "cpu":
        found = "adamw_8bit with parallelism.device: cpu"
        yield Problem("optimizer.name", found, "adamw", "It needs a GPU.", ("parallelism.device",))
    elif recipe.optimizer.name == "adamw_8bit" and keys.fsdp:
        found, expected = "adamw_8bit with parallelism.fsdp: true", "adamw, or parallelism.fsdp: false"
        remedy = "Change one of the two: bitsandbytes cannot update sharded weights."
        yield Problem("optimizer.name", found, expected, remedy, ("parallelism.fsdp",))
    if recipe.model.keep_attention and recipe.model.compile:
        remedy = "Change one of the two: torch would leave the recomputed layers uncompiled."
        yield Problem("model.keep_attention", "true with model.compile: true", "false", remedy, ("model.compile",))
    if is_kernel and keys.precision == "fp32":
        found = f"{attention} with parallelism.precision: fp32"
        remedy = "Change one of the two: the kernel computes in bf16 only."
        yield Problem("model.attention", found, instead, remedy, ("parallelism.precision",))


def _frozen_weights(recipe: Recipe) -> Iterator[Problem]:
    if recipe.model.lora is None or recipe.model.lora.frozen_precision == "fp32":
        return
    for name, value, needed in (
        ("parallelism.fsdp", recipe.parallelism.fsdp, False),
        ("parallelism.precision", recipe.parallelism.precision, "amp_bf16"),
    ):
        if value != needed:
            found, expected = f"bf16 with {name}: {show(value)}", f"fp32, or {name}: {show(needed)}"
            yield Problem("model.lora.frozen_precision", found, expected, "Change one of the two.", (name,))


def named_splits(recipe: Recipe) -> Iterator[tuple[str, Split]]:
    """data.train and, if there is one, data.eval, with their dotted keys."""
    yield "data.train", recipe.data.train
    if recipe.data.eval is not None:
        yield "data.eval", recipe.data.eval


def _splits(recipe: Recipe) -> Iterator[Problem]:
    for section, split in named_splits(recipe):
        yield from _split(split, section)
        if split.source is not None:
            yield from _source(split.source, f"{section}.source")
    if recipe.data.eval is not None:
        cached = ({str(Path(local)) for remote, local in _sets(split) if remote} for _, split in named_splits(recipe))
        for local in sorted(set.intersection(*cached)):  # streaming refuses to share a cache
            found, remedy = f"cached in '{local}', as is data.train", "Give every set of shards its own local."
            yield Problem("data.eval", found, "another folder", remedy, ("data.train",))
    elif recipe.evaluation is not None:
        found, expected = "a section, but data.eval is null", "null, or a section with data.eval"
        yield Problem("evaluation", found, expected, "Name the lists to evaluate on in data.eval.", ("data.eval",))


def _sets(split: Split) -> list[tuple[str | None, str]]:
    """(remote, local) of every set of shards."""
    if split.local is not None:
        return [(split.remote, split.local)]
    return [(stream.remote, stream.local) for stream in split.streams]


def _split(split: Split, section: str) -> Iterator[Problem]:
    streams = f"{section}.streams"
    if (split.local is None) == (not split.streams):
        found = f"null, and {streams} is empty" if split.local is None else f"set, and so is {streams}"
        remedy = f"Name the folder of the shards in {section}.local, or several in {streams}."
        yield Problem(f"{section}.local", found, "exactly one of the two", remedy, (streams,))
    for name in ("remote", "source") if split.streams else ():
        if getattr(split, name) is not None:
            remedy = f"Move it into {streams}, or build those shards with `rankllm-composer shards build`."
            yield Problem(f"{section}.{name}", f"set, and so is {streams}", "null with streams", remedy, (streams,))
    proportions = [stream.proportion for stream in split.streams]
    given = [proportion for proportion in proportions if proportion is not None]
    if given and (len(given) != len(proportions) or abs(sum(given) - 1) > 1e-6):
        expected = "a proportion for every stream, which sum to 1, or for none"
        yield Problem(streams, f"given proportions {show(proportions)}", expected, "Set all, or remove all.")
    if split.cache_limit is not None and not any(remote for remote, _ in _sets(split)):
        found, remedy = f"'{split.cache_limit}' without a remote", "Remove it: it would delete the only copy."
        expected, involved = "null if the shards exist only locally", (f"{section}.remote", streams)
        yield Problem(f"{section}.cache_limit", found, expected, remedy, involved)


def _source(source: SourceOptions, section: str) -> Iterator[Problem]:
    for problem in source.problems():
        involved = tuple(f"{section}.{name}" for name in problem.involved)
        yield problem._replace(key=f"{section}.{problem.key}", involved=involved)
    if source.run is not None and source.step > source.window:
        remedy = "Lower it, or candidates between two lists are never shown."
        expected = f"at most {section}.window={source.window}"
        yield Problem(f"{section}.stride", str(source.step), expected, remedy, (f"{section}.window",))


def _outputs(recipe: Recipe) -> Iterator[Problem]:
    yield from acceptance_problems(recipe.run.accept_changes)
    if recipe.checkpoint.keep == 0:
        remedy = "Keep at least one, or the run cannot resume."
        yield Problem("checkpoint.keep", "0", "-1 for all, or at least 1", remedy, ("run.autoresume",))
    if recipe.checkpoint.export is not None and recipe.checkpoint.export.keep == 0:
        remedy = "Keep at least one, or set checkpoint.export: null."
        yield Problem("checkpoint.export.keep", "0", "-1 for all, or at least 1", remedy)
    if recipe.model.lora is not None and not recipe.model.lora.target_modules:
        remedy = "Name the layers, or set model.lora: null."
        yield Problem("model.lora.target_modules", "[]", "at least one module name", remedy)
    if recipe.evaluation is not None:
        yield from evaluation_problems(recipe.evaluation, recipe.checkpoint.export)


def missing_files(recipe: Recipe) -> list[Problem]:
    """Local files and folders that the recipe names and that do not exist."""
    problems = [
        Problem(key, f"'{as_written(path)}', which does not exist", "an existing path", "Correct or create it.")
        for key, path in _named_files(recipe)
        if not Path(path).exists()
    ]
    for section, split in named_splits(recipe):
        for remote, local in _sets(split) if split.source is None else ():
            if remote is None and not (Path(local) / "index.json").exists():
                local = as_written(local)
                build = shell_line("rankllm-composer", "shards", "build", "--input", "RECORDS", "--output", local)
                remedy = f"Run `{build}`, or name a source."
                problems.append(Problem(f"{section}.local", f"'{local}', which holds no shards", "shards", remedy))
    return problems


def _named_files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for name in ("name_or_path", "tokenizer"):
        value = getattr(recipe.model, name)
        if value is not None and value.startswith(("/", "./", "../", "~")):
            yield f"model.{name}", value
    for section, split in named_splits(recipe):
        for name in SOURCE_FILES:
            value = getattr(split.source, name, None)
            is_id = name == "input" and value is not None and not value.endswith((".json", ".jsonl"))
            if value is not None and "://" not in value and not value.startswith(IRDS) and not is_id:
                yield f"{section}.source.{name}", value


def without_effect(recipe: Recipe) -> dict[str, str]:
    """Dotted keys that this recipe never uses, with the reason. A section stands for all its keys."""
    reasons: dict[str, str] = {}
    if recipe.objective.name == "generation":
        names = ("ranking_weight", "ranking_loss", "ranking_loss_options", "unjudged")
        keys = [f"objective.{name}" for name in names]
        reasons |= dict.fromkeys(keys, "objective.name is generation")
    if recipe.objective.name == "ranking":
        keys = ["objective.language_modelling_weight", "objective.token_weights"]
        reasons |= dict.fromkeys(keys, "objective.name is ranking")
    if recipe.schedule.name == "constant":
        reasons["schedule.final_lr_fraction"] = "schedule.name is constant"
    if not recipe.batch.packing:
        keys = ["batch.microbatch_lists", "batch.microbatch_tokens", "model.attention"]
        reasons |= dict.fromkeys(keys, "batch.packing is false")
    if recipe.model.keep_attention and not recipe.model.activation_checkpointing:
        reasons["model.keep_attention"] = "model.activation_checkpointing is 0"
    if not recipe.parallelism.fsdp:
        keys = ["parallelism.reshard_after_forward", "parallelism.mixed_precision"]
        reasons |= dict.fromkeys(keys, "parallelism.fsdp is false")
    if recipe.model.lora is None and recipe.checkpoint.export is not None:
        reasons["checkpoint.export.merge_lora"] = "model.lora is null"
    if recipe.evaluation is None:
        reasons["data.eval"] = "evaluation is null"
    for section, split in named_splits(recipe):
        if split.source is not None and split.source.input is not None:
            keys = [f"{section}.source.{name}" for name in FROM_RUN if name not in FOR_PASSAGES]
            reasons |= dict.fromkeys(keys, f"{section}.source.input is set")
        elif split.source is not None:
            keys = [f"{section}.source.{name}" for name in ("split", "config", "answers")]
            reasons |= dict.fromkeys(keys, f"{section}.source.input is null")
    return reasons


def surprises(recipe: Recipe) -> Iterator[str]:
    """One sentence for everything that works in training and causes trouble later."""
    client = recipe.data.client_version
    misread = describe_misread(recipe.export_folder or "", client)
    if misread is not None:
        yield f"checkpoint.export.folder: {misread}"
    styles = [
        split.identifiers or (split.source.identifiers if split.source and split.source.run else None)
        for _, split in named_splits(recipe)
    ]
    source = recipe.data.eval.source if recipe.data.eval is not None else None
    if (
        recipe.evaluation is not None
        and "first_token" in recipe.evaluation.decodings
        and styles[-1] == "numbers"
        and source is not None
        and source.window > 9
    ):
        yield (
            f"evaluation.decodings: windows of {source.window} candidates named by numbers are ranked by first_token "
            "only if the tokenizer has one token for each number; otherwise by generation"
        )
    if not CLIENTS[client].reads_numbers and recipe.objective.name != "generation" and "numbers" in styles:
        yield (
            f"objective.name: {recipe.objective.name} scores identifiers at one token, where rank_llm {client} reads "
            f"only letters; numbers can be served by generation alone, or by data.client_version={CURRENT_CLIENT}"
        )
    if not CLIENTS[client].appends_bracket and recipe.objective.name == "ranking":
        yield (
            f"objective.name: a model trained by ranking alone never learns to write the '[' that rank_llm {client} "
            f"waits for, so that only `rerank` reads it; data.client_version={CURRENT_CLIENT} appends the '['"
        )
