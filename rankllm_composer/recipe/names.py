"""What other programs of the field call our options and keys, and the nearest name to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SYNONYMS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("judgments", "qrels"), ("qrels_file",)),
    (("queries",), ("topics", "queries_file", "topics_file")),
    (("docs",), ("documents", "corpus", "collection", "passages")),
    (("run",), ("first_stage", "candidates", "requests_file")),
    (("teacher_run",), ("teacher",)),
    (("input",), ("input_json", "train_file", "records")),
    (("output",), ("output_dir", "output_file", "output_trec_file")),
    (("model",), ("model_path", "model_name", "model_name_or_path", "checkpoint")),
    (("top_k", "depth"), ("topk", "hits", "top_k_candidates", "top_k_rerank")),
    (("window", "window_size"), ()),
    (("stride",), ("step_size",)),
    (("passes",), ("num_passes",)),
    (("context_size_tokens",), ("context_size", "max_model_len", "max_length")),
    (("num_ranks",), ("nproc", "nproc_per_node", "num_gpus", "gpus", "num_processes")),
    (("processes", "num_processes"), ("num_proc", "num_workers", "workers", "threads")),
    (("measure",), ("measures", "metric", "metrics")),
    (("dtype",), ("torch_dtype",)),
    (("attention",), ("attn_implementation",)),
    (("hold_out",), ("held_out", "test_size")),
    (("seed",), ("random_seed",)),
    (("overwrite", "force"), ()),
)
"""Our names of an option, and its names in rank_llm, trec_eval, Pyserini, ir-measures, sentence-transformers, Hugging
Face's trainers, Composer and torchrun."""

LETTERS = {"-o": ("output",), "-k": ("top_k", "depth"), "-m": ("measure",), "-j": ("processes",)}
"""Short forms of options."""

KEYS = {
    # Hugging Face's TrainingArguments, TRL, PEFT, and trainers that use their names
    "learning_rate": "optimizer.lr",
    "peak_lr": "optimizer.lr",
    "batch_size": "batch.global_lists",
    "train_batch_size": "batch.global_lists",
    "per_device_train_batch_size": "batch.microbatch_lists",
    "per_device_batch_size": "batch.microbatch_lists",
    "micro_batch_size": "batch.microbatch_lists",
    "gradient_accumulation_steps": "batch.global_lists",
    "grad_accum": "batch.global_lists",
    "max_tokens_per_batch": "batch.microbatch_tokens",
    "num_train_epochs": "run.max_duration={}ep",
    "num_epochs": "run.max_duration={}ep",
    "max_epochs": "run.max_duration={}ep",
    "epochs": "run.max_duration={}ep",
    "epoch": "run.max_duration={}ep",
    "max_steps": "run.max_duration={}ba",
    "max_train_steps": "run.max_duration={}ba",
    "num_steps": "run.max_duration={}ba",
    "duration": "run.max_duration",
    "warmup_steps": "schedule.warmup={}ba",
    "num_warmup_steps": "schedule.warmup={}ba",
    "warmup_ratio": "schedule.warmup={}dur",
    "lr_scheduler_type": "schedule.name",
    "lr_scheduler": "schedule.name",
    "lr_schedule": "schedule.name",
    "min_lr_ratio": "schedule.final_lr_fraction",
    "optim": "optimizer.name",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "epsilon": "optimizer.eps",
    "wd": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.gradient_clip_norm",
    "gradient_clipping": "optimizer.gradient_clip_norm",
    "clip_grad_norm": "optimizer.gradient_clip_norm",
    "bf16": "parallelism.precision=amp_bf16",
    "fp16": "parallelism.precision=amp_bf16",
    "dtype": "parallelism.precision",
    "torch_dtype": "parallelism.precision",
    "gradient_checkpointing": "model.activation_checkpointing",
    "activation_checkpoint": "model.activation_checkpointing",
    "attn_implementation": "model.attention",
    "use_flash_attention_2": "model.attention",
    "flash_attention": "model.attention",
    "torch_compile": "model.compile",
    "base_model": "model.name_or_path",
    "model_name": "model.name_or_path",
    "model_path": "model.name_or_path",
    "model_id": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "pretrained_model_name_or_path": "model.name_or_path",
    "checkpoint_path": "model.name_or_path",
    "tokenizer_name": "model.tokenizer",
    "tokenizer_name_or_path": "model.tokenizer",
    "config_name": "model.config_overrides",
    "use_lora": "model.lora",
    "use_peft": "model.lora",
    "peft_config": "model.lora",
    "peft": "model.lora",
    "r": "model.lora.rank",
    "lora_r": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.target_modules",
    "lora_modules_to_save": "model.lora.modules_to_save",
    "use_rslora": "model.lora.rslora",
    "use_dora": "model.lora.dora",
    "output_dir": "run.folder",
    "run_name": "run.name",
    "experiment_name": "run.name",
    "random_seed": "run.seed",
    "global_seed": "run.seed",
    "data_seed": "run.seed",
    "resume_from_checkpoint": "run.autoresume",
    "resume": "run.autoresume",
    "load_path": "run.autoresume",
    "max_length": "data.max_length_tokens",
    "max_seq_length": "data.max_length_tokens",
    "max_seq_len": "data.max_length_tokens",
    "model_max_length": "data.max_length_tokens",
    "sequence_len": "data.max_length_tokens",
    "cutoff_len": "data.max_length_tokens",
    "context_size": "data.max_length_tokens",
    "dataset": "data.train.source.input",
    "dataset_name": "data.train.source.input",
    "train_file": "data.train.source.input",
    "train_data": "data.train.source.input",
    "train_dataset": "data.train.source.input",
    "train_dataset_path": "data.train.source.input",
    "train_loader": "data.train",
    "eval_loader": "data.eval",
    "eval_dataset": "data.eval",
    "dataset_config_name": "data.train.source.config",
    "dataloader_num_workers": "data.num_workers",
    "preprocessing_num_workers": "data.num_workers",
    "dataloader_prefetch_factor": "data.prefetch_factor",
    "num_negatives": "data.train.source.window",
    "window_size": "data.train.source.window",
    "save_steps": "checkpoint.interval={}ba",
    "save_interval": "checkpoint.interval",
    "save_strategy": "checkpoint.interval",
    "checkpointing_steps": "checkpoint.interval={}ba",
    "save_folder": "checkpoint.folder",
    "save_total_limit": "checkpoint.keep",
    "save_num_checkpoints_to_keep": "checkpoint.keep",
    "eval_steps": "evaluation.interval={}ba",
    "eval_interval": "evaluation.interval",
    "eval_strategy": "evaluation.interval",
    "evaluation_strategy": "evaluation.interval",
    "metric_for_best_model": "evaluation.best_by",
    "load_best_model_at_end": "evaluation.best_by",
    "report_to": "logging.loggers",
    "with_tracking": "logging.loggers",
    "wandb_project": "logging.loggers",
    "disable_tqdm": "logging.progress",
    "progress_bar": "logging.progress",
    "log_to_console": "logging.progress",
    "neftune_noise_alpha": "neftune.alpha",
    "noisy_embedding_alpha": "neftune.alpha",
    "deepspeed": "parallelism.fsdp",
    "fsdp_config": "parallelism",
    "ddp_timeout": "parallelism.dist_timeout_seconds",
    "dist_timeout": "parallelism.dist_timeout_seconds",
    "use_cpu": "parallelism.device=cpu",
    "no_cuda": "parallelism.device=cpu",
    # Composer and llm-foundry
    "global_train_batch_size": "batch.global_lists",
    "global_batch_size": "batch.global_lists",
    "device_train_batch_size": "batch.microbatch_lists",
    "device_train_microbatch_size": "batch.microbatch_lists",
    "t_warmup": "schedule.warmup",
    "alpha_f": "schedule.final_lr_fraction",
    "scheduler": "schedule",
    "clipping_threshold": "optimizer.gradient_clip_norm",
    "loss": "objective.ranking_loss",
    "loss_fn": "objective.ranking_loss",
    "rank_loss": "objective.ranking_loss",
}
"""Key of another trainer, without its section → our key, or our key with a value where `{}` is the given number."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is closest to one that is not, whatever its case and its separators; None if none is."""
    by_plain = {plain(other): other for other in known}
    wanted = plain(name)
    close = difflib.get_close_matches(wanted, by_plain, 1)
    if not close and len(wanted) > 2:  # "mistral" of "first_mistral", "h100" of "h100-80gb"
        close = [other for other in by_plain if wanted in other][:1]
    return by_plain[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a message about an unknown name."""
    found = nearest(name, known)
    return otherwise if found is None else f"Did you mean {found}?"


def plain(name: str) -> str:
    """A name in small letters without separators: "learningRate" and "learning-rate" are the same."""
    return name.lower().translate({ord(sign): None for sign in "_-. "})


_PLAIN_KEYS = {plain(name): key for name, key in KEYS.items()}


def key_of_others(name: str, given: object = None, cutoff: float = 1.0) -> str | None:
    """Our key for the key of another trainer; with the value, where it is written in another way.

    Args:
        given: the value of the key.
        cutoff: how similar the name must be to that of the other trainer; 1 = the same.
    """
    close = difflib.get_close_matches(plain(name), _PLAIN_KEYS, 1, cutoff)
    key = _PLAIN_KEYS[close[0]] if close else None
    if key is None or "{}" not in key:
        return key
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    return key.format(f"{given:g}") if is_number else key.partition("=")[0]


def synonyms(ours: Iterable[str]) -> dict[str, str]:
    """Names of others for some options → the option, where only one of ours can be meant."""
    known = set(ours)
    found: dict[str, str] = {}
    for own, others in SYNONYMS:
        meant = [name for name in own if name in known]
        if len(meant) == 1:
            found |= {name: meant[0] for name in (*own, *others) if name not in known}
    return found
