"""Checkpoints while training, and exact resumption from the newest one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import composer.algorithms
import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist, load_checkpoint, reproducibility
from composer.utils.checkpoint import save_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from rankllm_composer.checkpoints.folder import (
    Manifest,
    batch_of,
    check_same_model,
    clear_stage,
    complete_checkpoints,
    damage_in,
    damaged_checkpoints,
    prune,
    publish,
    stage_folder,
    weight_shapes,
)
from rankllm_composer.checkpoints.safe_loading import (
    INDEX_NAME,
    explain_unreadable,
    holds_only_data,
    safe_loading,
    write_error,
)
from rankllm_composer.checkpoints.store import CheckpointStore
from rankllm_composer.distributed import run_on_rank_zero
from rankllm_composer.errors import CheckpointError, shown_path
from rankllm_composer.recipe.resume import RECIPE_NAME, check_same_recipe
from rankllm_composer.screen import doing, get_logger
from rankllm_composer.storage.atomic import write_atomic
from rankllm_composer.storage.content import sha256_of
from rankllm_composer.storage.patience import PATIENCE_SECONDS
from rankllm_composer.training.folders import not_resumed, recipe_of_checkpoints
from rankllm_composer.training.progress import ends_epoch

log = get_logger(__name__)
UNSHARDED_FILE = "rank0.pt"
DRY_RUN = "dry-run"


class CheckpointFolder(Callback):
    """Write checkpoints at an interval and at the end; resume from the newest. Place it last among the callbacks.

    Composer's CheckpointSaver writes in place, moves a link in two steps and forgets after a restart what it wrote, and
    its Trainer does not restore random numbers in the middle of an epoch. This callback restores weights, optimizer,
    schedule, the state of data and callbacks, and the random numbers of every rank; ranks that the checkpoint does not
    have start with fresh random numbers.

    What an earlier process was killed before doing is done when the next one starts: local checkpoints and copies are
    pruned, and copies that are missing or partial in the object store are completed.

    After the last batch of an epoch, the checkpoint is written once the callbacks of the end of the epoch have run.

    Args:
        folder: on a disk that all ranks share.
        interval: Composer time string.
        keep: number of newest checkpoints to keep; -1 = all.
        resume: False = refuse to start if there is a checkpoint.
        url: object store for copies, such as s3://bucket/run. They are uploaded while training continues; one newer
            than those in `folder` is downloaded. None = no copies.
        recipe_yaml: the resolved recipe, stored beside the checkpoints so that no other recipe resumes from them. None
            = not stored.
        store_patience_seconds: how long a failing request to the object store is repeated.
    Raises:
        RunError: on rank 0: the checkpoints belong to another recipe.
        CheckpointError: on every rank: the newest checkpoint is of another model, damaged or unsafe to load; there is
            one but `resume` is False; or a checkpoint could not be written.
        StoreError: on rank 0: the object store cannot be read or written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        interval: str,
        keep: int = 3,
        resume: bool = True,
        url: str | None = None,
        recipe_yaml: str | None = None,
        store_patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self.folder = Path(os.path.abspath(folder))  # noqa: PTH100  (Path.resolve would follow the links a user made)
        self.interval = interval
        self.keep = keep
        self.resume = resume
        self.store = None if url is None else CheckpointStore(url, keep, store_patience_seconds)
        self.recipe_yaml = recipe_yaml
        self.resumed_from: Path | None = None
        self._is_time: Callable[[State, Event], bool] = create_interval_scheduler(interval)
        self._is_due = False
        self._last_batch = -1
        self._random_states: list[dict[str, Any]] | None = None

    # --- loading ------------------------------------------------------------------------------------------------------

    def before_load(self, state: State, logger: Logger) -> None:
        run_on_rank_zero(self._keep_recipe, "recipe beside the checkpoints")
        if self.store is not None:
            with doing("fetching the newest checkpoint, if the object store has a newer one"):
                run_on_rank_zero(self._fetch_newer, "fetch of the newest checkpoint")
        newest = _on_every_rank(lambda: self._newest(state))
        if newest is None:
            return
        path, manifest = newest
        run_name = state.run_name
        # Under PEFT a checkpoint contains only the adapters; torch would report the base weights as missing.
        are_adapters = bool(getattr(state.model, "using_peft", False))
        expected = state.model.state_dict().keys() if are_adapters else set()

        def keep_known(state_dict: dict[str, Any]) -> None:
            if absent := expected - state_dict["state"]["model"].keys():
                names = ", ".join(sorted(absent)[:5])
                raise CheckpointError(f"{path} lacks the weights {names}. Use an earlier checkpoint.")
            _drop_unused(state_dict)
            # New callbacks have no state in the checkpoint, but a sharded load would request it.
            callbacks = state_dict["state"].get("callbacks", {})
            for name in callbacks.keys() - set(manifest.callbacks):
                del callbacks[name]

        try:
            with safe_loading(), doing(f"checking and loading the checkpoint {path.name}"):
                _check_content(path, manifest)
                self._random_states = load_checkpoint(
                    str(path if manifest.is_sharded else path / UNSHARDED_FILE),
                    state,
                    logger,
                    progress_bar=False,
                    strict_model_weights=not are_adapters,
                    ignore_keys=keep_known,
                    # Composer would evaluate text from the checkpoint for these.
                    exclude_algorithms=dir(composer.algorithms),
                )
        except CheckpointError:
            raise
        except (Exception, CheckpointException) as error:  # torch and Composer raise many kinds
            raise CheckpointError(explain_unreadable(path, error)) from error
        state.run_name = run_name
        self.resumed_from, self._last_batch = path, manifest.batch
        log.info("resumed from %s", path)
        run_on_rank_zero(self._catch_up, "copies of earlier checkpoints")

    # A loader may draw random numbers when it starts. In an uninterrupted run it does so before the first batch of an
    # epoch, but not where a resumed run starts in the middle of one.

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._restore_random_numbers()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._restore_random_numbers()

    def _restore_random_numbers(self) -> None:
        if self._random_states is not None:
            reproducibility.load_rng_state(self._random_states)
            self._random_states = None

    def _keep_recipe(self) -> None:
        path, text = self.folder / RECIPE_NAME, self.recipe_yaml
        if text is None:
            return
        text = recipe_of_checkpoints(self.folder, text, self._batches_trained)
        if self.store is not None:
            remote = self.store.folder
            if (stored := remote.read(RECIPE_NAME)) is not None:
                existing = stored.decode(errors="replace")
                text = check_same_recipe(existing, text, f"checkpoint.folder: {remote.name}", self._batches_trained)
            remote.write(RECIPE_NAME, text)  # also fails before training if the store is read-only
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint.folder: {self.folder} cannot be written ({error.strerror}). Free space, correct the "
                "permissions, or choose another folder."
            ) from error

    def _batches_trained(self, recipe: Mapping[str, Any]) -> int | None:
        """Batches of the newest checkpoint, here or in the store; None if there is none."""
        del recipe
        local = [manifest for _, manifest in complete_checkpoints(self.folder)[-1:]]
        found = [*local, None if self.store is None else self.store.newest()]
        return max((manifest.batch for manifest in found if manifest is not None), default=None)

    def _fetch_newer(self) -> None:
        assert self.store is not None
        local, remote = complete_checkpoints(self.folder), self.store.newest()
        if remote is not None and (not local or remote.batch > local[-1][1].batch):
            self.store.fetch(remote, self.folder)

    def _catch_up(self) -> None:
        """Do what an earlier process was killed, or refused, before doing after its last checkpoint."""
        prune(self.folder, self.keep)
        if self.store is not None:
            self.store.complete_copies(complete_checkpoints(self.folder))

    def _newest(self, state: State) -> tuple[Path, Manifest] | None:
        checkpoints = complete_checkpoints(self.folder)
        newest = checkpoints[-1][1].batch if checkpoints else -1
        for damaged in damaged_checkpoints(self.folder):
            if batch_of(damaged.name) > newest:
                log.warning("%s: not used, a file is missing or short", damaged)
        if not checkpoints:
            return None
        path, manifest = checkpoints[-1]
        if not self.resume:
            raise not_resumed(path)
        check_same_model(manifest, weight_shapes(state.model), state.fsdp_sharded_state_dict_enabled, path)
        if manifest.is_sharded:
            holds_only_data(path / INDEX_NAME)
        return path, manifest

    # --- saving -------------------------------------------------------------------------------------------------------

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._is_due = self._is_time(state, Event.BATCH_CHECKPOINT) or self._is_due
        if self._is_due and not ends_epoch(state):
            self.save(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._is_time(state, Event.EPOCH_CHECKPOINT) or self._is_due:
            self.save(state)

    def save(self, state: State) -> None:
        """Write a checkpoint, unless there is one of this batch. A collective.

        Raises:
            CheckpointError: it could not be written; earlier ones are intact.
            StoreError: on rank 0: the previous upload failed.
        """
        self._is_due = False
        if state.timestamp.batch.value == self._last_batch:
            return
        name = f"ep{state.timestamp.epoch.value}-ba{state.timestamp.batch.value}"
        with doing(f"writing the checkpoint {name}"):
            files = self._write(state, name)
        manifest = Manifest(
            batch=state.timestamp.batch.value,
            epoch=state.timestamp.epoch.value,
            num_ranks=dist.get_world_size(),
            is_sharded=state.fsdp_sharded_state_dict_enabled,
            weights=weight_shapes(state.model),
            callbacks=sorted({type(callback).__qualname__ for callback in state.callbacks}),
            files={name: num_bytes for name, (num_bytes, _) in files.items()},
            sha256={name: digest for name, (_, digest) in files.items()},
        )

        def finish() -> None:
            self._check_shared(name, files)
            try:
                checkpoint = publish(self.folder, manifest)
            except OSError as error:
                raise write_error(self.folder / name, error) from error
            if self.store is not None:
                self.store.start_upload((checkpoint, manifest))
            prune(self.folder, self.keep)

        run_on_rank_zero(finish, f"checkpoint {name}")
        self._last_batch = manifest.batch

    def _write(self, state: State, name: str) -> dict[str, tuple[int, str]]:
        """Write the files of a checkpoint to the stage; return the bytes and SHA-256 of all by name. A collective."""
        is_sharded, stage = state.fsdp_sharded_state_dict_enabled, stage_folder(self.folder)

        def clear() -> None:
            try:
                clear_stage(self.folder)
            except OSError as error:
                raise write_error(self.folder / name, error) from error

        _on_every_rank(clear)
        try:
            # Composer adds the name itself if it writes one file per rank.
            target = stage / (name if not is_sharded else "") / UNSHARDED_FILE
            saved = save_checkpoint(state, str(target), ignore_keys=_drop_unused)
        except (Exception, CheckpointException) as error:  # torch wraps the errors of all ranks
            failure = write_error(self.folder / name, error)
            if dist.get_global_rank() == 0:
                shutil.rmtree(stage, ignore_errors=True)  # a full disk is no longer full
            raise failure from error
        written = [] if saved is None else [Path(saved)]
        if is_sharded and dist.get_global_rank() == 0:
            written.append(stage / name / INDEX_NAME)
        parts = dist.all_gather_object({path.name: (path.stat().st_size, sha256_of(path)) for path in written})
        return {name: content for part in parts for name, content in part.items()}

    def _check_shared(self, name: str, files: dict[str, tuple[int, str]]) -> None:
        for file in files:
            if not (stage_folder(self.folder) / name / file).exists():
                raise CheckpointError(
                    f"{self.folder / name}: {file} of another rank is missing; all ranks must see the same folder. "
                    "Put run.folder on a disk that all machines share."
                )

    def try_out(self, state: State) -> None:
        """Write a checkpoint without weights and optimizer, read it back, and remove it. A collective.

        Raises:
            CheckpointError: the folder cannot be written or is not shared by all ranks, or a state cannot be read back.
        """
        with _without_weights(state):
            # Under FSDP2, Composer names the folder after the time in training.
            sharded = f"ep{state.timestamp.epoch.value}-ba{state.timestamp.batch.value}"
            name = sharded if state.fsdp_sharded_state_dict_enabled else DRY_RUN
            files = self._write(state, name)

        def read_back() -> None:
            self._check_shared(name, files)
            folder = stage_folder(self.folder) / name
            try:
                with safe_loading():
                    if (folder / INDEX_NAME).exists():
                        holds_only_data(folder / INDEX_NAME)
                    else:
                        torch.load(folder / UNSHARDED_FILE, map_location="cpu", weights_only=True)
            except Exception as error:  # as above
                raise CheckpointError(explain_unreadable(folder, error)) from error
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        run_on_rank_zero(read_back, "dry run of a checkpoint")

    def fit_end(self, state: State, logger: Logger) -> None:
        self.finish()

    def save_to_stop(self, state: State) -> None:
        """Write a checkpoint and wait until it is stored everywhere. A collective."""
        self.save(state)
        self.finish()

    def finish(self) -> None:
        """Wait until the copies in the object store are whole, if there is one. A collective."""
        if self.store is not None:
            with doing("uploading the newest checkpoint"):
                run_on_rank_zero(self.store.finish, "upload of the newest checkpoint")

    def summary(self) -> str:
        """Name the newest checkpoint and the places that have it; empty without one."""
        checkpoints = complete_checkpoints(self.folder)
        if not checkpoints:
            return ""
        copy = "" if self.store is None else f", copied to {self.store.folder.name}"
        return f"checkpoint {checkpoints[-1][0].name} in {shown_path(self.folder)}{copy}"


def _drop_unused(state_dict: dict[str, Any]) -> None:
    """Drop what is never read on resumption: the description of the machine, and the model's config and tokenizer, for
    which a sharded checkpoint would have one entry per token of the vocabulary."""
    for name in ("integrations", "metadata"):
        state_dict["state"].pop(name, None)


def _on_every_rank(task: Callable[[], Any]) -> Any:
    """Run a short task on rank 0 and return its result, or raise its error, on every rank. A collective."""
    outcome: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = task()
        except (CheckpointError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    return outcome[0]


def _check_content(path: Path, manifest: Manifest) -> None:
    """Raise CheckpointError on every rank if a file differs from its SHA-256; the ranks share the reading."""
    share = sorted(manifest.files)[dist.get_global_rank() :: dist.get_world_size()]
    found = [damage for damage in dist.all_gather_object(damage_in(path, manifest, share)) if damage is not None]
    if found:
        raise CheckpointError(found[0])


@contextmanager
def _without_weights(state: State) -> Iterator[None]:
    """In this context a state has no model, optimizer and data to save, so that a checkpoint of it takes no time."""
    names = state.serialized_attributes
    state.serialized_attributes = [name for name in names if name not in ("model", "optimizers", "dataset_state")]
    try:
        yield
    finally:
        state.serialized_attributes = names
