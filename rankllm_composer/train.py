"""Recipe → model, data, Composer Trainer → fit → Hugging Face folders.

    composer -n 8 rankllm_composer/train.py yamls/first_mistral.yaml [key=value …]
"""

from __future__ import annotations

import contextlib
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from composer import Callback, LoggerDestination, Trainer
    from transformers import PreTrainedTokenizerBase

    from rankllm_composer.clean_stop import PeerWatch
    from rankllm_composer.contract import DecodingContract
    from rankllm_composer.data import ListDataset
    from rankllm_composer.model import ListwiseReranker
    from rankllm_composer.recipe import Recipe, Split

# The loader workers of a killed run hold its folder until they see that it is gone.
CLAIM_WAIT_SECONDS = 30.0


class TrainError(ValueError):
    """A run cannot start; the message says where, what was found and what to do."""


def choose_device(name: str) -> str:
    """ "gpu" or "cpu".

    Raises:
        TrainError: a GPU is asked for and there is none.
    """
    import torch

    if name == "gpu" and not torch.cuda.is_available():
        raise TrainError("parallelism.device: found gpu, but this machine shows no CUDA device; use cpu or auto")
    if name == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return name


@contextlib.contextmanager
def claimed_run_folder(recipe: Recipe) -> Iterator[Path]:
    """The run's folder, held by rank 0 for as long as the run lasts. A collective."""
    from composer.utils import dist

    from rankllm_composer.export import run_on_rank_zero
    from rankllm_composer.recipe_merge import recipe_to_yaml
    from rankllm_composer.run_folder import claim_run_folder

    folder = Path(recipe.run_folder)
    with contextlib.ExitStack() as held:
        run_on_rank_zero(
            lambda: held.enter_context(claim_run_folder(folder, recipe_to_yaml(recipe), CLAIM_WAIT_SECONDS)),
            f"claim of {folder}",
        )
        yield folder
        dist.barrier()


def prepare_shards(split: Split, key: str) -> None:
    """Build the shards that a recipe names and that are absent, where it names their source. A collective.

    Args:
        split: `data.train` or `data.eval`.
        key: its dotted key, for messages.
    Raises:
        TrainError: the shards are absent and there is no source to build them from; names the command.
    """
    from dataclasses import asdict

    from rankllm_composer import shards
    from rankllm_composer.export import run_on_rank_zero

    if split.streams:
        return
    place = split.remote or split.local
    assert place is not None

    def build() -> None:
        if shards.index_exists(place):
            return
        if split.source is None:
            raise TrainError(
                f"{key}: no shards in {place}. Build them with `rankllm-composer shards build --input RECORDS "
                f"--output {place}`, or name {key}.source and the run builds them"
            )
        shards.build_shards(place, **asdict(split.source))

    run_on_rank_zero(build, f"shards in {place}")


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, refused before any data is read where it cannot carry the objective."""
    from rankllm_composer.model import load_tokenizer
    from rankllm_composer.prompts import check_tokenizer

    keys = recipe.model
    tokenizer = load_tokenizer(recipe.tokenizer, revision=keys.revision, trust_remote_code=keys.trust_remote_code)
    check_tokenizer(tokenizer, recipe.objective.name, recipe.data.train.identifiers or "letters", 2)
    return tokenizer


def build_dataset(recipe: Recipe, split: Split, tokenizer: PreTrainedTokenizerBase) -> ListDataset:
    """The lists of a split, streamed and tokenised."""
    from rankllm_composer.data import ListDataset, lists_per_rank
    from rankllm_composer.streams import Stream

    streams = [Stream(s.local, s.remote, s.proportion) for s in split.streams]
    return ListDataset(
        streams or [Stream(split.local, split.remote)],  # type: ignore[arg-type]
        tokenizer=tokenizer,
        objective=recipe.objective.name,
        max_length_tokens=recipe.data.max_length_tokens,
        batch_size=lists_per_rank(recipe.batch.global_lists),
        too_long=recipe.data.too_long,
        shuffle=split.shuffle,
        seed=recipe.run.seed,
        shuffle_passages=split.shuffle_passages,
        identifiers=split.identifiers,
        num_canonical_nodes=split.num_canonical_nodes,
        cache_limit=split.cache_limit,
        download_retry=split.download_retry,
        download_timeout_seconds=split.download_timeout_seconds,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: str) -> ListwiseReranker:
    """The model of a recipe. Under FSDP2 rank 0 loads the weights; the others start on the meta device."""
    from composer.utils import dist, reproducibility

    from rankllm_composer.model import ListwiseReranker, load_causal_lm
    from rankllm_composer.objectives import Objective

    keys = recipe.model
    reproducibility.seed_all(recipe.run.seed)  # fresh weights are the same on every rank
    causal_lm = load_causal_lm(
        keys.name_or_path,
        revision=keys.revision,
        trust_remote_code=keys.trust_remote_code,
        random_weights=keys.random_weights,
        config_overrides=keys.config_overrides,
        on_meta=recipe.parallelism.fsdp and dist.get_global_rank() > 0,
    )
    return ListwiseReranker(
        causal_lm,
        tokenizer,
        Objective(
            recipe.objective.name,
            language_modelling_weight=recipe.objective.language_modelling_weight,
            ranking_weight=recipe.objective.ranking_weight,
            ranking_loss=recipe.objective.ranking_loss,
            ranking_loss_options=recipe.objective.ranking_loss_options,
        ),
        attention=keys.attention,
        device=device,
        activation_checkpointing=keys.activation_checkpointing,
        compile_layers=keys.compile,
        peft_config=_peft_config(recipe),
    )


def _peft_config(recipe: Recipe) -> Any:
    lora = recipe.model.lora
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )


def build_optimizer(recipe: Recipe, model: ListwiseReranker) -> torch.optim.Optimizer:
    """AdamW over the weights that are trained.

    Raises:
        TrainError: adamw_8bit without bitsandbytes.
    """
    import torch

    keys = recipe.optimizer
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {
        "lr": keys.lr,
        "betas": tuple(keys.betas),
        "eps": keys.eps,
        "weight_decay": keys.weight_decay,
    }
    if keys.name == "adamw":
        return torch.optim.AdamW(weights, fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise TrainError(
            "optimizer.name: adamw_8bit needs bitsandbytes; install the `bitsandbytes` extra, or use adamw"
        ) from error
    return AdamW8bit(weights, **options)


def build_loggers(recipe: Recipe, folder: Path) -> list[LoggerDestination]:
    """metrics.jsonl, the progress line, and the Composer loggers a recipe names."""
    from composer import loggers

    from rankllm_composer.progress import MetricsFile, ProgressLine

    kinds = {"tensorboard": loggers.TensorboardLogger, "wandb": loggers.WandBLogger, "mlflow": loggers.MLFlowLogger}
    ours: list[LoggerDestination] = []
    if recipe.logging.metrics_file:
        ours.append(MetricsFile(folder / "metrics.jsonl"))
    if recipe.logging.progress:
        ours.append(ProgressLine())
    return ours + [kinds[name](**options) for name, options in recipe.logging.loggers.items()]


def build_callbacks(
    recipe: Recipe, contract: DecodingContract, model: ListwiseReranker, num_lists: int
) -> list[Callback]:
    """The guards, the export, the Composer callbacks a recipe names, and after all these what writes checkpoints."""
    from composer import callbacks

    from rankllm_composer.epochs import EpochGuard
    from rankllm_composer.export import ExportFolder
    from rankllm_composer.loss_guard import LossGuard
    from rankllm_composer.preemption import Preemption
    from rankllm_composer.resumption import CheckpointFolder, ends_epoch

    kinds = {
        "speed_monitor": callbacks.SpeedMonitor,
        "memory_monitor": callbacks.MemoryMonitor,
        "lr_monitor": callbacks.LRMonitor,
        "optimizer_monitor": callbacks.OptimizerMonitor,
        "nan_monitor": callbacks.NaNMonitor,
    }
    ours: list[Callback] = [EpochGuard(), LossGuard(recipe.optimizer.max_skipped_updates)]
    if recipe.export_folder is not None and recipe.checkpoint.export is not None:
        ours.append(
            ExportFolder(
                recipe.export_folder,
                tokenizer=model.tokenizer,  # type: ignore[arg-type]
                contract=contract,
                facts=card_facts(recipe, contract, num_lists),
                interval=recipe.checkpoint.export.interval,
                generation_config=model.model.generation_config,
                dtype="float32" if recipe.parallelism.precision == "fp32" else "bfloat16",
            )
        )
    checkpoints = CheckpointFolder(
        recipe.checkpoint_folder,
        interval=recipe.checkpoint.interval,
        keep=recipe.checkpoint.keep,
        resume=recipe.run.autoresume,
    )
    named = [kinds[name](**options) for name, options in recipe.logging.callbacks.items()]
    return [*ours, *named, checkpoints, Preemption(checkpoints.save, ends_epoch)]


def build_contract(recipe: Recipe, dataset: ListDataset) -> DecodingContract:
    """How the trained model is asked and read; identifiers as the first training list has them."""
    from rankllm_composer.contract import decoding_contract
    from rankllm_composer.permutations import identifiers
    from rankllm_composer.prompts import PromptError, identifier_token_ids, read_user_turn

    style = recipe.data.train.identifiers or read_user_turn(dataset.record(0).user).style
    names = identifiers(20, style)
    try:
        token_ids = identifier_token_ids(dataset.tokenizer, len(names), style)
    except PromptError:
        if recipe.objective.name != "generation":
            raise
        token_ids = None
    return decoding_contract(
        dataset.tokenizer,
        objective=recipe.objective.name,
        identifier_style=style,
        identifiers=names,
        identifier_token_ids=token_ids,
        context_size_tokens=recipe.data.max_length_tokens,
    )


def card_facts(recipe: Recipe, contract: DecodingContract, num_lists: int) -> Any:
    """What the model card tells of a run."""
    from rankllm_composer.model_card import CardFacts

    train, source = recipe.data.train, recipe.data.train.source
    data = [s.remote or s.local for s in train.streams] or [
        (source and (source.input or source.run)) or train.remote or train.local
    ]
    weights = {}
    if recipe.objective.name != "ranking":
        weights["language modelling"] = recipe.objective.language_modelling_weight
    if recipe.objective.name != "generation":
        options = ", ".join(f"{name}={value}" for name, value in recipe.objective.ranking_loss_options.items())
        loss = recipe.objective.ranking_loss + (f" ({options})" if options else "")
        weights[loss] = recipe.objective.ranking_weight
    return CardFacts(
        name=recipe.run.name,
        base_model=None if recipe.model.random_weights else recipe.model.name_or_path,
        contract=contract,
        data=tuple(str(name) for name in data),
        num_lists=num_lists,
        losses=weights,
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


def build_trainer(recipe: Recipe, folder: Path, device: str) -> Trainer:
    """Everything a recipe names, put into a Composer Trainer. A collective."""
    from composer import Trainer
    from composer.algorithms import GradientClipping
    from composer.utils.parallelism import FSDP2Config

    from rankllm_composer.data import build_train_data_spec, lists_per_rank
    from rankllm_composer.neftune import NEFTune
    from rankllm_composer.preemption import ignore_sigterm
    from rankllm_composer.schedule import apply_schedule, build_schedule
    from rankllm_composer.sharding import average_sharded_gradients

    tokenizer = build_tokenizer(recipe)
    dataset = build_dataset(recipe, recipe.data.train, tokenizer)
    contract = build_contract(recipe, dataset)
    model = build_model(recipe, tokenizer, device)
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
    data_spec = build_train_data_spec(
        dataset,
        microbatch_lists=recipe.batch.microbatch_lists,
        microbatch_tokens=recipe.batch.microbatch_tokens,
        num_workers=recipe.data.num_workers,
        prefetch_factor=recipe.data.prefetch_factor,
        loader_timeout_seconds=recipe.data.loader_timeout_seconds,
    )
    data_spec.dataloader.worker_init_fn = ignore_sigterm  # type: ignore[union-attr]
    optimizer = build_optimizer(recipe, model)
    schedule = build_schedule(
        optimizer,
        name=recipe.schedule.name,
        warmup=recipe.schedule.warmup,
        final_fraction=recipe.schedule.final_lr_fraction,
        max_duration=recipe.run.max_duration,
        updates_per_epoch=len(data_spec.dataloader),  # type: ignore[arg-type]
        lists_per_update=recipe.batch.global_lists,
    )
    trainer = Trainer(
        model=model,
        train_dataloader=data_spec,
        max_duration=recipe.run.max_duration,
        optimizers=optimizer,
        schedulers=schedule,
        step_schedulers_every_batch=True,
        algorithms=algorithms,
        callbacks=build_callbacks(recipe, contract, model, dataset.epoch_size),
        loggers=build_loggers(recipe, folder),
        run_name=recipe.run.name,
        progress_bar=False,
        parallelism_config={"fsdp": sharding} if recipe.parallelism.fsdp else None,
        device=device,
        precision=recipe.parallelism.precision,
        device_train_microbatch_size=recipe.batch.microbatch_lists or lists_per_rank(recipe.batch.global_lists),
        accumulate_train_batch_on_tokens=True,
        seed=recipe.run.seed,
        dist_timeout=recipe.parallelism.dist_timeout_seconds,
    )
    average_sharded_gradients(model)
    apply_schedule(schedule)
    return trainer


def train(recipe: Recipe, watch: PeerWatch) -> None:
    """Run a recipe from shards to exported folders, from its newest checkpoint if there is one. A collective.

    Args:
        recipe: what to run.
        watch: ends this rank when another one dies.
    Raises:
        ValueError: whatever stands in the way, as where, what was found, what is allowed, what to do.
    """
    from composer.utils import dist

    from rankllm_composer.preemption import Preempted
    from rankllm_composer.recipe_check import check_world

    device = choose_device(recipe.parallelism.device)
    warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
    dist.initialize_dist(device, recipe.parallelism.dist_timeout_seconds)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Composer's own ends a process without a word
    watch.start()
    check_world(recipe, dist.get_world_size())
    with claimed_run_folder(recipe) as folder:
        prepare_shards(recipe.data.train, "data.train")
        trainer = build_trainer(recipe, folder, device)
        stopped: Preempted | None = None
        if trainer.state.timestamp < trainer.state.max_duration:
            try:
                trainer.fit()
            except Preempted as preempted:
                stopped = preempted
        watch.stop()
        trainer.close()
        if stopped is not None:
            if dist.get_global_rank() == 0:
                print(stopped, file=sys.stderr)
            return
        if dist.get_global_rank() == 0 and recipe.export_folder is not None:
            print(_where_it_is(Path(recipe.export_folder)))


def _where_it_is(export_folder: Path) -> str:
    """The exports of a run, and the command that serves the newest."""
    from rankllm_composer.contract import CONTRACT_FILE, read_contract
    from rankllm_composer.model_card import serving_command

    contracts = sorted(export_folder.glob(f"*/{CONTRACT_FILE}"), key=lambda path: path.stat().st_mtime)
    folders = [path.parent for path in contracts]
    text = "\n".join(["exported:", *(f"    {folder}" for folder in folders)])
    contract = read_contract(folders[-1])
    if contract.append_bracket:
        return text + f"\nrank with it: rankllm-composer rerank --model {folders[-1]} …"
    return text + f"\nserve it with rank_llm:\n{textwrap.indent(serving_command(contract, str(folders[-1])), '    ')}"


def main(arguments: Sequence[str]) -> int:
    """The command line of a run: a recipe and what is laid over it. Returns the exit code."""
    from rankllm_composer.clean_stop import PeerWatch
    from rankllm_composer.recipe import describe_keys
    from rankllm_composer.recipe_merge import load_recipe
    from rankllm_composer.recipe_schema import keys_as_text

    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: composer -n PROCESSES {Path(__file__).name} RECIPE.yaml [key=value ...]\n")
        print(keys_as_text(describe_keys()))
        return 0 if arguments else 2
    watch = PeerWatch()
    try:
        train(load_recipe(arguments[0], arguments[1:]), watch)
    except (Exception, KeyboardInterrupt) as failure:
        return watch.exit_code(failure)
    return 0


if __name__ == "__main__":
    sys.path.pop(0)  # the launcher puts this folder there, where our rooms would hide other packages' modules
    sys.exit(main(sys.argv[1:]))
