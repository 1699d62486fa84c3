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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer import Trainer

    from rankllm_composer.clean_stop import PeerWatch
    from rankllm_composer.recipe import Recipe, Split

# The loader workers of a killed run hold its folder until they see that it is gone.
CLAIM_WAIT_SECONDS = 30.0
WHEREABOUTS = ".ranks"


class TrainError(ValueError):
    """A run cannot start; the message says where, what was found and what to do."""


@contextlib.contextmanager
def claimed_run_folder(recipe: Recipe) -> Iterator[Path]:
    """The run's folder, held by rank 0 for as long as the run lasts. A collective."""
    from composer.utils import dist

    from rankllm_composer.rank_zero import run_on_rank_zero
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
    from rankllm_composer.rank_zero import run_on_rank_zero

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


def build_trainer(recipe: Recipe, folder: Path, device: str) -> Trainer:
    """Everything a recipe names, put into a Composer Trainer. A collective."""
    from composer import Trainer
    from composer.algorithms import GradientClipping
    from composer.utils.parallelism import FSDP2Config

    from rankllm_composer import assembly
    from rankllm_composer.data import build_train_data_spec, lists_per_rank
    from rankllm_composer.neftune import NEFTune
    from rankllm_composer.preemption import ignore_sigterm
    from rankllm_composer.schedule import apply_schedule, build_schedule
    from rankllm_composer.sharding import average_sharded_gradients
    from rankllm_composer.whereabouts import Whereabouts

    tokenizer = assembly.build_tokenizer(recipe)
    dataset = assembly.build_dataset(recipe, recipe.data.train, tokenizer)
    contract = assembly.build_contract(recipe, dataset)
    validation = assembly.build_validation(recipe, contract, tokenizer)
    precision = recipe.parallelism.precision
    # Composer has amp_bf16 on a GPU only; on a CPU the model computes so by itself.
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
    data_spec = build_train_data_spec(
        dataset,
        microbatch_lists=recipe.batch.microbatch_lists,
        microbatch_tokens=recipe.batch.microbatch_tokens,
        num_workers=recipe.data.num_workers,
        prefetch_factor=recipe.data.prefetch_factor,
        loader_timeout_seconds=recipe.data.loader_timeout_seconds,
    )
    data_spec.dataloader.worker_init_fn = ignore_sigterm  # type: ignore[union-attr]
    optimizer = assembly.build_optimizer(recipe, model)
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
        callbacks=[
            Whereabouts(folder / WHEREABOUTS),
            *assembly.build_callbacks(recipe, contract, model, dataset.epoch_size, validation),
        ],
        loggers=assembly.build_loggers(recipe, folder),
        run_name=recipe.run.name,
        progress_bar=False,
        parallelism_config={"fsdp": sharding} if recipe.parallelism.fsdp else None,
        device=device,
        precision="fp32" if device == "cpu" else precision,
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
        Preempted: the run was asked to stop, and has.
    """
    from composer.utils import dist

    from rankllm_composer.assembly import choose_device
    from rankllm_composer.clean_stop import Preempted
    from rankllm_composer.preemption import stop_where_nothing_is_lost
    from rankllm_composer.recipe_check import check_world
    from rankllm_composer.whereabouts import who_is_behind

    device = choose_device(recipe.parallelism.device)
    warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
    dist.initialize_dist(device, recipe.parallelism.dist_timeout_seconds)
    # Composer's own handlers end a process without a word.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, stop_where_nothing_is_lost)
    watch.start()
    check_world(recipe, dist.get_world_size())
    with claimed_run_folder(recipe) as folder:
        watch.who_is_behind = partial(
            who_is_behind, folder / WHEREABOUTS, dist.get_global_rank(), dist.get_world_size()
        )
        prepare_shards(recipe.data.train, "data.train")
        if recipe.data.eval is not None and recipe.evaluation is not None:
            prepare_shards(recipe.data.eval, "data.eval")
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
            raise stopped
        if dist.get_global_rank() == 0 and recipe.export_folder is not None:
            print(_where_it_is(Path(recipe.export_folder)))


def _where_it_is(export_folder: Path) -> str:
    """The exports of a run, and the command that serves the best, or the newest where none is."""
    from rankllm_composer.contract import CONTRACT_FILE, read_contract
    from rankllm_composer.export import BEST
    from rankllm_composer.model_card import serving_command

    contracts = sorted(export_folder.glob(f"*/{CONTRACT_FILE}"), key=lambda path: path.stat().st_mtime)
    folders = [path.parent for path in contracts if not path.parent.is_symlink()]
    text = "\n".join(["exported:", *(f"    {folder}" for folder in folders)])
    if (export_folder / BEST).is_symlink():
        folders.append(export_folder / BEST)
        text += f"\n    {export_folder / BEST} is {(export_folder / BEST).readlink()}"
    contract = read_contract(folders[-1])
    if contract.append_bracket:
        return text + f"\nrank with it: rankllm-composer rerank --model {folders[-1]} …"
    return text + f"\nserve it with rank_llm:\n{textwrap.indent(serving_command(contract, str(folders[-1])), '    ')}"


def main(arguments: Sequence[str]) -> int:
    """The command line of a run: a recipe and what is laid over it. Returns the exit code."""
    from rankllm_composer.clean_stop import PeerWatch, Preempted
    from rankllm_composer.recipe import describe_keys
    from rankllm_composer.recipe_merge import load_recipe
    from rankllm_composer.recipe_schema import keys_as_text

    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: composer -n PROCESSES {Path(__file__).name} RECIPE.yaml [key=value ...]\n")
        print(keys_as_text(describe_keys()))
        return 0 if arguments else 2
    watch = PeerWatch()
    try:
        try:
            train(load_recipe(arguments[0], arguments[1:]), watch)
        except Preempted:
            raise
        except (Exception, KeyboardInterrupt) as failure:
            return watch.exit_code(failure)
    except Preempted as asked:  # also where the request came while a failure was told: that of a rank gone before
        return watch.exit_as_asked(asked)
    return 0


if __name__ == "__main__":
    sys.path.pop(0)  # the launcher puts this folder there, where our rooms would hide other packages' modules
    sys.exit(main(sys.argv[1:]))
