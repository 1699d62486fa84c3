"""What CUDA reads once and for all: how it allocates memory, and which GPUs it sees. Imports no library at the top.

python -m rankllm_composer.training.devices 8    # exit code 2 unless 8 GPUs have the fast attention kernel
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.metadata import version

ALLOCATOR = "expandable_segments:True"
"""Segments that grow need less memory than whole ones where each microbatch has another number of tokens."""

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Before torch 2.9, and from then on."""

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


def allocator_settings(environment: Mapping[str, str], torch_version: str) -> dict[str, str]:
    """Environment variables under which CUDA allocates as a run needs it; none if the user has set any.

    Args:
        environment: of this process.
        torch_version: such as "2.7.0+cu126".
    """
    if any(name in environment for name in ALLOCATOR_VARIABLES):
        return {}
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return {ALLOCATOR_VARIABLES[(major, minor) >= (2, 9)]: ALLOCATOR}


def set_allocator() -> None:
    """Set `allocator_settings` in this process and those that it starts; call it before torch is imported."""
    os.environ.update(allocator_settings(os.environ, version("torch")))


def hide_gpus() -> None:
    """Hide the GPUs from CUDA in this process. Composer and streaming use any visible GPU, even for a run on the CPU.

    Raises:
        RunError: this process has counted its GPUs before, which CUDA does once.
    """
    import torch

    from rankllm_composer.errors import RunError

    os.environ[VISIBLE_GPUS] = ""
    if torch.cuda.is_available():
        raise RunError(
            "parallelism.device is cpu, but this process has looked for GPUs before, and Composer would train on one. "
            f"Start Python with {VISIBLE_GPUS} set to nothing, or set parallelism.device=gpu."
        )


def check_fast_training(num_ranks: int) -> None:
    """Raise RunError unless this machine has a GPU per rank, each with torch's attention kernel for packs."""
    import torch

    from rankllm_composer.errors import RunError, counted
    from rankllm_composer.model.attention import choose_attention, slower_because

    device, found = ("gpu" if torch.cuda.is_available() else "cpu"), torch.cuda.device_count()
    problem = slower_because(choose_attention("auto", device), device, precision="amp_bf16", packing=True)
    if problem is not None:
        raise RunError(
            f"attention would be computed list by list, as {problem}; expected {counted(num_ranks, 'GPU')} of compute "
            "capability 8.0 or more. Train there, or set SLOW=1 to train here all the same."
        )
    if found < num_ranks:
        raise RunError(
            f"NPROC is {num_ranks}, but this machine has {counted(found, 'GPU')}; expected one per process. Set "
            f"NPROC={found}, or SLOW=1 to train all the same."
        )


def main(arguments: list[str]) -> int:
    """Check the GPUs for a number of ranks; return the exit code."""
    from rankllm_composer.errors import RunError
    from rankllm_composer.screen import report

    try:
        check_fast_training(int(arguments[0]))
    except RunError as error:
        report(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
