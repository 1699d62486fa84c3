"""Meet the other ranks before anything is built: one that never starts is named at once, not after a long timeout."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from rankllm_composer.errors import RunError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets in the environment of each rank."""

PATIENCE_SECONDS = 20.0
"""How long the process of another rank on this machine may take to appear; a launcher starts all of them at once."""

_STEP = timedelta(seconds=2)


def meet(timeout_seconds: float) -> dist.Store | None:
    """Wait until all ranks have started. A collective, before there is a process group.

    Args:
        timeout_seconds: longest wait for ranks on other machines, and for slow ones on this machine.
    Returns:
        The store in which they met, to be kept until the process group exists; None for a single rank.
    Raises:
        RunError: the environment names ranks that do not start, or is set only in part.
    """
    _check_environment()
    rank, num_ranks = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if num_ranks == 1:
        return None
    started = time.monotonic()
    keys = [f"rankllm-composer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{other}" for other in range(num_ranks)]
    store: Any = None
    while True:
        missing = [0]  # it holds the store
        try:
            if store is None:
                store = _open_store(rank)
                store.set(keys[rank], "here")
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
        except RuntimeError as error:
            if "EADDRINUSE" in str(error):
                raise RunError(
                    f"MASTER_PORT {os.environ['MASTER_PORT']} is in use on this machine. Choose another "
                    "(--master_port), or end the process that uses it."
                ) from None
        if not missing:
            return store
        is_patient = time.monotonic() < started + min(PATIENCE_SECONDS, timeout_seconds)
        absent = [] if is_patient else _absent_here(missing)
        if absent or time.monotonic() > started + timeout_seconds:
            names = ", ".join(map(str, absent or missing))
            given = " ".join(f"{name}={shlex.quote(os.environ[name])}" for name in VARIABLES)
            raise RunError(
                f"rank {rank} of {num_ranks} waits for rank {names}, which did not start. The environment has {given}. "
                f"Unset these variables if they are left over (unset {' '.join(VARIABLES)}), or start all ranks with "
                f"`rankllm-composer train RECIPE -n {num_ranks}`."
            )
        time.sleep(0.1)


def _open_store(rank: int) -> dist.TCPStore:
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process holds it
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        _number("MASTER_PORT", 0),
        is_master=rank == 0 and not is_agents,
        timeout=_STEP,
        wait_for_workers=False,
        multi_tenant=True,  # the process group opens another one at the same port
    )


def _absent_here(ranks: Iterable[int]) -> list[int]:
    """Those of the ranks on this machine that have no process."""
    first = _number("RANK", 0) - _number("LOCAL_RANK", 0)
    here = range(first, first + _number("LOCAL_WORLD_SIZE", 1))
    found = set()
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):  # of another user, or gone
            continue
        if environment.get("MASTER_PORT") == os.environ["MASTER_PORT"] and process.pid != os.getpid():
            found.add(environment.get("RANK"))
    return [rank for rank in ranks if rank in here and str(rank) not in found]


def _check_environment() -> None:
    """Raise RunError if only some of a launcher's variables are set, or if they contradict each other."""
    given = [name for name in VARIABLES if name in os.environ]
    is_single = all(os.environ.get(name, default) == default for name, default in zip(VARIABLES, "0101"))
    shown = " ".join(f"{name}={shlex.quote(os.environ[name])}" for name in given)
    remedy = f"Unset {', '.join(given)}, or start with `rankllm-composer train RECIPE -n N`, which sets all of them."
    if not is_single and len(given) < len(VARIABLES):
        absent = ", ".join(name for name in VARIABLES if name not in given)
        raise RunError(f"the environment has {shown}, but not {absent}; expected all of them or none. {remedy}")
    rank, num_ranks, local_rank, num_here = (_number(name, int(name.endswith("SIZE"))) for name in VARIABLES[:4])
    if rank >= num_ranks or local_rank >= num_here or num_here > num_ranks:
        raise RunError(f"the environment has {shown}; expected ranks below the numbers of ranks. {remedy}")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise RunError(f"{name} is {text!r} in the environment; expected a number. Unset it.")
    return int(text)
