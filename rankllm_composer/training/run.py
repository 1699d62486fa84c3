"""a run: its folder, its shards, fit, what it leaves."""

from __future__ import annotations

import contextlib
import signal
import textwrap
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rankllm_composer.errors import RunError
from rankllm_composer.recipe.load import RECIPE_NAME, check_same_recipe
from rankllm_composer.storage.atomic import write_atomic
from rankllm_composer.storage.locks import try_lock
from rankllm_composer.training.trainer import WHEREABOUTS, build_trainer

if TYPE_CHECKING:
    from rankllm_composer.recipe.sections import Recipe, Split
    from rankllm_composer.training.stopping import PeerWatch

# The loader workers of a killed run hold its folder until they see that it is gone.
CLAIM_WAIT_SECONDS = 30.0


@contextlib.contextmanager
def claimed_run_folder(recipe: Recipe) -> Iterator[Path]:
    """The run's folder, held by rank 0 for as long as the run lasts. A collective."""
    from composer.utils import dist

    from rankllm_composer.distributed import run_on_rank_zero
    from rankllm_composer.recipe.load import recipe_to_yaml

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
        RunError: the shards are absent and there is no source to build them from; names the command.
    """
    from rankllm_composer.distributed import run_on_rank_zero
    from rankllm_composer.shards import build as shards

    if split.streams:
        return
    place = split.remote or split.local
    assert place is not None

    def build() -> None:
        if shards.index_exists(place):
            return
        if split.source is None:
            raise RunError(
                f"{key}: no shards in {place}. Build them with `rankllm-composer shards build --input RECORDS "
                f"--output {place}`, or name {key}.source and the run builds them"
            )
        shards.build_shards(place, split.source)

    run_on_rank_zero(build, f"shards in {place}")


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

    from rankllm_composer.recipe.checks import check_world
    from rankllm_composer.training.assembly import choose_device
    from rankllm_composer.training.stopping import Preempted, stop_where_nothing_is_lost, who_is_behind

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
    from rankllm_composer.export.model_card import serving_command
    from rankllm_composer.export.model_folder import BEST
    from rankllm_composer.prompts.contract import CONTRACT_FILE, read_contract

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


@contextlib.contextmanager
def claim_run_folder(folder: Path, recipe_yaml: str, wait_seconds: float = 0.0) -> Iterator[None]:
    """Lock a run's folder while it trains, and write the resolved recipe into it. Call it in one process per run.

    Args:
        folder: created if absent.
        recipe_yaml: the resolved recipe; it is compared with an existing one, then written.
        wait_seconds: how long to wait for another process, such as the workers of a killed run.
    Raises:
        RunError: another process trains in the folder, it holds a run of another recipe, or it cannot be written.
    """
    path = folder / RECIPE_NAME
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = try_lock(folder / ".lock", wait_seconds)
            if lock is None:
                raise RunError(
                    f"run.folder: another process is training in {folder}. Wait for it, or change run.name or "
                    "run.folder."
                )
            stack.enter_context(lock)
            if path.exists():
                check_same_recipe(path.read_text(), recipe_yaml, f"run.folder: {folder}")
            write_atomic(path, recipe_yaml)
        except OSError as error:
            raise RunError(
                f"run.folder: {folder} cannot be written ({error.strerror}). Free space, correct the permissions, or "
                "choose another folder."
            ) from error
        yield
