"""The launcher waits for its ranks after a request to stop, and leaves nothing behind."""

from __future__ import annotations

import datetime
import os
import signal
import tempfile
from pathlib import Path

import pytest
from composer.cli import launcher
from support.child_process import in_a_child

from rankllm_composer.launch import STOP_TIMEOUT, main


@pytest.fixture(autouse=True)
def restored_handlers(monkeypatch):
    monkeypatch.setattr(launcher, "CLEANUP_TIMEOUT", launcher.CLEANUP_TIMEOUT)
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


@pytest.mark.parametrize("event", ["interrupt", "nothing"])
def test_without_sigterm_the_timeout_is_composers(monkeypatch, event):
    timeout = launcher.CLEANUP_TIMEOUT

    def run() -> int:
        if event == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert launcher.CLEANUP_TIMEOUT is timeout
        return 0

    monkeypatch.setattr(launcher, "main", run)
    assert main() == 0
