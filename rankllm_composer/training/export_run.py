"""A checkpoint of a run as a Hugging Face folder, after the run or while it is stopped."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankllm_composer.environment import as_written
from rankllm_composer.errors import CheckpointError, RankLLMComposerError, RunError, counted
from rankllm_composer.screen import doing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankllm_composer.checkpoints.folder import Manifest
    from rankllm_composer.prompts.contract import DecodingContract
    from rankllm_composer.recipe.sections import Recipe


def export_run(
    run: Path, output: Path, name: str | None = None, merge_lora: bool | None = None, *, average: int = 1
) -> str:
    """Export a checkpoint of a run, as the run itself exports its model; an earlier export in `output` is replaced.

    Args:
        output: local folder to write. It appears complete or not at all, so a killed export is simply run again.
        name: of the checkpoint, such as ep0-ba2; None = the newest complete one.
        merge_lora: False = export a LoRA adapter without the model that it changes; None = as the recipe says.
        average: number of checkpoints whose weights are averaged, up to the chosen one.
    Returns:
        Name of the checkpoint, or the names.
    Raises:
        RunError: `run` is not the folder of a run.
        CheckpointError: there is no complete checkpoint, or none of this name, or too few to average.
        ModelError: the checkpoint cannot be read, or does not fit the recipe's model.
        StoreError: `output` cannot be written.
    """
    from rankllm_composer.checkpoints.folder import damage_in
    from rankllm_composer.export.model_card import render_card
    from rankllm_composer.export.model_folder import ServedModel, export_checkpoints
    from rankllm_composer.model.loading import load_causal_lm
    from rankllm_composer.recipe.load import load_recipe
    from rankllm_composer.recipe.resume import RECIPE_NAME, read_changes
    from rankllm_composer.storage.object_store import is_remote
    from rankllm_composer.training import assembly
    from rankllm_composer.training.checkpoint_callback import UNSHARDED_FILE
    from rankllm_composer.training.facts import card_facts

    if not (run / RECIPE_NAME).is_file():
        raise RunError(f"{run} has no {RECIPE_NAME}; expected the folder of a run, such as runs/NAME.")
    recipe = load_recipe(run / RECIPE_NAME)
    keys = recipe.model
    checkpoints = recipe.checkpoint.folder
    if checkpoints is None or is_remote(checkpoints):
        checkpoints = str(run / "checkpoints")
    chosen = _choose(Path(checkpoints), name, average)
    for path, manifest in chosen:
        with doing(f"checking the checkpoint {path.name}"):
            damage = damage_in(path, manifest)
        if damage is not None:
            raise CheckpointError(damage)
    checkpoint, manifest = chosen[-1]
    if merge_lora is None:
        merge_lora = recipe.checkpoint.export is None or recipe.checkpoint.export.merge_lora
    with doing("loading the tokenizer and counting the lists"):
        tokenizer = assembly.build_tokenizer(recipe)
        contract, data = _contract(recipe, tokenizer)
        recorded, num_lists = _recorded_data(run)
    base: Any = None
    with doing(f"loading {as_written(keys.name_or_path)}"):
        if keys.lora is not None and merge_lora:
            on_cpu = replace(recipe, model=replace(keys, attention="auto"))  # flash-attn does not run on a CPU
            base = assembly.build_model(on_cpu, tokenizer, "cpu").model
            causal_lm = base.get_base_model()
        else:
            causal_lm = load_causal_lm(keys, on_meta=True)
    adapter_config = None if merge_lora else assembly.build_peft_config(recipe)
    if adapter_config is not None:
        adapter_config.base_model_name_or_path = causal_lm.name_or_path
    served = ServedModel(
        config=causal_lm.config,
        tokenizer=tokenizer,
        contract=contract,
        generation_config=_generation_config(recipe, causal_lm),
        dtype=assembly.export_dtype(recipe),
        model_class=type(causal_lm),
        adapter_config=adapter_config,
    )
    names = f"checkpoint {checkpoint.name}"
    if average > 1:
        names = f"the mean of the checkpoints {', '.join(path.name for path, _ in chosen)}"
    facts = replace(
        card_facts(recipe, contract, data or recorded, num_lists),
        is_adapter=adapter_config is not None,
        trained_lists=_trained_lists(run, manifest.batch),
        progress=f"{names} (after {counted(manifest.batch, 'batch')})",
        changes=read_changes(checkpoint.parent),
    )
    sources = [path if manifest.is_sharded else path / UNSHARDED_FILE for path, manifest in chosen]
    with doing(f"reading {names} and writing {output}"):
        export_checkpoints(sources, output, served, render_card(facts), batch=manifest.batch, base=base)
    return names


def finished_export(run: Path) -> Path:
    """The best export of a run, or its newest if none is marked best; `run` itself if it is an export.

    Raises:
        RunError: there is none.
        ModelError: the list of an export's files is damaged.
    """
    from rankllm_composer.prompts.contract import CONTRACT_FILE
    from rankllm_composer.recipe.load import load_recipe
    from rankllm_composer.recipe.resume import RECIPE_NAME
    from rankllm_composer.storage.content import EXPORT_FILE, read_content

    if (run / CONTRACT_FILE).is_file():
        return run.resolve()
    folders = [run / "hf"]  # also where the run's folder was copied
    if (run / RECIPE_NAME).is_file() and (named := load_recipe(run / RECIPE_NAME).export_folder) is not None:
        folders.append(Path(named))
    for folder in folders:
        if (folder / "best" / CONTRACT_FILE).is_file():
            return (folder / "best").resolve()
        found = [
            (content.batch, path.parent)
            for path in folder.glob(f"*/{EXPORT_FILE}")
            if (content := read_content(path.parent))
        ]
        if found:
            return max(found)[1].resolve()
    raise RunError(f"{run} holds no export; expected an exported folder or that of a run. Add --output to make one.")


def _choose(folder: Path, name: str | None, number: int) -> list[tuple[Path, Manifest]]:
    """The checkpoint of this name, or the newest complete one, at the end of so many before it."""
    from rankllm_composer.checkpoints.folder import complete_checkpoints

    complete = complete_checkpoints(folder)
    if not complete:
        raise CheckpointError(
            f"{folder} has no complete checkpoint. Wait for one, or download one from the run's object store."
        )
    for place, (path, _) in enumerate(complete, start=1):
        if path.name == (name or complete[-1][0].name):
            if place < number:
                raise CheckpointError(
                    f"{folder} has {place} complete checkpoints up to {path.name}; expected {number}. Average fewer, "
                    "or keep more (checkpoint.keep)."
                )
            return complete[place - number : place]
    assert name is not None
    names = [path.name for path, _ in complete]
    if (folder / name).is_dir():
        reason = "is incomplete"
    else:
        close = get_close_matches(name, names, n=1)
        reason = f"does not exist; did you mean {close[0]}?" if close else "does not exist"
    raise CheckpointError(f"{folder / name} {reason}. Complete checkpoints: {', '.join(names)}.")


def _contract(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[DecodingContract, tuple[str, ...]]:
    """Contract and sources of the training lists, or the contract alone from an earlier export of the run."""
    from rankllm_composer.prompts.contract import CONTRACT_FILE, read_contract
    from rankllm_composer.training import assembly

    try:
        contents = assembly.training_contents(recipe)
        return assembly.build_contract(recipe, tokenizer, contents), contents.sources
    except RankLLMComposerError:  # the data is gone
        exports = Path(recipe.export_folder).glob(f"*/{CONTRACT_FILE}") if recipe.export_folder else ()
        for path in sorted(exports):
            return read_contract(path.parent), ()
        raise


def _recorded_data(run: Path) -> tuple[tuple[str, ...], int | None]:
    """Sources of the lists and number of lists per epoch, as the run recorded them; empty and None if it did not."""
    from rankllm_composer.training.run_files import HISTORY_FILE, read_history

    starts = [line for line in read_history(run / HISTORY_FILE) if line.get("event") == "start"]
    data, number = (starts[-1].get("data"), starts[-1].get("lists_per_epoch")) if starts else ((), None)
    sources = tuple(map(str, data)) if isinstance(data, list) else ()
    return sources, number if isinstance(number, int) else None


def _trained_lists(run: Path, batch: int) -> dict[str, int]:
    """Lists trained up to a batch, and left out in its epoch, by the run's metrics; empty if they do not say."""
    from rankllm_composer.training.run_files import METRICS_FILE, TRAINED_LISTS, read_metrics

    path = run / METRICS_FILE
    lines = [line for line in read_metrics(path) if line.get("event") == "batch"] if path.exists() else []
    lines = [line for line in lines if line["batch"] <= batch and line.keys() >= set(TRAINED_LISTS.values())]
    if not lines or lines[-1]["batch"] != batch:
        return {}
    per_epoch = {line["epoch"]: int(line[TRAINED_LISTS["trained"]]) for line in lines}  # the last line of each counts
    return {"total": sum(per_epoch.values()), "too_long": int(lines[-1][TRAINED_LISTS["too_long"]])}


def _generation_config(recipe: Recipe, causal_lm: Any) -> Any:
    """The generation settings that the base model comes with, or those of its configuration."""
    from transformers import GenerationConfig

    if not recipe.model.random_weights:
        with suppress(OSError):
            return GenerationConfig.from_pretrained(recipe.model.name_or_path, revision=recipe.model.revision or "main")
    return causal_lm.generation_config
