"""Progress on a terminal of 80 columns and in a pipe: what is shown, what is left, and what other lines do to it."""

from __future__ import annotations

import os
import pty
import re
import sys
import threading

import pytest
from support.child_process import in_a_child

from rankllm_composer import screen
from rankllm_composer.cli import main
from rankllm_composer.screen import StatusLine, counting, doing, loading, report, say, status

DRAW = "\r\x1b[K"


def written_on_a_terminal(monkeypatch, work) -> str:
    """What `work` writes to a terminal of 80 columns that is its standard error."""
    ours, theirs = pty.openpty()
    read: list[bytes] = []

    def copy() -> None:
        try:
            while text := os.read(ours, 4096):
                read.append(text)
        except OSError:  # the other end is closed
            return

    reader = threading.Thread(target=copy)
    reader.start()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        work()
        monkeypatch.undo()
    reader.join()
    os.close(ours)
    return b"".join(read).decode().replace("\r\n", "\n")


def on_screen(text: str) -> list[str]:
    """The lines that stay on a terminal, without those that were drawn over."""
    return [line.rpartition(DRAW)[2] for line in text.split("\n")]


def test_a_task_is_drawn_in_place_and_leaves_nothing(monkeypatch):
    def work() -> None:
        with doing("loading the weights of " + "x" * 100):
            report("a warning")
            status.update(is_due=True)

    text = written_on_a_terminal(monkeypatch, work)
    assert on_screen(text) == ["a warning", ""]
    drawn = [part for part in re.split(r"\r\x1b\[K|\n", text) if part]
    assert drawn[0] == ("loading the weights of " + "x" * 100)[:79] and drawn[:2] == [drawn[0], "a warning"]
    assert set(drawn[2:]) == {drawn[0]}


def test_commands_that_read_large_files_say_so(monkeypatch, tmp_path):
    for name, content in {
        "run.trec": "q Q0 a 1 2 x\nq Q0 b 2 1 x\n",
        "qrels.trec": "q 0 a 1\n",
        "queries.jsonl": '{"id": "q", "text": "one"}\n',
        "docs.jsonl": '{"id": "a", "text": "two"}\n{"id": "b", "text": "three"}\n',
    }.items():
        (tmp_path / name).write_text(content)
    run, qrels, queries, docs = (
        str(tmp_path / name) for name in ("run.trec", "qrels.trec", "queries.jsonl", "docs.jsonl")
    )
    out = str(tmp_path / "requests.jsonl")
    for command, shown in (
        (["compare", run, run, "--qrels", qrels], "reading and measuring the runs …"),
        (["requests", "--run", run, "--queries", queries, "--docs", docs, "-o", out], "reading the files and writing"),
        (["sources", "look", run, qrels, queries, docs], "reading the files …"),
    ):

        def work(command: list[str] = command) -> None:
            with pytest.raises(SystemExit) as ended:
                main(command)
            assert not ended.value.code

        assert f"{DRAW}{shown}" in written_on_a_terminal(monkeypatch, work), command


def test_a_terminal_is_redrawn_by_itself(monkeypatch):
    """A task that reports nothing is seen to go on."""
    monkeypatch.setattr(screen, "status", status)
    monkeypatch.setattr(status, "_tick_seconds", 0.01)
    monkeypatch.setattr(status, "_redraw_seconds", 0.0)

    def work() -> None:
        drawn_again = threading.Event()
        times = iter(range(100_000))

        def text() -> str:
            number = next(times)
            if number >= 3:
                drawn_again.set()
            return f"working {number}"

        status.begin(text)
        assert drawn_again.wait(60)
        status.end(text)

    text = written_on_a_terminal(monkeypatch, work)
    assert all(f"{DRAW}working {number}" in text for number in range(3)) and on_screen(text) == [""]


def test_a_pipe_has_a_line_per_task_and_later_ones_at_intervals(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(status, "clock", lambda: now[0])
    monkeypatch.setattr(status, "_tick_seconds", None)
    with counting("reranking", "windows", total=120, done=20) as advance:
        for seconds in (29, 30, 31, 60):
            now[0] = seconds
            advance(10)
        with doing("comparing"):
            now[0] += 90
            status.update()
    assert capsys.readouterr().err.splitlines() == [
        "reranking  20/120 windows",
        "reranking  40/120 windows  ETA 0:02:00  0.67 windows/s",
        "reranking  60/120 windows  ETA 0:01:30  0.67 windows/s",
        "comparing …",
        "comparing … 0:01:30",
    ]
    with counting("records.jsonl", "records") as advance:
        now[0] += 30
        advance(4500)
    assert capsys.readouterr().err.splitlines()[-1] == "records.jsonl  4,500 records  150 records/s"


def test_a_long_path_leaves_room_for_the_count(capsys):
    with counting(f"checking /data/{'long/' * 20}set", "shards", total=12):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) == 80 and line.startswith("checking /data/long/") and line.endswith("/long/set  0/12 shards")


def test_what_may_be_short_has_a_line_once_it_is_long(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(status, "clock", lambda: now[0])
    monkeypatch.setattr(status, "_tick_seconds", None)
    with loading():
        for seconds in (101, 102, 103):
            now[0] = seconds
            status.update()
    assert capsys.readouterr().err.splitlines() == ["loading the libraries … 0:00:02"]


def test_other_ranks_show_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with doing("loading"):
        status.update(is_due=True)
    assert capsys.readouterr().err == ""


def test_an_error_ends_what_is_shown(capsys):
    text = lambda: "training"  # noqa: E731
    status.begin(text)
    status.stop()
    say("done")
    status.update(is_due=True)
    status.end(text)
    assert capsys.readouterr() == ("done\n", "training\n")
    assert not [thread for thread in threading.enumerate() if thread.name == "status line"]


def test_a_closed_pipe_does_not_end_the_work(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed, doing("working"):
        line = StatusLine(closed, tick_seconds=None)
        line.begin(lambda: "working")
        line.stop()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # what is buffered goes somewhere when it is closed


def test_a_forked_process_prints_without_the_line_of_its_parent(capfd):
    def child() -> None:
        report("from the child")
        with doing("a task of the child"):
            pass

    with doing("a task"), status._lock:  # held by another thread in the parent at this moment
        in_a_child(child)
    assert capfd.readouterr().err.splitlines() == ["a task …", "from the child", "a task of the child …"]


@pytest.mark.parametrize(
    "parts, line", [(["a" * 10, "b" * 66, "c"], "a" * 10 + "  " + "b" * 66), (["a" * 99], "a" * 99)]
)
def test_parts_that_do_not_fit_are_left_out(parts, line):
    assert StatusLine(tick_seconds=None).fitted(parts) == line
