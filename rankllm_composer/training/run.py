"""Train a recipe: lock the run folder, build missing shards, fit, report the exports."""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rankllm_composer.errors import RunError, shell_line
from rankllm_composer.prompts.clients import CURRENT_CLIENT, ClientVersion
from rankllm_composer.recipe.resume import RECIPE_NAME
from rankllm_composer.screen import doing, report, say
from rankllm_composer.storage.atomic import write_atomic
from rankllm_composer.storage.locks import FileLock, try_lock
from rankllm_composer.training.folders import recipe_of_run, unwritable

if TYPE_CHECKING:
    from rankllm_composer.recipe.sections import Recipe, Split
    from rankllm_composer.training.stopping import PeerWatch

CLAIM_WAIT_SECONDS = 30.0
"""Rank 0 of a killed run holds the lock of its folder until it notices that the others are gone."""

_LOCK_NAME = ".lock"
_STOPPING = "stopping"


def prepare_shards(split: Split, key: str, client: ClientVersion = CURRENT_CLIENT) -> None:
    """Build the shards of a split if they are absent and the recipe has their source. A collective.

    Args:
        key: dotted key of the split, for messages.
        client: version of the inference client whose prompts are built.
    Raises:
        RunError: the shards are absent and there is no source; the message names the command that builds them.
        ShardError: the shards were built from another source or with other options, and `rebuild` is false.
    """
    from rankllm_composer.distributed import run_on_rank_zero
    from rankllm_composer.options import BuildOptions
    from rankllm_composer.shards import build as shards
    from rankllm_composer.shards.prepared import find_difference
    from rankllm_composer.shards.publish import clear_leftovers
    from rankllm_composer.storage.object_store import open_folder

    if split.streams:
        return
    place = split.remote or split.local
    assert place is not None

    def build() -> None:
        if shards.index_exists(place):
            if split.source is None:
                return
            difference = find_difference(place, split.source, split.local or place, key, client)
            if difference is None:
                clear_leftovers(open_folder(place))
                return
            if not split.rebuild:
                raise difference
        elif split.source is None:
            raise RunError(
                f"{key}: no shards in {place}. Build them with "
                f"`{shell_line('rankllm-composer', 'shards', 'build', '--input', 'RECORDS', '--output', place)}`, or "
                f"name {key}.source and the run builds them."
            )
        shards.build_shards(place, split.source, BuildOptions(overwrite=split.rebuild, client_version=client))

    run_on_rank_zero(build, f"shards in {place}")


@dataclass(frozen=True)
class TrainedRun:
    """Outputs of a training run.

    Attributes:
        folder: folder of the run, with the resolved recipe and `metrics.jsonl`.
        exports: exported Hugging Face folders by batch, the newest last; empty if the recipe exports nothing.
        best: the best export by `evaluation.best_by`, else the newest; None if there is none.
    """

    folder: Path
    exports: tuple[Path, ...]
    best: Path | None

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> TrainedRun:
        """Outputs in the folders of a recipe."""
        from rankllm_composer.export.model_folder import BEST, exports_in

        if recipe.export_folder is None:
            return cls(Path(recipe.run_folder), (), None)
        folder = Path(recipe.export_folder)
        exports = tuple(folder / name for name in exports_in(folder))
        best = folder / BEST if (folder / BEST).exists() else exports[-1] if exports else None
        return cls(Path(recipe.run_folder), exports, best)


def train(recipe: Recipe) -> TrainedRun:
    """Train a recipe in this process, from shards to exported folders; resumes from its newest checkpoint.

    For one GPU or the CPU, without a launcher. Call it from the main thread. It may be called again: the process group,
    the signal handlers and the environment are restored, even after an error. After a run with `parallelism.device:
    cpu`, CUDA sees no GPU in this process.

    Args:
        recipe: from `load_recipe`.
    Returns:
        The folders that the run has written.
    Raises:
        RankLLMComposerError: the recipe, the data or the model cannot be used, or the training diverged.
    """
    import torch.distributed

    from rankllm_composer.training.devices import set_allocator
    from rankllm_composer.training.stopping import PeerWatch

    if torch.distributed.is_initialized():
        raise RunError("train: this process already has a process group. Destroy it first, or use `composer -n N`.")
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    watch = PeerWatch()
    try:
        set_allocator()
        with warnings.catch_warnings():
            run_recipe(recipe, watch)
    finally:
        watch.stop()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name in os.environ.keys() - environment.keys():  # Composer sets RANK, WORLD_SIZE, …
            del os.environ[name]
        os.environ.update(environment)
    return TrainedRun.of_recipe(recipe)


def run_recipe(recipe: Recipe, watch: PeerWatch, *, dry_run: bool = False) -> None:
    """Train a recipe as `_run_recipe` does; known errors of libraries become errors that say what to do.

    Args:
        dry_run: stop before the first update.
    Raises:
        RankLLMComposerError: anything that a user can correct.
        Preempted: the run stopped on request.
    """
    from rankllm_composer.training.failures import explained_failures

    with explained_failures():
        _run_recipe(recipe, watch, dry_run)


def _run_recipe(recipe: Recipe, watch: PeerWatch, dry_run: bool) -> None:
    """Train a recipe, from its newest checkpoint if there is one, and export the model. A collective."""
    import torch
    from composer.utils import dist

    from rankllm_composer.data.dataset import loader_error
    from rankllm_composer.distributed import run_on_rank_zero
    from rankllm_composer.recipe.checks import check_world
    from rankllm_composer.recipe.load import recipe_to_yaml
    from rankllm_composer.recipe.packages import check_packages
    from rankllm_composer.training.announcements import describe_outputs
    from rankllm_composer.training.assembly import choose_device
    from rankllm_composer.training.checkpoint_callback import CheckpointFolder
    from rankllm_composer.training.devices import hide_gpus
    from rankllm_composer.training.rendezvous import meet
    from rankllm_composer.training.stopping import Preempted, describe_saved, on_stop_signals, raise_preempted
    from rankllm_composer.training.stragglers import STATUS_FOLDER, find_hindmost, find_stragglers
    from rankllm_composer.training.trainer import build_trainer
    from rankllm_composer.training.validation import Validation

    if recipe.parallelism.device == "cpu":
        hide_gpus()
    device = choose_device(recipe.parallelism.device)
    warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
    # Composer's handlers would end the process without a message.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    on_stop_signals(raise_preempted)
    watch.watch_launcher()
    with doing("waiting for all ranks", is_short=True):
        store = meet(recipe.parallelism.dist_timeout_seconds)
        dist.initialize_dist(device, recipe.parallelism.dist_timeout_seconds)
        del store
    watch.start(recipe.parallelism.dist_timeout_seconds)
    check_world(recipe, dist.get_world_size())
    check_packages(recipe)
    folder = Path(recipe.run_folder)
    rank, num_ranks = dist.get_global_rank(), dist.get_world_size()
    with contextlib.ExitStack() as stack:
        if device == "gpu":  # Composer allows TF32, which "fp32" does not promise
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        claim = claim_run_folder(folder, recipe_to_yaml(recipe), CLAIM_WAIT_SECONDS)
        with doing(f"locking {folder}", is_short=True):
            run_on_rank_zero(lambda: stack.enter_context(claim), f"claim of {folder}")
        watch.find_stragglers = partial(find_stragglers, folder / STATUS_FOLDER, rank, num_ranks)
        watch.find_hindmost = partial(find_hindmost, folder / STATUS_FOLDER, num_ranks)
        prepare_shards(recipe.data.train, "data.train", recipe.data.client_version)
        if recipe.data.eval is not None and recipe.evaluation is not None:
            prepare_shards(recipe.data.eval, "data.eval", recipe.data.client_version)
        trainer = build_trainer(recipe, folder, device, dry_run)
        checkpoints = next(found for found in trainer.state.callbacks if isinstance(found, CheckpointFolder))
        watch.saved = partial(describe_saved, checkpoints.folder, lambda: trainer.state.timestamp.batch.value)
        if device == "gpu" and recipe.parallelism.precision == "fp32":
            torch.set_float32_matmul_precision("highest")
        stopped: Preempted | None = None
        if trainer.state.timestamp < trainer.state.max_duration:
            try:
                trainer.fit()
            except Preempted as preempted:
                stopped = preempted
            except BaseException as error:
                if num_ranks == 1:  # of several ranks, some may no longer take part in a collective
                    trainer.close()
                if (known := loader_error(error)) is None:
                    raise
                raise known from error
        elif rank == 0:
            callbacks = trainer.state.callbacks
            ended = next((one for one in callbacks if isinstance(one, Validation) and one.has_stopped), None)
            key, value = ("run.max_duration", recipe.run.max_duration)
            if ended is not None:
                key, value = "evaluation.patience", str(ended.patience)
            say(
                f"nothing to train: {folder} is complete, at batch {trainer.state.timestamp.batch.value}, where "
                f"{key}={value} is reached; raise {key} to train longer"
            )
        if stopped is None:
            checkpoints.finish()
        watch.stop()
        trainer.close()
        if stopped is not None:
            raise stopped
        if rank == 0:
            say(f"complete: {checkpoints.summary()}")
            outputs = TrainedRun.of_recipe(recipe)
            say(describe_outputs(recipe, outputs.exports, outputs.best))
        dist.barrier()


def announce_stop(folder: str | Path) -> None:
    """Write into the lock file of a run's folder that the run is stopping, so that the next one waits for it."""
    with contextlib.suppress(OSError):
        Path(folder, _LOCK_NAME).write_text(_STOPPING)


def _lock(path: Path, wait_seconds: float) -> FileLock | None:
    lock = try_lock(path, wait_seconds)
    if lock is None and path.read_text() == _STOPPING:
        report(f"{path.parent}: waiting for the run that is stopping there")
        while lock is None and path.read_text() == _STOPPING:
            lock = try_lock(path, wait_seconds)
    if lock is not None:
        path.write_text("")
    return lock


@contextlib.contextmanager
def claim_run_folder(folder: Path, recipe_yaml: str, wait_seconds: float = 0.0) -> Iterator[None]:
    """Lock a run's folder while it trains, and write the resolved recipe into it. Call it in one process per run.

    Args:
        wait_seconds: how long to wait for another process. One that was asked to stop is waited for until it ends.
    Raises:
        RunError: another process trains in the folder, it holds a run of another recipe, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder / _LOCK_NAME, wait_seconds)
            if lock is None:
                raise RunError(
                    f"run.folder: another process is training in {folder}. Wait for it, or change run.name or "
                    "run.folder."
                )
            stack.enter_context(lock)
            write_atomic(folder / RECIPE_NAME, recipe_of_run(folder, recipe_yaml))
        except OSError as error:
            raise unwritable(folder, error.strerror) from error
        yield
