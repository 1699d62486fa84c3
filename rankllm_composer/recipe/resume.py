"""Which keys of a recipe may change when a run is resumed, and the record of the changes that were accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rankllm_composer.errors import Problem, RunError, first_line
from rankllm_composer.recipe.keys import find_key

RECIPE_NAME = "recipe.yaml"
FREE = (
    "run.folder",
    "run.max_duration",
    "run.autoresume",
    "run.accept_changes",
    "model.attention",
    "model.activation_checkpointing",
    "model.keep_attention",
    "model.compile",
    "data.client_version",
    "data.num_workers",
    "data.prefetch_factor",
    "data.loader_timeout_seconds",
    "data.expected_lists",
    "data.train.local",
    "data.train.remote",
    "data.train.source",
    "data.train.rebuild",
    "data.train.cache_limit",
    "data.train.store_patience_seconds",
    "data.train.download_timeout_seconds",
    "data.eval",
    "batch.microbatch_lists",
    "batch.microbatch_tokens",
    "batch.packing",
    "batch.packing",
    "optimizer.max_skipped_updates",
    "parallelism.reshard_after_forward",
    "parallelism.device",
    "parallelism.dist_timeout_seconds",
    "checkpoint.interval",
    "checkpoint.keep",
    "checkpoint.store_patience_seconds",
    "checkpoint.export",
    "evaluation",
    "logging",
)
"""Keys and sections that may differ when a run is resumed.

They decide how the work is split, where its files are and what is reported, not what is computed. That moved data are
the same data is checked when the position in them is restored.
"""

FIXED = (
    "run.seed",
    "data.train.shuffle",
    "data.train.num_canonical_nodes",
    "data.train.streams",
    "batch.global_lists",
    "optimizer.name",
    "parallelism.fsdp",
)
"""Keys that cannot change within a run: the order of the lists and the layout of a checkpoint rest on them."""

_RECORD = "# changed "


def check_same_recipe(
    existing: str, current: str, place: str, trained: Callable[[Mapping[str, Any]], int | None] = lambda recipe: 0
) -> str:
    """Check that a run may go on with another recipe.

    Args:
        existing, current: resolved recipes as YAML, of the run in `place` and of the run that starts.
        place: key and folder, for messages.
        trained: called with the existing recipe, dotted key → value, if a key differs that is not free; returns the
            batches that the run has trained, None if nothing of it exists: then any recipe may take its place.
    Returns:
        `current`, headed by the record of all accepted changes, see `recorded_changes`.
    Raises:
        RunError: the recipes differ in a key whose change is neither free nor accepted (`run.accept_changes`), or the
            existing one is damaged.
    """
    try:
        before, after = (_flatten(OmegaConf.to_container(OmegaConf.create(text))) for text in (existing, current))
    except Exception as error:  # those of YAML and of OmegaConf have no common class
        raise RunError(
            f"{place} holds a damaged {RECIPE_NAME} ({first_line(error)}). Restore it, or start a new run with another "
            "run.name, run.folder or checkpoint.folder."
        ) from error
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    changed = [key for key in changed if not _is_within(key, FREE)]
    record = list(recorded_changes(existing))
    if changed and (batch := trained(before)) is not None:
        accepted = after.get("run.accept_changes") or ()
        fixed = [key for key in changed if _is_within(key, FIXED)]
        refused = [key for key in changed if not _is_accepted(key, accepted)]
        if fixed or refused:
            listed = [_change(key, before, after) for key in (refused or fixed)]
            more = f"; and {len(listed) - 5} more" if len(listed) > 5 else ""
            found = f"{place} holds a run of another recipe ({'; '.join(listed[:5])}{more})"
            raise RunError(f"{found}. {_remedy(fixed, refused, after)}")
        record += [f"after batch {batch}: {_change(key, before, after)}" for key in changed]
    return "".join(f"{_RECORD}{line}\n" for line in dict.fromkeys(record)) + current


def recorded_changes(recipe_yaml: str) -> tuple[str, ...]:
    """The accepted changes that head a resolved recipe, such as "after batch 200: optimizer.lr was 5e-06, is now …"."""
    lines = recipe_yaml.splitlines()
    return tuple(line.removeprefix(_RECORD) for line in lines if line.startswith(_RECORD))


def read_changes(folder: Path) -> tuple[str, ...]:
    """The changes recorded in the recipe of a folder; empty if it has none."""
    path = folder / RECIPE_NAME
    return recorded_changes(path.read_text(errors="replace")) if path.exists() else ()


def acceptance_problems(accepted: Sequence[str]) -> Iterator[Problem]:
    """Yield what is wrong with the keys in `run.accept_changes`."""
    key = "run.accept_changes"
    for name in accepted:
        if find_key(name.split(".")) is None:
            yield Problem(key, f"[{name}]", "dotted keys such as optimizer.lr", "`recipes keys` lists them.")
        elif _is_within(name, FIXED):
            yield Problem(key, f"[{name}]", "keys that can change within a run", "Remove it, or start a new run.")


def _remedy(fixed: Sequence[str], refused: Sequence[str], recipe: Mapping[str, Any]) -> str:
    """What to do about changes that stop a run."""
    folders = ["run.folder" if recipe.get("run.folder") else "run.name"]
    folders += [key for key in ("checkpoint.folder", "checkpoint.export.folder") if recipe.get(key)]
    new_run = f"start a new run with another {' and '.join(folders)}"
    if fixed:
        return f"Resume with the same recipe ({', '.join(fixed)} cannot change within a run), or {new_run}."
    accepted = [*(recipe.get("run.accept_changes") or ()), *refused]
    accept = f"accept the change with 'run.accept_changes=[{','.join(accepted)}]'"
    return f"Resume with the same recipe, {accept}, or {new_run}."


def _change(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    return f"{key} was {before.get(key)!r}, is now {after.get(key)!r}"


def _is_within(key: str, sections: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def _is_accepted(key: str, accepted: Sequence[str]) -> bool:
    """Whether a change is named, also where a section was null or becomes null."""
    return _is_within(key, accepted) or any(_is_within(name, [key]) for name in accepted)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten {"a": {"b": 1}} to {"a.b": 1}; of mixed streams, only what decides the order of their lists."""
    if prefix == "data.train.streams." and isinstance(tree, list):
        return {prefix[:-1]: [stream.get("proportion") for stream in tree if isinstance(stream, dict)]}
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    return {key: value for name, part in tree.items() for key, value in _flatten(part, f"{prefix}{name}.").items()}
