"""Processes are told apart whatever the clock does, notice a lost launcher, and end with their parent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.child_process import in_a_child
from support.missing_calls import no_parent_death_signal

from rankllm_composer.processes import drop_closed_outputs, machine, start_of

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="private mounts need root")


def run_python(code: str, *prefix: str, **options) -> str:
    done = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=True, **options)
    return done.stdout.strip()


def test_the_start_of_a_process():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert start_of(child.pid) == start_of(child.pid) > start_of(os.getpid()) - 1
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert start_of(child.pid) is None  # a zombie has ended
    finally:
        child.kill()
        child.wait()
    assert start_of(child.pid) is None


@AS_ROOT
def test_a_step_of_the_clock_changes_no_start(tmp_path):
    """The kernel's time of boot moves with the clock, and with it the creation times that follow the clock."""
    text = Path("/proc/stat").read_text()
    boot = next(line for line in text.splitlines() if line.startswith("btime "))
    (tmp_path / "stat").write_text(text.replace(boot, f"btime {int(boot.split()[1]) + 1}"))
    stepped = ("unshare", "-m", "sh", "-c", f'mount --bind {tmp_path / "stat"} /proc/stat && exec "$@"', "sh")
    code = "import psutil\nfrom rankllm_composer.processes import start_of\n" + (
        f"print(start_of({os.getpid()}), psutil.Process({os.getpid()}).create_time())"
    )
    start, creation = map(float, run_python(code, *stepped).split())
    assert start == start_of(os.getpid())
    assert creation == pytest.approx(psutil.Process().create_time() + 1, abs=0.1)


@AS_ROOT
def test_machines_are_told_apart_by_system_and_process_ids_not_by_host_name():
    code = "from rankllm_composer.processes import machine; print(machine())"
    renamed = ("unshare", "-u", "sh", "-c", 'hostname other && exec "$@"', "sh")
    assert run_python(code, *renamed) == run_python(code) == machine()
    assert run_python(code, "unshare", "-p", "-f", "--mount-proc") != machine()


LAUNCHER = """
import os, subprocess, sys, time
fate, ready, own_group, rank = sys.argv[1:]
if "RANKLLM_COMPOSER_LAUNCHER" in os.environ:
    os.environ["RANKLLM_COMPOSER_LAUNCHER"] = str(os.getpid())
command = [sys.executable, "-c", rank, str(os.getpid()), fate, ready]
process = subprocess.Popen(command, start_new_session=own_group == "True")
while fate == "dies late" and not os.path.exists(ready):
    time.sleep(0.01)
if fate == "lives":
    process.wait()
"""
RANK = """
import os, sys, time
launcher, fate, ready = int(sys.argv[1]), *sys.argv[2:]
if fate == "dies late":
    import rankllm_composer.processes
    open(ready, "w").close()
while fate != "lives" and os.getppid() == launcher:
    time.sleep(0.01)
from rankllm_composer.processes import has_launcher, launcher_is_gone
print(has_launcher(), launcher_is_gone())
"""
BY_COMPOSER = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": "0", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
BY_US = {**BY_COMPOSER, "RANKLLM_COMPOSER_LAUNCHER": ""}


@pytest.mark.parametrize(
    "environment, fate, own_group, expected",
    [
        (BY_COMPOSER, "lives", False, "True False"),
        (BY_COMPOSER, "dies late", False, "True True"),
        (BY_COMPOSER, "dies early", False, "True True"),
        (BY_COMPOSER, "lives", True, "True False"),  # variables set by hand
        (BY_US, "lives", True, "True False"),
        (BY_US, "dies early", True, "True True"),
        ({}, "dies late", False, "False False"),  # a shell that ends is no launcher: nohup python train.py … &
    ],
)
def test_a_launcher_that_ends_is_noticed(tmp_path, environment, fate, own_group, expected):
    command = [sys.executable, "-c", LAUNCHER, fate, tmp_path / "ready", str(own_group), RANK]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected, done.stderr


PARENT = """
import multiprocessing, signal, time
from rankllm_composer.processes import end_with_parent

def work():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(3600)

if __name__ == "__main__":
    for kind in ("fork", "fork", "spawn"):
        multiprocessing.get_context(kind).Process(target=work, daemon=True).start()
    time.sleep(3600)
"""


@pytest.mark.parametrize("has_signal", [True, False], ids=["signal", "pipe"])
def test_workers_end_with_their_killed_parent(tmp_path, has_signal):
    (tmp_path / "parent.py").write_text(PARENT)
    missing = {} if has_signal else no_parent_death_signal(tmp_path)
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True, env={**os.environ, **missing}
    ) as parent:
        workers = [int(parent.stdout.readline()) for _ in range(3)]
        assert None not in map(start_of, workers)
        parent.kill()
    deadline = time.monotonic() + 120
    while any(start_of(worker) is not None for worker in workers):
        assert time.monotonic() < deadline, f"{workers} survive their parent"
        time.sleep(0.01)


def test_outputs_that_nobody_reads_are_dropped():
    """Of a closed pipe and of a terminal that is gone; what is still read stays."""

    def write_to(descriptor: int) -> str:
        os.dup2(descriptor, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os.write(1, b"before")
            first = "written"
        except OSError as error:
            first = os.strerror(error.errno)
        drop_closed_outputs()
        os.write(1, b"after")
        return first

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    reader, writer = os.pipe()
    assert in_a_child(lambda: write_to(writer)) == "written" and os.read(reader, 20) == b"beforeafter"
    os.close(reader)
    assert in_a_child(lambda: write_to(writer)) == "Broken pipe"
    master, terminal = os.openpty()
    os.close(master)
    assert in_a_child(lambda: write_to(terminal)) == "Input/output error"
