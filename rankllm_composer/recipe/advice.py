"""What is allowed in a recipe but deserves a warning: keys without effect, and what causes trouble later."""

from __future__ import annotations

from collections.abc import Iterator

from rankllm_composer.prompts.client_names import describe_misread
from rankllm_composer.recipe.checks import named_splits
from rankllm_composer.recipe.sections import Recipe

FROM_RUN = (
    "window",
    "stride",
    "lists_per_query",
    "depth",
    "max_passage_words",
    "identifiers",
    "seed",
    "require_relevant",
)
"""Keys of a source that only matter for lists made from a first-stage run."""


def without_effect(recipe: Recipe) -> dict[str, str]:
    """Dotted keys that this recipe never uses, with the reason. A section stands for all its keys."""
    reasons: dict[str, str] = {}
    if recipe.objective.name == "generation":
        for name in ("ranking_weight", "ranking_loss", "ranking_loss_options"):
            reasons[f"objective.{name}"] = "objective.name is generation"
    if recipe.objective.name == "ranking":
        reasons["objective.language_modelling_weight"] = "objective.name is ranking"
    if recipe.schedule.name == "constant":
        reasons["schedule.final_lr_fraction"] = "schedule.name is constant"
    if not recipe.parallelism.fsdp:
        for name in ("reshard_after_forward", "mixed_precision"):
            reasons[f"parallelism.{name}"] = "parallelism.fsdp is false"
    if recipe.model.lora is None and recipe.checkpoint.export is not None:
        reasons["checkpoint.export.merge_lora"] = "model.lora is null"
    if recipe.evaluation is None:
        reasons["data.eval"] = "evaluation is null"
    for section, split in named_splits(recipe):
        if split.source is not None and split.source.input is not None:
            for name in FROM_RUN:
                reasons[f"{section}.source.{name}"] = f"{section}.source.input is set"
        elif split.source is not None:
            reasons[f"{section}.source.split"] = f"{section}.source.input is null"
    return reasons


def surprises(recipe: Recipe) -> Iterator[str]:
    """One sentence for everything that works in training and causes trouble later."""
    misread = describe_misread(recipe.export_folder or "")
    if misread is not None:
        yield f"checkpoint.export.folder: {misread}"
    styles = [
        split.identifiers or (split.source.identifiers if split.source and split.source.run else None)
        for _, split in named_splits(recipe)
    ]
    if recipe.objective.name != "generation" and "numbers" in styles:
        yield (
            f"objective.name: {recipe.objective.name} scores identifiers at one token, where the inference client "
            "reads only letters; numbers can be served by generation alone"
        )
