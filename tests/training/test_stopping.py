"""How ranks stop when another one died, and which of them reports it."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from composer import Callback
from support.resumable_runs import names
from support.tiny_training import new_hf_model, new_trainer

from rankllm_composer.checkpoints.folder import MANIFEST, Manifest
from rankllm_composer.errors import RunError
from rankllm_composer.processes import start_of
from rankllm_composer.training import stopping
from rankllm_composer.training.checkpoint_callback import CheckpointFolder
from rankllm_composer.training.run import announce_stop, claim_run_folder
from rankllm_composer.training.stopping import (
    Peer,
    PeerWatch,
    Preempted,
    Preemption,
    describe_saved,
    on_stop_signals,
    raise_preempted,
)

RECIPE_TEXT = "run: {seed: 1}"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(stopping, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(stopping, "POLL_SECONDS", 0.02)
    before = on_stop_signals(signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture()
def process():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield child
    child.kill()
    child.wait()


def peer(process: subprocess.Popen, rank: int) -> Peer:
    return Peer(rank, process.pid, start_of(process.pid))


def new_watch(rank: int, peers: list[Peer]) -> tuple[PeerWatch, list[int], threading.Event]:
    """A watch that records the exit code instead of ending this process."""
    codes: list[int] = []
    ended = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    watch = PeerWatch(end)
    watch.rank = rank
    watch.watch(peers)
    return watch, codes, ended


def test_a_rank_that_waits_for_a_dead_peer_is_ended(process, capsys):
    watch, codes, ended = new_watch(0, [peer(process, 1)])
    assert watch.lost() == [] and codes == []
    process.kill()  # not reaped: a zombie counts as dead
    assert ended.wait(30) and codes == [1]
    message = capsys.readouterr().err
    assert f"error: rank 0: rank 1 (process {process.pid}) died. " in message
    assert "rerun the same command to resume" in message


def test_a_stopped_watch_ignores_peers_that_exit(process):
    watch, codes, ended = new_watch(0, [peer(process, 1)])
    watch.stop()
    process.kill()
    assert not ended.wait(0.6) and codes == []


def test_a_rank_without_progress_says_so_before_a_collective_times_out(capsys):
    watch = PeerWatch()
    watch.find_hindmost = lambda: "rank 1 (batch 3: forward pass, for 9 s)"
    said = ""
    watch.watch_progress(timeout_seconds=0.4)
    try:
        deadline = time.monotonic() + 60
        while "no progress" not in said and time.monotonic() < deadline:
            time.sleep(0.05)
            said += capsys.readouterr().err
    finally:
        watch.stop()
    expected = r"rank 0: no progress for \d+ s; if it waits for another rank, parallelism.dist_timeout_seconds=0.4 ends"
    assert re.search(expected, said)
    assert "Furthest behind: rank 1 (batch 3: forward pass, for 9 s); checkpoints are intact" in said
    assert said.count("no progress") == 1


@pytest.mark.parametrize(
    "rank, gone, failure, code, message",
    [
        (0, False, ValueError("run.name: bad"), 2, "error: run.name: bad\n"),
        (1, False, ValueError("shard 3 is bad"), 2, "error: rank 1: shard 3 is bad\n"),
        (1, True, ValueError("run.name: bad"), 2, "rank 1: stopped because rank 0 failed\n"),
        (1, True, RuntimeError("Connection closed by peer"), 1, "rank 1: stopped because rank 0 failed\n"),
        (0, True, RuntimeError("Connection closed by peer"), 1, "error: rank 0: rank 1 (process "),
        (0, False, RuntimeError("a bug"), 1, "error: rank 0: RuntimeError: a bug; checkpoints are intact"),
        (0, False, KeyboardInterrupt(), 130, "error: interrupted; checkpoints are intact"),
        (1, False, KeyboardInterrupt(), 130, ""),
    ],
)
def test_one_rank_reports_the_failure(process, capsys, rank, gone, failure, code, message):
    other = peer(process, 1 - rank)
    if gone:
        process.kill()
        process.wait()
    watch, codes, ended = new_watch(rank, [other])
    assert watch.exit_code(failure) == code
    err = capsys.readouterr().err
    assert message in err
    assert ("Traceback" in err or "RuntimeError: a bug\n" in err) == (str(failure) == "a bug")
    assert ended.wait(30) and codes == [code]  # the process ends even if its exit would block


@pytest.mark.parametrize("failure", [ValueError, RuntimeError])
def test_secrets_are_redacted_from_errors(capsys, monkeypatch, failure):
    """Clients of object stores put signed URLs and tokens into their errors."""
    monkeypatch.setenv("HF_TOKEN", "a token of the environment")
    url = "https://b.s3.amazonaws.com/k?X-Amz-Credential=A%2Fb&X-Amz-Signature=ff00ff00"
    try:
        raise failure(f"GET {url} with 'a token of the environment' of s3://key:hushhush@bucket was refused")
    except failure as error:
        PeerWatch().exit_code(error)
    message = capsys.readouterr().err
    assert "GET https://b.s3.amazonaws.com/k?[redacted]" in message and "@bucket was refused" in message
    assert not [word for word in ("ff00ff00", "a token of", "hushhush") if word in message]


@pytest.mark.parametrize("rank, message", [(0, "stop requested\n"), (1, "")])
def test_a_run_stopped_on_request_exits_with_0(process, capsys, rank, message):
    watch, codes, ended = new_watch(rank, [peer(process, 1 - rank)])
    assert watch.exit_preempted(Preempted("stop requested")) == 0
    assert capsys.readouterr().err == message
    assert ended.wait(30) and codes == [0]  # the process ends even if its exit would block


def test_what_is_lost_is_said(tmp_path, capsys):
    """Without a checkpoint nothing is intact, whatever ends the run."""
    watch = PeerWatch()
    watch.saved = partial(describe_saved, tmp_path, lambda: 0)
    watch.exit_code(KeyboardInterrupt())
    nothing = "error: interrupted; no checkpoint was written yet, and no batch was trained; rerun the same command"
    assert nothing in capsys.readouterr().err
    watch.saved = partial(describe_saved, tmp_path, lambda: 7)
    watch.exit_code(ValueError("a disk is full"))
    lost = "no checkpoint was written yet, so the batches trained are lost (7); rerun the same command to start again\n"
    assert capsys.readouterr().err == f"error: a disk is full\n{lost}"
    write_checkpoint(tmp_path / "ep0-ba4", 4)
    watch.exit_code(RuntimeError("a bug"))
    message = capsys.readouterr().err
    again = ", from ep0-ba4: batches after it are trained again (3)"
    assert f"a bug; checkpoints are intact; rerun the same command to resume{again}" in message
    assert describe_saved(tmp_path, lambda: 4) == "checkpoints are intact; rerun the same command to resume"


def write_checkpoint(folder: Path, batch: int) -> None:
    """A complete checkpoint of one file."""
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    files, sha256 = {"weights": 1}, {"weights": hashlib.sha256(b"w").hexdigest()}
    manifest = Manifest(
        batch=batch, epoch=0, num_ranks=1, is_sharded=False, weights={}, callbacks=[], files=files, sha256=sha256
    )
    (folder / MANIFEST).write_text(manifest.to_json())


class Interrupts(Callback):
    """Ctrl-C in a batch, as often as given."""

    def __init__(self, batch: int, number: int) -> None:
        self.batch, self.number = batch, number

    def after_forward(self, state, logger) -> None:
        if state.timestamp.batch == self.batch:
            for _ in range(self.number):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number, error, kept", [(1, Preempted, ["ep0-ba3"]), (2, KeyboardInterrupt, [])])
def test_an_interrupt_writes_a_checkpoint_and_a_second_one_does_not(tmp_path, capsys, number, error, kept):
    checkpoints = CheckpointFolder(tmp_path, interval="1ep")
    saved = lambda trained: describe_saved(tmp_path, lambda: trained)  # noqa: E731
    callbacks = [Interrupts(2, number), checkpoints, Preemption(checkpoints.save_to_stop, saved=saved)]
    trainer = new_trainer(new_hf_model(), "2ep", callbacks=callbacks)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(error) as stop:
        trainer.fit()
    signal.signal(signal.SIGINT, before)
    assert names(tmp_path) == kept
    lost = "no checkpoint was written yet, so the batches trained are lost (2); rerun the same command to start again"
    assert capsys.readouterr().err.count(f"Press Ctrl-C again to stop at once: {lost}") == 1
    if number == 1:
        assert stop.value.code == 130
        assert str(stop.value).startswith("interrupted (Ctrl-C): wrote a checkpoint after batch 3; rerun")


def test_a_single_process_exits_at_once(capsys):
    watch = PeerWatch()
    assert watch.exit_code(ValueError("recipe.yaml: absent")) == 2
    assert capsys.readouterr().err == "error: recipe.yaml: absent\n"


def test_a_signal_that_is_ignored_stays_ignored():
    """`nohup` ignores SIGHUP, so that a closed terminal does not stop the run."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = on_stop_signals(raise_preempted)
    assert signal.getsignal(signal.SIGHUP) == before[signal.SIGHUP] == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is raise_preempted
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    on_stop_signals(raise_preempted)
    with pytest.raises(Preempted, match=r"^stop requested .SIGTERM, SIGHUP, or the launcher is gone. outside training"):
        signal.raise_signal(signal.SIGHUP)


def test_a_run_that_is_stopping_is_waited_for_by_its_successor(tmp_path, capfd):
    """A killed launcher may be started again while its ranks still write a checkpoint."""
    ready, is_over = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(is_over[1])
        with claim_run_folder(tmp_path, RECIPE_TEXT):
            announce_stop(tmp_path)
            os.write(ready[1], b"x")
            os.read(is_over[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    threading.Timer(0.3, os.close, [is_over[1]]).start()
    with claim_run_folder(tmp_path, RECIPE_TEXT):
        assert os.waitpid(child, 0)[1] == 0
        assert f"{tmp_path}: waiting for the run that is stopping there" in capfd.readouterr().err
        with pytest.raises(RunError, match="another process is training"), claim_run_folder(tmp_path, RECIPE_TEXT):
            pass  # this one is not stopping
