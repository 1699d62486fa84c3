"""The launcher waits for its ranks after a request to stop, and leaves nothing behind."""

from __future__ import annotations

import datetime
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from composer.cli import launcher
from support.child_process import in_a_child
from support.launching import ON_CPU
from support.recipes import MINIMAL, write_recipe

from rankllm_composer.cli import main as cli
from rankllm_composer.errors import RunError
from rankllm_composer.launch import STOP_TIMEOUT, main, train_arguments
from rankllm_composer.training.rendezvous import VARIABLES, meet


@pytest.fixture(autouse=True)
def restored_handlers(monkeypatch):
    for name in ("CLEANUP_TIMEOUT", "_print_process_exit_status"):
        monkeypatch.setattr(launcher, name, getattr(launcher, name))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_makes_the_launcher_wait_however_often_it_comes(monkeypatch, number):
    def run() -> int:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)  # a second time
        signal.raise_signal(signal.SIGHUP)
        assert launcher.CLEANUP_TIMEOUT == STOP_TIMEOUT > datetime.timedelta(minutes=10)
        return 7

    monkeypatch.setattr(launcher, "main", run)
    assert main() == 7


def test_under_nohup_a_closed_terminal_is_ignored(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(launcher, "main", lambda: signal.raise_signal(signal.SIGHUP) or 0)
    assert main() == 0


def test_output_of_a_killed_launcher_is_removed_by_the_next(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def die() -> int:
        Path(tempfile.mkdtemp(), "rank1.stdout.txt").write_text("line")
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> int:
        assert not list(tmp_path.rglob("rank1.stdout.txt"))
        assert int(os.environ["RANKLLM_COMPOSER_LAUNCHER"]) == os.getpid()
        return 0

    monkeypatch.setattr(launcher, "main", die)
    in_a_child(main)
    assert len(list(tmp_path.rglob("rank1.stdout.txt"))) == 1
    monkeypatch.setattr(launcher, "main", run)
    assert main() == 0


def test_an_interrupt_waits_for_a_checkpoint_and_a_second_one_does_not(monkeypatch):
    def run() -> int:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert launcher.CLEANUP_TIMEOUT == STOP_TIMEOUT
        signal.raise_signal(signal.SIGINT)
        assert datetime.timedelta() < launcher.CLEANUP_TIMEOUT < datetime.timedelta(minutes=5)
        with pytest.raises(KeyboardInterrupt):  # composer then kills the ranks
            signal.raise_signal(signal.SIGINT)
        return 130

    monkeypatch.setattr(launcher, "main", run)
    assert main() == 130


def test_without_a_request_the_timeout_is_composers_and_its_last_words_are_left_out(monkeypatch, capsys):
    timeout = launcher.CLEANUP_TIMEOUT

    def run() -> int:
        assert launcher.CLEANUP_TIMEOUT is timeout
        launcher._cleanup_processes({})
        launcher.print("Global rank 1 exited")
        return 0

    monkeypatch.setattr(launcher, "main", run)
    assert main() == 0
    assert capsys.readouterr().out == "Global rank 1 exited\n"
    assert not hasattr(launcher, "print")


# --- rankllm-composer train -------------------------------------------------------------------------------------------


@pytest.fixture
def clean(monkeypatch):
    """No variables of a launcher."""
    for name in (*VARIABLES, "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli(["train", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_train_refuses_a_recipe_before_any_process_starts(clean, capsys):
    clean.setattr(launcher, "main", lambda: pytest.fail("started"))
    assert "optimizer.lr is 0; expected a number above 0" in refused(capsys, "first_mistral", "optimizer.lr=0")
    assert "is 128; expected a multiple of 3 (3 ranks)" in refused(capsys, "first_mistral", "-n", "3")
    assert "expected a path with / or .yaml, or one of demo" in refused(capsys, "frist_mistral")


def test_train_takes_names_and_passes_everything_on(clean, capsys):
    clean.setattr(launcher, "main", lambda: print(sys.argv) or 5)
    with pytest.raises(SystemExit) as stop:
        cli(["train", "first_mistral", "-n", "2", "optimizer.lr=1e-5", "run.name=mine"])
    assert stop.value.code == 5
    program, option, number, script, recipe, *rest = eval(capsys.readouterr().out)
    assert (program, option, number, rest) == ("composer", "-n", "2", ["optimizer.lr=1e-5", "run.name=mine"])
    assert Path(script).name == "train.py" and Path(recipe).name == "first_mistral.yaml" and Path(recipe).exists()


@pytest.mark.parametrize(
    "variables, named",
    [
        ({"RANK": "0"}, ["RANK=0"]),
        ({"WORLD_SIZE": "8"}, ["WORLD_SIZE=8"]),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, ["RANK=1", "LOCAL_RANK=1", "WORLD_SIZE=2"]),
    ],
)
def test_variables_left_in_the_shell_are_named(clean, variables, named):
    for name, value in variables.items():
        clean.setenv(name, value)
    with pytest.raises(RunError) as error:
        train_arguments(Path("recipe.yaml"), [], 1)
    assert str(error.value).startswith(f"the environment has {' '.join(named)}; expected no variables")
    for name in re.search(r"Unset ([\w, ]+);", str(error.value))[1].split(", "):  # followed
        clean.delenv(name)
    assert train_arguments(Path("recipe.yaml"), ["a=b"], None)[1:] == ["recipe.yaml", "a=b"]
    several = {"WORLD_SIZE": "16", "NODE_RANK": "1", "MASTER_ADDR": "machine-0", "MASTER_PORT": "29500"}
    for name, value in several.items():
        clean.setenv(name, value)
    assert train_arguments(Path("recipe.yaml"), [], 8)[:2] == ["-n", "8"]


# --- ranks that never start -------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> str:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return str(held.getsockname()[1])


def as_rank(patch, rank: int, port: str, **others: str) -> None:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **others}.items():
        patch.setenv(name, str(value))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_does_not_wait_for_one_that_has_no_process(clean, port, rank):
    as_rank(clean, rank, port)
    with pytest.raises(RunError) as error:
        meet(0.2)
    assert f"rank {rank} of 2 waits for rank {1 - rank}, which did not start" in str(error.value)
    assert f"RANK={rank} WORLD_SIZE=2 " in str(error.value) and f"MASTER_PORT={port}" in str(error.value)
    for name in re.search(r"\(unset ([\w ]+)\)", str(error.value))[1].split():  # followed
        clean.delenv(name)
    assert meet(0.2) is None


def test_ranks_that_start_meet(clean, port):
    as_rank(clean, 0, port)
    code = "from rankllm_composer.training.rendezvous import meet; meet(300)"
    other = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "RANK": "1", "LOCAL_RANK": "1"})
    assert meet(300) is not None
    assert other.wait(300) == 0


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but not RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "LOCAL_WORLD_SIZE": "8"}, "but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "three"}, "RANK=three, but not WORLD_SIZE"),
    ],
)
def test_a_partly_set_environment_is_refused(clean, variables, message):
    for name, value in variables.items():
        clean.setenv(name, value)
    with pytest.raises(RunError, match=re.escape(message)):
        meet(60)


def test_contradicting_variables_and_a_busy_port_are_refused(clean, port):
    as_rank(clean, 2, port)
    with pytest.raises(RunError, match="expected ranks below the numbers of ranks"):
        meet(60)
    as_rank(clean, 0, port, LOCAL_RANK="zero")
    with pytest.raises(RunError, match="LOCAL_RANK is 'zero' in the environment; expected a number"):
        meet(60)
    as_rank(clean, 0, port)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", int(port)))
        busy.listen()
        with pytest.raises(RunError, match=f"MASTER_PORT {port} is in use on this machine"):
            meet(60)


@pytest.mark.slow
def test_an_error_of_two_ranks_is_one_line_of_the_launcher(clean, tmp_path):
    recipe = write_recipe(tmp_path, MINIMAL)
    command = [sys.executable, "-m", "rankllm_composer", "train", recipe, "-n", "2", *ON_CPU, "run.folder=run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 2 and output.count("error: ") == 1, output
    assert "error: data.train: no shards in shards." in output
    assert not re.search("Traceback|crashed|exited with code|Begin global rank", output), output
