"""A run goes on where its newest whole checkpoint stands, as if it had never stopped."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import composer.algorithms
from composer.core import Callback, Event
from composer.utils import create_interval_scheduler, dist, load_checkpoint, reproducibility
from composer.utils.checkpoint import save_checkpoint

from rankllm_composer.checkpoints.folder import (
    Manifest,
    check_same_model,
    clear_stage,
    prune,
    publish,
    stage_folder,
    weight_shapes,
    whole_checkpoints,
)
from rankllm_composer.checkpoints.safe_loading import INDEX_NAME, explain_unreadable, holds_only_data, safe_loading
from rankllm_composer.checkpoints.store import CheckpointStore
from rankllm_composer.distributed import run_on_rank_zero
from rankllm_composer.errors import CheckpointError
from rankllm_composer.recipe.load import RECIPE_NAME, check_same_recipe
from rankllm_composer.storage.atomic import write_atomic

if TYPE_CHECKING:
    from composer.core import State
    from composer.loggers import Logger

log = logging.getLogger(__name__)


WHOLE_FILE = "rank0.pt"


class CheckpointFolder(Callback):
    """Writes checkpoints every so often and at the end, and continues from the newest; stands last among callbacks.

    Composer's own saver writes in place, moves a link in two steps, forgets after a restart what it wrote before, and
    its Trainer does not restore random numbers in the middle of an epoch; hence this one. Weights, optimizer,
    schedule, the state of data and callbacks, and the random numbers of every rank are as they were; ranks that the
    run did not have before start with random numbers of their own.

    At the last batch of an epoch the checkpoint is written after what the end of the epoch does.

    Args:
        folder: on a disk that all ranks share.
        interval: Composer time string.
        keep: newest checkpoints that are kept; -1 = all.
        resume: False = start anew; only where there is no checkpoint.
        url: of copies in an object store, such as s3://bucket/run; they are made while training goes on, and a newer
            one than those in `folder` is fetched. None = no copies.
        recipe_yaml: the resolved recipe; kept beside the checkpoints, so that no run of another one goes on from them.
            None = not kept.
    Raises:
        RunError: on rank 0: the checkpoints are of another recipe.
        CheckpointError: on every rank: the newest checkpoint is of another model, damaged or no data alone; there are
            checkpoints but `resume` is False; or one could not be written.
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
    ) -> None:
        self.folder = Path(os.path.abspath(folder))  # noqa: PTH100  (Path.resolve would follow the links a user made)
        self.keep = keep
        self.resume = resume
        self.store = None if url is None else CheckpointStore(url, keep)
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
            run_on_rank_zero(self._fetch_newer, "fetch of the newest checkpoint")
        found = _agreed(lambda: self._choose(state))
        if found is None:
            return
        path, manifest = found
        run_name = state.run_name
        source = path if manifest.is_sharded else path / WHOLE_FILE
        # Under PEFT a checkpoint holds the adapters alone; torch would miss the weights that they change.
        are_adapters = bool(getattr(state.model, "using_peft", False))
        own = state.model.state_dict().keys() if are_adapters else set()

        def keep_known(state_dict: dict[str, Any]) -> None:
            if absent := own - state_dict["state"]["model"].keys():
                raise CheckpointError(f"{path}: found no weights {', '.join(sorted(absent)[:5])}; use an earlier one")
            _drop_texts(state_dict)
            # Callbacks that are new in this run have no state there, and a sharded load would ask for it.
            callbacks = state_dict["state"].get("callbacks", {})
            for name in callbacks.keys() - set(manifest.callbacks):
                del callbacks[name]

        try:
            with safe_loading():
                self._random_states = load_checkpoint(
                    str(source),
                    state,
                    logger,
                    progress_bar=False,
                    strict_model_weights=not are_adapters,
                    ignore_keys=keep_known,
                    # Composer would evaluate the text it finds for these.
                    exclude_algorithms=dir(composer.algorithms),
                )
        except CheckpointError:
            raise
        except Exception as error:  # torch and Composer raise what they come upon
            raise CheckpointError(explain_unreadable(path, error)) from error
        state.run_name = run_name
        self.resumed_from, self._last_batch = path, manifest.batch
        log.info("continues from %s", path)

    # A loader that starts may draw random numbers: the next epoch's did so in the unbroken run too, that of an epoch
    # resumed in its middle did not.

    def epoch_start(self, state: State, logger: Logger) -> None:
        del state, logger
        self._restore_random_numbers()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        del state, logger
        self._restore_random_numbers()

    def _restore_random_numbers(self) -> None:
        if self._random_states is not None:
            reproducibility.load_rng_state(self._random_states)
            self._random_states = None

    def _keep_recipe(self) -> None:
        if self.recipe_yaml is None:
            return
        path = self.folder / RECIPE_NAME
        if path.exists():
            check_same_recipe(path.read_text(errors="replace"), self.recipe_yaml, f"checkpoint.folder: {self.folder}")
        if self.store is not None:
            remote = self.store.folder
            existing = remote.read(RECIPE_NAME)
            if existing is not None:
                check_same_recipe(
                    existing.decode(errors="replace"), self.recipe_yaml, f"checkpoint.folder: {remote.name}"
                )
            remote.write(RECIPE_NAME, self.recipe_yaml)  # also fails before training if the store is read-only
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, self.recipe_yaml)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint.folder: {self.folder} cannot be written ({error.strerror}); free space or correct the "
                "rights there, or name another folder"
            ) from error

    def _fetch_newer(self) -> None:
        assert self.store is not None
        here, there = whole_checkpoints(self.folder), self.store.newest()
        if there is not None and (not here or there.batch > here[-1][1].batch):
            self.store.fetch(there, self.folder)

    def _choose(self, state: State) -> tuple[Path, Manifest] | None:
        found = whole_checkpoints(self.folder)
        if not found:
            return None
        path, manifest = found[-1]
        if not self.resume:
            raise CheckpointError(
                f"run.autoresume: found false, but {path} is a checkpoint of this run; set it to true to go on from "
                "there, or give this run its own run.name or run.folder"
            )
        check_same_model(manifest, weight_shapes(state.model), state.fsdp_sharded_state_dict_enabled, path)
        if manifest.is_sharded:
            holds_only_data(path / INDEX_NAME)
        return path, manifest

    # --- saving -------------------------------------------------------------------------------------------------------

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        del logger
        self._is_due = self._is_time(state, Event.BATCH_CHECKPOINT) or self._is_due
        if self._is_due and not ends_epoch(state):
            self.save(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        del logger
        if self._is_time(state, Event.EPOCH_CHECKPOINT) or self._is_due:
            self.save(state)

    def save(self, state: State) -> None:
        """Write a checkpoint of this moment, unless there is one. A collective.

        Raises:
            CheckpointError: it could not be written; earlier ones are as they were.
        """
        self._is_due = False
        if state.timestamp.batch.value == self._last_batch:
            return
        rank = dist.get_global_rank()
        is_sharded = state.fsdp_sharded_state_dict_enabled
        stage = stage_folder(self.folder)
        name = f"ep{state.timestamp.epoch.value}-ba{state.timestamp.batch.value}"

        def make_room() -> None:
            try:
                clear_stage(self.folder)
            except OSError as error:
                raise _write_error(self.folder / name, error) from error

        _agreed(make_room)
        try:
            # Composer adds the name itself where it writes a file a rank.
            target = stage / WHOLE_FILE if is_sharded else stage / name / WHOLE_FILE
            saved = save_checkpoint(state, str(target), ignore_keys=_drop_texts)
        except Exception as error:  # torch gathers the errors of all ranks into one of its own
            raise _write_error(self.folder / name, error) from error
        own = {} if saved is None else {Path(saved).name: Path(saved).stat().st_size}
        if is_sharded and rank == 0:
            own[INDEX_NAME] = (stage / name / INDEX_NAME).stat().st_size
        files = {name: size for part in dist.all_gather_object(own) for name, size in part.items()}
        manifest = Manifest(
            batch=state.timestamp.batch.value,
            epoch=state.timestamp.epoch.value,
            num_ranks=dist.get_world_size(),
            is_sharded=is_sharded,
            weights=weight_shapes(state.model),
            callbacks=sorted({type(callback).__qualname__ for callback in state.callbacks}),
            files=files,
        )

        def finish() -> None:
            for file in files:
                if not (stage / name / file).exists():
                    raise CheckpointError(
                        f"{self.folder / name}: {file} of another rank is not here; all ranks have to see the same "
                        "folder, so put run.folder on a disk that all machines share"
                    )
            try:
                checkpoint = publish(self.folder, manifest)
            except OSError as error:
                raise _write_error(self.folder / name, error) from error
            if self.store is not None:
                self.store.start_upload(checkpoint, manifest)
            prune(self.folder, self.keep)

        run_on_rank_zero(finish, f"checkpoint {name}")
        self._last_batch = manifest.batch

    def finish(self) -> None:
        """Wait for the copy in the object store. A collective."""
        if self.store is not None:
            run_on_rank_zero(self.store.finish, "upload of the newest checkpoint")

    def fit_end(self, state: State, logger: Logger) -> None:
        del state, logger
        self.finish()

    def save_to_stop(self, state: State) -> None:
        """Write a checkpoint of this moment and wait until all of it is where it belongs. A collective."""
        self.save(state)
        self.finish()


def _drop_texts(state_dict: dict[str, Any]) -> None:
    """Leave out the model's configuration and tokenizer, which a sharded checkpoint would hold as a file entry for
    every token of the vocabulary, and the description of the machine: neither is read when a run goes on."""
    for name in ("integrations", "metadata"):
        state_dict["state"].pop(name, None)


def ends_epoch(state: State) -> bool:
    """Whether the batch just trained is the last of its epoch."""
    length = state.dataloader_len
    return length is not None and state.timestamp.batch_in_epoch.value >= length.value


def _agreed(task: Callable[[], Any]) -> Any:
    """What rank 0 makes of a short task, on every rank: its result, or its error. A collective."""
    outcome: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = task()
        except (CheckpointError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise CheckpointError(failure)
    return result


def _write_error(checkpoint: Path, error: BaseException) -> CheckpointError:
    told = next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), type(error).__name__)
    return CheckpointError(
        f"{checkpoint}: the checkpoint could not be written ({told.strip()[:200]}); earlier ones are as they were: "
        "free space or correct the rights there, and start again with the same command"
    )
