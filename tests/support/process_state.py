"""What the tests of one process share. Each has to leave it as it found it, so that their order does not matter."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Libraries set these when they are first used, to the same values in every test.
_SET_BY_LIBRARIES = (
    "CUDA_MODULE_LOADING",
    "TORCHINDUCTOR_CACHE_DIR",
    "WANDB_ERROR_REPORTING",
    "WANDB__SHOW_OPERATION_STATS",
)
# Packages that register what is theirs when it is imported or first needed; the second is code shipped with a model.
_OWN = ("transformers.", "transformers_modules.", "rankllm_composer.")
# Helpers for shared memory (of Python) and compilation (of torch), and the process from which runs are forked.
_SHARED = ("multiprocessing.resource_tracker", "_inductor/compile_worker", "workers/warm_python.py")


class ProcessState:
    """The environment, current folder, umask, signal handlers, settings of torch and children of this process."""

    def __init__(self) -> None:
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self.folder = Path.cwd()
        self.umask = os.umask(0)
        os.umask(self.umask)
        self.handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self.dtype, self.num_threads = torch.get_default_dtype(), torch.get_num_threads()
        self.is_deterministic = torch.are_deterministic_algorithms_enabled()
        self.has_gradients = torch.is_grad_enabled()
        self.has_process_group = torch.distributed.is_initialized()
        self.temporary_folder = tempfile.tempdir
        self.registered = _registered()
        self.children = _children()
        self.seconds = time.clock_gettime(time.CLOCK_BOOTTIME)

    def restore(self) -> list[str]:
        """Undo what a test changed, and return it in words."""
        now, changes = ProcessState(), []
        for name in sorted(self.environment.keys() | now.environment.keys()):
            before, after = self.environment.get(name), now.environment.get(name)
            if before != after and name not in _SET_BY_LIBRARIES:
                changes.append(f"{name} in the environment was {before!r} and is {after!r}")
                _set_variable(name, before)
        if now.folder != self.folder:
            changes.append(f"the current folder was {self.folder} and is {now.folder}")
            os.chdir(self.folder)
        if now.umask != self.umask:
            changes.append(f"the umask was {self.umask:o} and is {now.umask:o}")
            os.umask(self.umask)
        for number, handler in self.handlers.items():
            if (found := now.handlers[number]) is not handler:
                if getattr(found, "__module__", "") != "composer.core.engine":  # set when it is imported
                    changes.append(f"the handler of {number.name} was {handler} and is {found}")
                signal.signal(number, handler)
        if now.dtype != self.dtype:
            changes.append(f"torch's default type was {self.dtype} and is {now.dtype}")
            torch.set_default_dtype(self.dtype)
        if now.num_threads != self.num_threads:
            changes.append(f"torch's threads were {self.num_threads} and are {now.num_threads}")
            torch.set_num_threads(self.num_threads)
        if now.is_deterministic != self.is_deterministic:
            changes.append(f"torch's deterministic algorithms were {self.is_deterministic}, are {now.is_deterministic}")
            torch.use_deterministic_algorithms(self.is_deterministic)
        if now.has_gradients != self.has_gradients:
            changes.append(f"torch's gradients were {self.has_gradients} and are {now.has_gradients}")
            torch.set_grad_enabled(self.has_gradients)
        if now.has_process_group and not self.has_process_group:
            changes.append("the process group of torch.distributed was left behind")
            torch.distributed.destroy_process_group()
        if now.temporary_folder not in (self.temporary_folder, self.temporary_folder or tempfile.gettempdir()):
            changes.append(f"the temporary folder was {self.temporary_folder} and is {now.temporary_folder}")
            tempfile.tempdir = self.temporary_folder
        changes += [f"{name} was registered with transformers" for name in sorted(now.registered - self.registered)]
        # The kernel may leave out of the list of children one that is just being started.
        started = self._started(now.children)
        if started:
            gc.collect()  # a loader ends its workers
            started = self._started(_children())
        changes += [f"process {child} was left running: {_command(child)}" for child in started]
        return changes

    def _started(self, children: set[int]) -> list[int]:
        return [child for child in children - self.children if _started_at(child) > self.seconds]


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        del os.environ[name]
    else:
        os.environ[name] = value


def _registered() -> set[str]:
    """Return the names that were added to the registries of transformers."""
    auto = sys.modules.get("transformers.models.auto.configuration_auto")
    models = sys.modules.get("transformers.models.auto.modeling_auto")
    tokenizers = sys.modules.get("transformers.models.auto.tokenization_auto")
    attention = sys.modules.get("transformers.modeling_utils")
    names = set(auto.CONFIG_MAPPING._extra_content) if auto else set()
    if models:
        names |= {kind.__name__ for kind in models.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content if not _is_own(kind)}
    if tokenizers:
        names |= {kind.__name__ for kind in tokenizers.TOKENIZER_MAPPING._extra_content if not _is_own(kind)}
    if attention:
        found = attention.AttentionInterface._global_mapping.items()
        names |= {name for name, function in found if not _is_own(getattr(function, "func", function))}
    return names


def _is_own(registered: Any) -> bool:
    return registered.__module__.startswith(_OWN)


def _children() -> set[int]:
    """Return the numbers of this process's running children but for those that serve all tests."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # of a thread that ended meanwhile
            found.update(map(int, path.read_text().split()))
    return {child for child in found if (command := _command(child)) and not any(map(command.__contains__, _SHARED))}


def _command(process: int) -> str:
    """Return the command of a process, or nothing if it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _started_at(process: int) -> float:
    """Return the seconds from the machine's start to the process's, or 0 if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
