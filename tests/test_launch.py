"""A launcher that is asked to stop waits for its ranks."""

from __future__ import annotations

import datetime
import signal

import pytest
from composer.cli import launcher

from rankllm_composer.launch import PATIENCE, main


@pytest.fixture(autouse=True)
def handlers_as_before(monkeypatch):
    monkeypatch.setattr(launcher, "CLEANUP_TIMEOUT", launcher.CLEANUP_TIMEOUT)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_asked_to_stop_it_waits_and_is_not_hurried(monkeypatch):
    def run() -> int:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # again
        assert launcher.CLEANUP_TIMEOUT == PATIENCE > datetime.timedelta(minutes=10)
        return 7

    monkeypatch.setattr(launcher, "main", run)
    assert main() == 7


@pytest.mark.parametrize("event", ["interrupt", "nothing"])
def test_otherwise_it_is_composers(monkeypatch, event):
    patience = launcher.CLEANUP_TIMEOUT

    def run() -> int:
        if event == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert launcher.CLEANUP_TIMEOUT is patience
        return 0

    monkeypatch.setattr(launcher, "main", run)
    assert main() == 0
