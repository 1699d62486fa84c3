"""The launcher waits for its ranks after SIGTERM."""

from __future__ import annotations

import datetime
import signal

import pytest
from composer.cli import launcher

from rankllm_composer.launch import STOP_TIMEOUT, main


@pytest.fixture(autouse=True)
def restored_handlers(monkeypatch):
    monkeypatch.setattr(launcher, "CLEANUP_TIMEOUT", launcher.CLEANUP_TIMEOUT)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_makes_the_launcher_wait_however_often_it_comes(monkeypatch):
    def run() -> int:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a second time
        assert launcher.CLEANUP_TIMEOUT == STOP_TIMEOUT > datetime.timedelta(minutes=10)
        return 7

    monkeypatch.setattr(launcher, "main", run)
    assert main() == 7


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
