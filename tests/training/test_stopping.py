"""Who ends when another rank has died, and who says what."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import psutil
import pytest

from rankllm_composer.training import stopping as clean_stop
from rankllm_composer.training.stopping import Peer, PeerWatch, Preempted


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(clean_stop, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(clean_stop, "POLL_SECONDS", 0.02)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture()
def process():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield child
    child.kill()
    child.wait()


def peer(process: subprocess.Popen, rank: int) -> Peer:
    return Peer(rank, process.pid, psutil.Process(process.pid).create_time())


def new_watch(rank: int, peers: list[Peer]) -> tuple[PeerWatch, list[int], threading.Event]:
    """A watch that notes the exit code instead of ending this process."""
    codes: list[int] = []
    ended = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    watch = PeerWatch(end)
    watch.rank = rank
    watch.watch(peers)
    return watch, codes, ended


def test_a_rank_stuck_without_its_peer_is_ended(process, capsys):
    watch, codes, ended = new_watch(0, [peer(process, 1)])
    assert watch.lost() == [] and codes == []
    process.kill()  # unreaped: a zombie is as good as gone
    assert ended.wait(30) and codes == [1]
    said = capsys.readouterr().err
    assert f"error: rank 0: rank 1 (process {process.pid}) ended before the run did" in said
    assert "start again with the same command" in said


def test_a_stopped_watch_lets_peers_go(process):
    watch, codes, ended = new_watch(0, [peer(process, 1)])
    watch.stop()
    process.kill()
    assert not ended.wait(0.6) and codes == []


@pytest.mark.parametrize(
    "rank, gone, failure, code, said",
    [
        (0, False, ValueError("run.name: bad"), 2, "error: run.name: bad\n"),
        (1, False, ValueError("shard 3 is bad"), 2, "error: rank 1: shard 3 is bad\n"),
        (1, True, ValueError("run.name: bad"), 2, "rank 1: ends with rank 0\n"),
        (1, True, RuntimeError("Connection closed by peer"), 1, "rank 1: ends with rank 0\n"),
        (0, True, RuntimeError("Connection closed by peer"), 1, "error: rank 0: rank 1 (process "),
        (0, False, RuntimeError("a bug"), 1, "error: rank 0: RuntimeError: a bug; nothing saved is lost"),
        (0, False, KeyboardInterrupt(), 130, "error: interrupted; nothing saved is lost"),
        (1, False, KeyboardInterrupt(), 130, ""),
    ],
)
def test_one_rank_tells(process, capsys, rank, gone, failure, code, said):
    other = peer(process, 1 - rank)
    if gone:
        process.kill()
        process.wait()
    watch, codes, ended = new_watch(rank, [other])
    assert watch.exit_code(failure) == code
    err = capsys.readouterr().err
    assert said in err
    assert ("Traceback" in err or "RuntimeError: a bug\n" in err) == (str(failure) == "a bug")
    assert ended.wait(30) and codes == [code]  # had its exit waited for something


@pytest.mark.parametrize("failure", [ValueError, RuntimeError])
def test_an_error_tells_no_secret(capsys, monkeypatch, failure):
    """As a store's client puts a signed URL into its error, or a token that it was given."""
    monkeypatch.setenv("HF_TOKEN", "a token of the environment")
    url = "https://b.s3.amazonaws.com/k?X-Amz-Credential=A%2Fb&X-Amz-Signature=ff00ff00"
    try:
        raise failure(f"GET {url} with 'a token of the environment' of s3://key:hushhush@bucket was refused")
    except failure as error:
        PeerWatch().exit_code(error)
    said = capsys.readouterr().err
    assert "GET https://b.s3.amazonaws.com/k?[redacted]" in said and "@bucket was refused" in said
    assert not [word for word in ("ff00ff00", "a token of", "hushhush") if word in said]


@pytest.mark.parametrize("rank, said", [(0, "asked to stop\n"), (1, "")])
def test_a_run_that_was_asked_to_stop_ends_well(process, capsys, rank, said):
    watch, codes, ended = new_watch(rank, [peer(process, 1 - rank)])
    assert watch.exit_as_asked(Preempted("asked to stop")) == 0
    assert capsys.readouterr().err == said
    assert ended.wait(30) and codes == [0]  # had its exit waited for something


def test_a_single_process_has_nobody_to_wait_for(capsys):
    watch = PeerWatch()
    assert watch.exit_code(ValueError("recipe.yaml: absent")) == 2
    assert capsys.readouterr().err == "error: recipe.yaml: absent\n"
