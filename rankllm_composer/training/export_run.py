"""A checkpoint of a run as a Hugging Face folder, after the run or while it is stopped."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankllm_composer.environment import as_written
from rankllm_composer.errors import CheckpointError, RankLLMComposerError, RunError
from rankllm_composer.screen import doing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankllm_composer.checkpoints.folder import Manifest
    from rankllm_composer.prompts.contract import DecodingContract
    from rankllm_composer.recipe.sections import Recipe


def export_run(run: Path, output: Path, name: str | None = None, merge_lora: bool | None = None) -> str:
    """Export a checkpoint of a run, as the run itself exports its model; an earlier export in `output` is replaced.

    Args:
        output: local folder to write. It appears complete or not at all, so a killed export is simply run again.
        name: of the checkpoint, such as ep0-ba2; None = the newest complete one.
        merge_lora: False = export a LoRA adapter without the model that it changes; None = as the recipe says.
    Returns:
        Name of the checkpoint.
    Raises:
        RunError: `run` is not the folder of a run.
        CheckpointError: there is no complete checkpoint, or none of this name.
        ModelError: the checkpoint cannot be read, or does not fit the recipe's model.
        StoreError: `output` cannot be written.
    """
    from rankllm_composer.checkpoints.folder import damage_in
    from rankllm_composer.export.model_card import render_card
    from rankllm_composer.export.model_folder import ServedModel, export_checkpoint
    from rankllm_composer.model.loading import load_causal_lm
    from rankllm_composer.recipe.load import load_recipe
    from rankllm_composer.recipe.resume import RECIPE_NAME, read_changes
    from rankllm_composer.storage.object_store import is_remote
    from rankllm_composer.training import assembly
    from rankllm_composer.training.checkpoint_callback import UNSHARDED_FILE

    if not (run / RECIPE_NAME).is_file():
        raise RunError(f"{run} has no {RECIPE_NAME}; expected the folder of a run, such as runs/NAME.")
    recipe = load_recipe(run / RECIPE_NAME)
    keys = recipe.model
    checkpoints = recipe.checkpoint.folder
    if checkpoints is None or is_remote(checkpoints):
        checkpoints = str(run / "checkpoints")
    checkpoint, manifest = _choose(Path(checkpoints), name)
    with doing(f"checking the checkpoint {checkpoint.name}"):
        damage = damage_in(checkpoint, manifest)
    if damage is not None:
        raise CheckpointError(damage)
    if merge_lora is None:
        merge_lora = recipe.checkpoint.export is None or recipe.checkpoint.export.merge_lora
    with doing("loading the tokenizer and counting the lists"):
        tokenizer = assembly.build_tokenizer(recipe)
        contract, data, num_lists = _contract(recipe, tokenizer)
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
    facts = replace(
        assembly.card_facts(recipe, contract, data, num_lists),
        is_adapter=adapter_config is not None,
        trained_lists=_trained_lists(run, manifest.batch),
        progress=f"checkpoint {checkpoint.name} (after {manifest.batch} batches)",
        changes=read_changes(checkpoint.parent),
    )
    source = checkpoint if manifest.is_sharded else checkpoint / UNSHARDED_FILE
    with doing(f"reading {checkpoint.name} and writing {output}"):
        export_checkpoint(source, output, served, render_card(facts), batch=manifest.batch, base=base)
    return checkpoint.name


def _choose(folder: Path, name: str | None) -> tuple[Path, Manifest]:
    """The checkpoint of this name, or the newest complete one."""
    from rankllm_composer.checkpoints.folder import complete_checkpoints

    complete = complete_checkpoints(folder)
    if not complete:
        raise CheckpointError(
            f"{folder} has no complete checkpoint. Wait for one, or download one from the run's object store."
        )
    if name is None:
        return complete[-1]
    for path, manifest in complete:
        if path.name == name:
            return path, manifest
    names = [path.name for path, _ in complete]
    if (folder / name).is_dir():
        reason = "is incomplete"
    else:
        close = get_close_matches(name, names, n=1)
        reason = f"does not exist; did you mean {close[0]}?" if close else "does not exist"
    raise CheckpointError(f"{folder / name} {reason}. Complete checkpoints: {', '.join(names)}.")


def _contract(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[DecodingContract, tuple[str, ...], int | None]:
    """Contract, sources and number of the training lists, or the contract alone from an earlier export of the run."""
    from rankllm_composer.prompts.contract import CONTRACT_FILE, read_contract
    from rankllm_composer.training import assembly

    try:
        contents = assembly.training_contents(recipe)
        return assembly.build_contract(recipe, tokenizer, contents), contents.sources, sum(contents.lists.values())
    except RankLLMComposerError:  # the data is gone
        exports = Path(recipe.export_folder).glob(f"*/{CONTRACT_FILE}") if recipe.export_folder else ()
        for path in sorted(exports):
            return read_contract(path.parent), (), None
        raise


def _trained_lists(run: Path, batch: int) -> dict[str, int]:
    """Lists trained and left out in the epoch of a batch, by the run's metrics; empty if they do not say."""
    from rankllm_composer.training.guards import TRAINED_LISTS
    from rankllm_composer.training.progress import read_metrics

    path = run / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    line = next((line for line in lines if line.get("batch") == batch and line.get("event") == "batch"), {})
    return {name: int(line[metric]) for name, metric in TRAINED_LISTS.items() if metric in line}


def _generation_config(recipe: Recipe, causal_lm: Any) -> Any:
    """The generation settings that the base model comes with, or those of its configuration."""
    from transformers import GenerationConfig

    if not recipe.model.random_weights:
        with suppress(OSError):
            return GenerationConfig.from_pretrained(recipe.model.name_or_path, revision=recipe.model.revision or "main")
    return causal_lm.generation_config
