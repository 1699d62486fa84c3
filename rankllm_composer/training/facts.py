"""What is known of a run: for the card of its model, and for its history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankllm_composer.environment import as_written
from rankllm_composer.export.card_metadata import base_model_id, public_name
from rankllm_composer.export.model_card import CardFacts
from rankllm_composer.export.published import published_figures
from rankllm_composer.prompts.contract import DecodingContract
from rankllm_composer.recipe.sections import Recipe


def card_facts(recipe: Recipe, contract: DecodingContract, data: Sequence[str], num_lists: int | None) -> CardFacts:
    """Collect the facts of a run for its model card; `data` names what its lists were built from."""
    weights = {}
    if recipe.objective.name != "ranking":
        weights["language modelling"] = recipe.objective.language_modelling_weight
    if recipe.objective.name != "generation":
        options = ", ".join(f"{name}={value}" for name, value in recipe.objective.ranking_loss_options.items())
        loss = recipe.objective.ranking_loss + (f" ({options})" if options else "")
        weights[loss] = recipe.objective.ranking_factor
    export, is_lora = recipe.checkpoint.export, recipe.model.lora is not None
    base_id = None if recipe.model.random_weights else base_model_id(recipe.model.name_or_path)
    is_stage = Path(recipe.model.name_or_path).exists()  # an export of an earlier run, not its base model
    published_of = None if is_stage and base_id != public_name(recipe.model.name_or_path) else base_id
    return CardFacts(
        name=recipe.run.name,
        is_adapter=is_lora and export is not None and not export.merge_lora,
        base_model=None if recipe.model.random_weights else as_written(recipe.model.name_or_path),
        base_id=base_id,
        contract=contract,
        data=tuple(data),
        num_lists=num_lists,
        losses=weights,
        published=published_figures(published_of, data, recipe.objective.name, is_lora=is_lora),
        hyperparameters={
            "lists a step": recipe.batch.global_lists,
            "duration": recipe.run.max_duration,
            "optimizer": recipe.optimizer.name,
            "learning rate": recipe.optimizer.lr,
            "schedule": f"{recipe.schedule.name}, warmup {recipe.schedule.warmup}",
            "gradient clipping": recipe.optimizer.gradient_clip_norm,
            "NEFTune alpha": None if recipe.neftune is None else recipe.neftune.alpha,
            "arithmetic": recipe.parallelism.precision,
            "longest list, tokens": recipe.data.max_length_tokens,
            "seed": recipe.run.seed,
        },
    )


def history_facts(facts: CardFacts) -> dict[str, Any]:
    """What the history of a run holds of its model and data, without paths."""
    return {
        "model": None if facts.base_model is None else public_name(facts.base_model),
        "data": [public_name(source) for source in facts.data],
        "lists_per_epoch": facts.num_lists,
        "published": dict(facts.published),
    }
