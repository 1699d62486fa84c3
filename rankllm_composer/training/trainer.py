"""Build the Composer Trainer of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from composer import Trainer
from composer.algorithms import GradientClipping
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config

from rankllm_composer.data.dataset import build_train_data_spec, lists_per_rank
from rankllm_composer.distributed import average_sharded_gradients
from rankllm_composer.environment import as_written
from rankllm_composer.model.neftune import NEFTune
from rankllm_composer.recipe.advice import data_advice
from rankllm_composer.recipe.sections import Recipe
from rankllm_composer.recipe.times import explain_warmup
from rankllm_composer.screen import doing, warn
from rankllm_composer.training import assembly
from rankllm_composer.training.announcements import Banner
from rankllm_composer.training.dry_run import StopBeforeUpdate
from rankllm_composer.training.loggers import build_loggers
from rankllm_composer.training.progress import ProgressLine
from rankllm_composer.training.schedule import apply_schedule, build_schedule
from rankllm_composer.training.stopping import start_worker
from rankllm_composer.training.stragglers import STATUS_FOLDER, StatusNotes


def build_trainer(recipe: Recipe, folder: Path, device: str, dry_run: bool = False) -> Trainer:
    """Build everything that a recipe names and assemble it into a Composer Trainer. A collective.

    Args:
        dry_run: stop before the first update, and leave no metrics.
    """
    with doing("loading the tokenizer and opening the shards"):
        tokenizer = assembly.build_tokenizer(recipe)
        dataset = assembly.build_dataset(recipe, recipe.data.train, tokenizer)
        contents = assembly.training_contents(recipe)
        contract = assembly.build_contract(recipe, tokenizer, contents)
        validation = assembly.build_validation(recipe, contract, tokenizer)
    for sentence in data_advice(recipe, contents.pairs) if dist.get_global_rank() == 0 else ():
        warn(sentence, stacklevel=2)
    precision = recipe.parallelism.precision
    # Composer supports amp_bf16 on GPUs only; on a CPU the model casts by itself.
    with doing(f"loading the weights of {as_written(recipe.model.name_or_path)}"):
        model = assembly.build_model(recipe, tokenizer, device, device == "cpu" and precision == "amp_bf16")
    algorithms: list[Any] = []
    if recipe.optimizer.gradient_clip_norm is not None:
        algorithms.append(
            GradientClipping(clipping_type="norm", clipping_threshold=recipe.optimizer.gradient_clip_norm)
        )
    if recipe.neftune is not None:
        algorithms.append(NEFTune(alpha=recipe.neftune.alpha, seed=recipe.run.seed))
    sharding = FSDP2Config(
        reshard_after_forward=recipe.parallelism.reshard_after_forward,
        mixed_precision=recipe.parallelism.mixed_precision,
        state_dict_type="sharded",
    )
    max_lists, max_tokens = recipe.batch.limits
    data_spec = build_train_data_spec(
        dataset,
        microbatch_lists=max_lists,
        microbatch_tokens=max_tokens,
        num_workers=recipe.data.num_workers,
        prefetch_factor=recipe.data.prefetch_factor,
        loader_timeout_seconds=recipe.data.loader_timeout_seconds,
    )
    data_spec.dataloader.worker_init_fn = start_worker  # type: ignore[union-attr]
    updates_per_epoch: int = len(data_spec.dataloader)  # type: ignore[arg-type]
    length = {"lists_per_update": recipe.batch.global_lists, "updates_per_epoch": updates_per_epoch}
    warning = explain_warmup(recipe.schedule.warmup, recipe.run.max_duration, **length)
    if warning is not None and dist.get_global_rank() == 0:
        warn(warning, stacklevel=2)
    optimizer = assembly.build_optimizer(recipe, model)
    schedule = build_schedule(
        optimizer,
        name=recipe.schedule.name,
        warmup=recipe.schedule.warmup,
        final_fraction=recipe.schedule.final_lr_fraction,
        max_duration=recipe.run.max_duration,
        **length,
    )
    loggers = build_loggers(recipe, folder)
    callbacks = [
        StatusNotes(folder / STATUS_FOLDER),
        *assembly.build_callbacks(recipe, contract, model, contents.sources, dataset.epoch_size, validation),
        Banner(recipe, contents, dataset.epoch_size),
    ]
    with doing("preparing the trainer"):
        trainer = Trainer(
            model=model,
            train_dataloader=data_spec,
            max_duration=recipe.run.max_duration,
            optimizers=optimizer,
            schedulers=schedule,
            step_schedulers_every_batch=True,
            algorithms=algorithms,
            callbacks=[*callbacks, StopBeforeUpdate()] if dry_run else callbacks,
            loggers=[logger for logger in loggers if not dry_run or isinstance(logger, ProgressLine)],
            run_name=recipe.run.name,
            progress_bar=False,
            parallelism_config={"fsdp": sharding} if recipe.parallelism.fsdp else None,
            device=device,
            precision="fp32" if device == "cpu" else precision,
            device_train_microbatch_size=max_lists or lists_per_rank(recipe.batch.global_lists),
            accumulate_train_batch_on_tokens=True,
            seed=recipe.run.seed,
            dist_timeout=recipe.parallelism.dist_timeout_seconds,
        )
    average_sharded_gradients(model)
    apply_schedule(schedule, assembly.optimizer_options(recipe))
    return trainer
