"""Build the parts of a run from the sections of a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer import Callback
from composer.utils import dist, reproducibility
from transformers import PreTrainedTokenizerBase

from rankllm_composer.data.dataset import ListDataset, ListEncoding, lists_per_rank
from rankllm_composer.data.streams import Stream
from rankllm_composer.distributed import run_on_rank_zero
from rankllm_composer.errors import ModelError, RunError
from rankllm_composer.export.model_folder import Dtype, ServedModel
from rankllm_composer.model.attention import choose_attention
from rankllm_composer.model.loading import load_causal_lm, load_config, load_tokenizer
from rankllm_composer.model.lora import ALL_LINEAR, load_starting_adapter
from rankllm_composer.model.loss_table import NEED_SCORES
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker, checkpoint_activations
from rankllm_composer.model.self_check import check_model
from rankllm_composer.prompts.chat import template_notes
from rankllm_composer.prompts.clients import CURRENT_CLIENT
from rankllm_composer.prompts.contract import CONTRACT_FILE, DecodingContract, decoding_contract, read_contract
from rankllm_composer.prompts.lists import check_lists, list_kind, trained_window
from rankllm_composer.prompts.prompt_template import TEMPLATE_FILE
from rankllm_composer.prompts.relevance import Preferences
from rankllm_composer.recipe.load import recipe_to_yaml
from rankllm_composer.recipe.sections import Recipe, Split
from rankllm_composer.screen import get_logger, warn
from rankllm_composer.shards.contents import SetContents, read_contents
from rankllm_composer.storage.object_store import is_remote
from rankllm_composer.training.checkpoint_callback import CheckpointFolder
from rankllm_composer.training.dry_run import DryRun
from rankllm_composer.training.export_callback import ExportFolder
from rankllm_composer.training.facts import card_facts, history_facts
from rankllm_composer.training.guards import EpochGuard, LossGuard
from rankllm_composer.training.history import RunHistory
from rankllm_composer.training.loggers import CALLBACKS, build_named
from rankllm_composer.training.run import announce_stop
from rankllm_composer.training.run_files import EVALUATIONS_FILE, HISTORY_FILE
from rankllm_composer.training.stopping import Preemption, describe_saved
from rankllm_composer.training.validation import Validation, measurable

log = get_logger(__name__)


def choose_device(name: str) -> str:
    """Resolve "auto", "gpu" or "cpu" to "gpu" or "cpu".

    Raises:
        RunError: "gpu" without a CUDA device.
    """
    if name == "gpu" and not torch.cuda.is_available():
        raise RunError("parallelism.device is gpu, but this machine has no CUDA device. Use cpu or auto.")
    if name == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return name


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, and warn of a chat template whose prompts are not what they seem to be.

    `build_contract` checks the tokenizer against the lists.
    """
    tokenizer = load_tokenizer(recipe.model)
    if dist.get_global_rank() == 0:
        for note in template_notes(tokenizer):
            warn(note, stacklevel=2)
    return tokenizer


def build_dataset(recipe: Recipe, split: Split, tokenizer: PreTrainedTokenizerBase) -> ListDataset:
    """Build the streamed and tokenized lists of a split."""
    streams = [Stream(s.local, s.remote, s.proportion, split.rebuild) for s in split.streams]
    return ListDataset(
        streams or [Stream(split.local, split.remote, renew=split.rebuild)],  # type: ignore[arg-type]
        ListEncoding(
            tokenizer=tokenizer,
            objective=recipe.objective.name,
            max_length_tokens=recipe.data.max_length_tokens,
            too_long=recipe.data.too_long,
            shuffle_passages=split.shuffle_passages,
            identifiers=split.identifiers,
            template=recipe.data.prompt_template,
            preferences=Preferences(recipe.objective.ties, recipe.objective.unjudged),
            needs_scores=_loss_of_scores(recipe),
            needs_identifiers=recipe.objective.token_weights == "by_rank",
        ),
        split,
        batch_size=lists_per_rank(recipe.batch.global_lists),
        seed=recipe.run.seed,
    )


def _loss_of_scores(recipe: Recipe) -> str | None:
    """The ranking loss that is trained, if it needs a teacher's scores."""
    loss = recipe.objective.ranking_loss
    return loss if recipe.objective.name != "generation" and loss in NEED_SCORES else None


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: str, bf16_on_cpu: bool = False
) -> ListwiseReranker:
    """Build the model. Under FSDP2 rank 0 loads the weights; the other ranks start on the meta device.

    Raises:
        ModelError: it cannot be loaded, or lists of a pack would see each other in it.
    """
    keys = recipe.model
    config = load_config(keys)
    attention = check_model(
        config,
        packing=recipe.batch.packing,
        ranking_alone=recipe.objective.name == "ranking",
        max_length_tokens=recipe.data.max_length_tokens,
        trust_remote_code=keys.trust_remote_code,
    )
    if recipe.batch.packing:
        attention = choose_attention(keys.attention, device)
    reproducibility.seed_all(recipe.run.seed)  # fresh weights are the same on every rank
    causal_lm = load_causal_lm(
        keys,
        config=config,
        attention=attention,
        on_meta=recipe.parallelism.fsdp and dist.get_global_rank() > 0,
        dtype=torch.bfloat16 if keys.lora is not None and keys.lora.frozen_precision == "bf16" else torch.float32,
    )
    checkpoint_activations(causal_lm, keys.activation_checkpointing, keys.keep_attention)
    model = ListwiseReranker(
        causal_lm,
        tokenizer,
        Objective(
            recipe.objective.name,
            language_modelling_weight=recipe.objective.language_modelling_weight,
            token_weights=recipe.objective.token_weights,
            ranking_weight=recipe.objective.ranking_factor,
            ranking_loss=recipe.objective.ranking_loss,
            ranking_loss_options=recipe.objective.ranking_loss_options,
        ),
        attention=attention,
        device=device,
        bf16_on_cpu=bf16_on_cpu,
        peft_config=build_peft_config(recipe),
    )
    if keys.lora is not None and keys.lora.start_from is not None:
        load_starting_adapter(model.model, keys.lora.start_from)
    if keys.compile:
        model.compile_layers()
    return model


def build_peft_config(recipe: Recipe) -> Any:
    """Build PEFT's LoRA configuration; None if all weights are trained."""
    lora = recipe.model.lora
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank; a fraction is fine
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.target_modules == (ALL_LINEAR,) else list(lora.target_modules),
        modules_to_save=list(lora.modules_to_save) or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )


def build_optimizer(recipe: Recipe, model: ListwiseReranker) -> torch.optim.Optimizer:
    """Build AdamW over the trained weights; `check_packages` knows what adamw_8bit needs."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = optimizer_options(recipe)
    if recipe.optimizer.name == "adamw":
        return torch.optim.AdamW(weights, fused=True, **options)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights, **options)


def optimizer_options(recipe: Recipe) -> dict[str, Any]:
    """Arguments of the optimizer."""
    keys = recipe.optimizer
    return {"lr": keys.lr, "betas": tuple(keys.betas), "eps": keys.eps, "weight_decay": keys.weight_decay}


def build_validation(
    recipe: Recipe, contract: DecodingContract, tokenizer: PreTrainedTokenizerBase
) -> Validation | None:
    """Build the evaluation on `data.eval` while training, with every n-th window on this rank; None if there is none.

    Raises:
        RunError: `best_by` is a figure that these windows cannot have, or no decoding can rank them.
    """
    if recipe.evaluation is None or recipe.data.eval is None:
        return None
    windows = build_dataset(recipe, recipe.data.eval, tokenizer)
    records = [windows.record(number) for number in range(windows.num_samples)]
    kinds = Counter(map(list_kind, records))
    if contract.template is not None:
        for style, size in kinds:
            contract.template.check_reads(size, style)
    options, best_by, changes = measurable(recipe.evaluation, recipe.run.seed, tokenizer, contract, kinds)
    for sentence in changes if dist.get_global_rank() == 0 else ():
        warn(sentence, stacklevel=2)
    is_judged = any(max(record.known_grades or (0,)) >= 1 for record in records)
    if best_by is not None and not best_by.endswith("/tau") and not is_judged:
        raise RunError(
            f"evaluation.best_by is {best_by}, but no window of data.eval has a relevant candidate (grade 1 or more). "
            f"Build data.eval with judgments, or use {best_by.partition('/')[0]}/tau."
        )
    return Validation(
        records[dist.get_global_rank() :: dist.get_world_size()],
        tokenizer=tokenizer,
        contract=contract,
        interval=recipe.evaluation.interval,
        options=options,
        best_by=best_by,
        patience=recipe.evaluation.patience,
        details=Path(recipe.run_folder, EVALUATIONS_FILE),
    )


def build_callbacks(
    recipe: Recipe,
    contract: DecodingContract,
    model: ListwiseReranker,
    data: Sequence[str],
    num_lists: int,
    validation: Validation | None,
) -> list[Callback]:
    """Build all callbacks, in order: guards, evaluation, those of the recipe, export, checkpoints, stop on request."""
    facts = card_facts(recipe, contract, data, num_lists)
    history = RunHistory(Path(recipe.run_folder, HISTORY_FILE), history_facts(facts))
    ours: list[Callback] = [EpochGuard(), LossGuard(recipe.optimizer.max_skipped_updates), history]
    if validation is not None:
        ours.append(validation)
    is_url = is_remote(recipe.checkpoint_folder)
    folder = Path(recipe.run_folder, "checkpoints") if is_url else Path(recipe.checkpoint_folder)
    checkpoints = CheckpointFolder(
        folder,
        interval=recipe.checkpoint.interval,
        keep=recipe.checkpoint.keep,
        resume=recipe.run.autoresume,
        url=recipe.checkpoint_folder if is_url else None,
        recipe_yaml=recipe_to_yaml(recipe),
        store_patience_seconds=recipe.checkpoint.store_patience_seconds,
    )
    exports: list[ExportFolder] = []
    if recipe.export_folder is not None and recipe.checkpoint.export is not None:
        exports.append(
            ExportFolder(
                recipe.export_folder,
                model=ServedModel(
                    config=model.model.config,
                    tokenizer=model.tokenizer,  # type: ignore[arg-type]
                    contract=contract,
                    generation_config=model.model.generation_config,
                    dtype=export_dtype(recipe),
                ),
                facts=facts,
                options=recipe.checkpoint.export,
                save=checkpoints.save,
                figures=lambda batch: {} if validation is None else validation.figures_after(batch),
                best_by=None if validation is None else validation.best_by,
                recipe_folder=folder,
            )
        )
    named = [
        build_named("callbacks", name, CALLBACKS[name], options) for name, options in recipe.logging.callbacks.items()
    ]
    announce = partial(announce_stop, recipe.run_folder)
    stop = Preemption(checkpoints.save_to_stop, announce, lambda number: describe_saved(folder, lambda: number))
    return [*ours, *named, *exports, checkpoints, stop, DryRun(checkpoints, *exports)]


def export_dtype(recipe: Recipe) -> Dtype:
    """Type of the exported weights."""
    return "float32" if recipe.parallelism.precision == "fp32" else "bfloat16"


def sets_of(split: Split) -> list[tuple[str, str | None]]:
    """(local, remote) of every set of shards of a split."""
    return [(s.local, s.remote) for s in split.streams] or [(str(split.local), split.remote)]


def training_contents(recipe: Recipe) -> SetContents:
    """Sizes, identifiers and sources of all lists of `data.train`. A collective: rank 0 reads them."""
    found: list[SetContents] = []
    run_on_rank_zero(lambda: found.append(read_contents(sets_of(recipe.data.train))), "counts of the training lists")
    contents: SetContents = dist.all_gather_object(found)[0][0]
    return contents


def build_contract(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, contents: SetContents) -> DecodingContract:
    """How the trained model is prompted and read: identifiers and window of the training lists.

    Raises:
        PromptError: the tokenizer or the objective does not support the identifiers of a list.
        ShardError: the lists are too long for `data.train.identifiers`.
    """
    contents = contents.renamed(recipe.data.train.identifiers)
    template = recipe.data.prompt_template
    _warn_of_another_prompt(recipe)
    check_lists(tokenizer, recipe.objective.name, contents.lists, template)
    window = trained_window(contents.lists, contents.strides)
    others = sum(number for (style, _), number in contents.lists.items() if style != window.style)
    if others:
        log.warning(
            "data.train: %d of %d lists have other identifiers than %s, which the exported contract will name. Set "
            "data.train.identifiers to give all lists the same.",
            others,
            sum(contents.lists.values()),
            window.style,
        )
    contract = decoding_contract(
        tokenizer,
        recipe.objective.name,
        window.style,
        num_identifiers=window.size,
        stride=window.stride,
        context_size_tokens=recipe.data.max_length_tokens,
        client_version=recipe.data.client_version,
        template=template,
    )
    words = contents.max_passage_words(contract.client_version)
    contract = replace(contract, max_passage_words=words or contract.max_passage_words)
    if (difference := contract.unserved_words()) is not None:
        log.warning(
            "data.train: %s. Set data.client_version=%s, whose command passes this limit, or build the shards again.",
            difference,
            CURRENT_CLIENT,
        )
    return contract


def _warn_of_another_prompt(recipe: Recipe) -> None:
    """Warn if the model to start from was exported with another prompt than this run trains."""
    folder = Path(recipe.model.name_or_path)
    with suppress(ModelError):  # damaged, which loading says
        before = read_contract(folder).template if (folder / CONTRACT_FILE).is_file() else recipe.data.prompt_template
        if before != recipe.data.prompt_template:
            log.warning(
                "model.name_or_path: %s was trained with another prompt. Set data.prompt_template=%s to go on with it.",
                folder,
                "null" if before is None else folder / TEMPLATE_FILE,
            )
