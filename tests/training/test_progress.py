"""metrics.jsonl and the progress line: one line per batch, one file across kills and resumes, by rank 0 only."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composer import Callback, Evaluator
from composer.models import HuggingFaceModel
from composer.optim import LinearScheduler
from support.tiny_training import new_hf_model, new_loader, new_tokenizer, new_trainer
from torchmetrics import MeanMetric

from rankllm_composer.screen import StatusLine
from rankllm_composer.training.progress import MetricsFile, ProgressLine
from rankllm_composer.training.run_files import read_metrics


class TwoLosses(HuggingFaceModel):
    """A model with two loss terms, one of which is not finite in a given batch."""

    def __init__(self, bad_batch: int | None = None) -> None:
        super().__init__(new_hf_model(), new_tokenizer(), metrics=[], eval_metrics=[MeanLoss()])
        self.bad_batch = bad_batch
        self.num_batches = 0

    def loss(self, outputs, batch):
        self.num_batches += 1
        total = outputs["loss"]
        shown = total * float("nan") if self.num_batches == self.bad_batch else total
        return {"total": total, "ranknet": shown.detach() * 0.25, "lm": total.detach() * 0.75}

    def eval_forward(self, batch, outputs=None):
        return self.forward(batch)

    def update_metric(self, batch, outputs, metric) -> None:
        metric.update(outputs["loss"])


class MeanLoss(MeanMetric):
    """A mean named like a ranking metric."""


# An epoch has four batches of two rows of eight tokens.
def new_run(tmp_path: Path, duration: str = "2ep", loggers=None, **options):
    loggers = [MetricsFile(tmp_path / "run" / "metrics.jsonl")] if loggers is None else loggers
    model = options.pop("model", None) or TwoLosses()
    return new_trainer(model, duration, loggers=loggers, schedulers=LinearScheduler(), **options)


def finish(trainer) -> None:
    trainer.fit()
    trainer.close()


def metrics(tmp_path: Path, event: str = "batch") -> list[dict]:
    return [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["event"] == event]


def test_one_line_per_batch(tmp_path):
    trainer = new_run(tmp_path)
    finish(trainer)
    lines = metrics(tmp_path)
    assert [line["batch"] for line in lines] == list(range(1, 9))
    assert [line["epoch"] for line in lines] == [0] * 4 + [1] * 4
    assert [line["samples"] for line in lines] == list(range(2, 17, 2))
    assert [line["tokens"] for line in lines] == list(range(16, 129, 16))
    for line in lines:
        assert line["loss/train/ranknet"] == pytest.approx(0.25 * line["loss/train/total"])
        assert line["loss/train/lm"] == pytest.approx(0.75 * line["loss/train/total"])
        assert line["tokens_per_second"] == pytest.approx(16 / line["batch_seconds"], rel=1e-3)
        assert not any(name.startswith("time/") for name in line)
    # The rate of the update itself, 1e-2 down to zero over eight; Composer's schedules lag one update behind.
    assert [line["lr"] for line in lines] == pytest.approx([1e-2 * (1 - batch / 8) for batch in (0, *range(7))])


def test_lines_are_flushed_before_the_next_batch(tmp_path):
    seen = []

    class Look(Callback):
        def batch_start(self, state, logger) -> None:
            seen.append([line["batch"] for line in metrics(tmp_path)])

    finish(new_run(tmp_path, "1ep", callbacks=[Look()]))
    assert seen == [[], [1], [1, 2], [1, 2, 3]]


def test_metrics_of_callbacks_are_in_the_line_of_their_batch(tmp_path):
    class Speak(Callback):
        def batch_end(self, state, logger) -> None:
            logger.log_metrics({"mine": torch.tensor(state.timestamp.batch.value), "text": "left out"})

        def epoch_end(self, state, logger) -> None:
            logger.log_metrics({"of the epoch": 1.5})

    finish(new_run(tmp_path, "1ep", callbacks=[Speak()]))
    assert [line["mine"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    (line,) = metrics(tmp_path, "epoch")
    assert (line["batch"], line["epoch"], line["of the epoch"]) == (4, 1, 1.5)


def test_evaluations_have_separate_lines(tmp_path):
    evaluators = [Evaluator(label=name, dataloader=new_loader(4), metric_names=["MeanLoss"]) for name in ("a", "b")]
    trainer = new_run(tmp_path, "2ep", eval_dataloader=evaluators, eval_interval="3ba")
    trainer.eval()
    finish(trainer)
    lines = metrics(tmp_path, "eval")
    assert [line["batch"] for line in lines] == [0, 3, 6, 8]
    for line in lines:
        assert line["metrics/a/MeanLoss"] == line["metrics/b/MeanLoss"] > 0
        assert "loss/train/total" not in line
    assert len(metrics(tmp_path)) == 8


def test_values_that_are_not_finite_are_null_and_named(tmp_path):
    finish(new_run(tmp_path, "1ep", model=TwoLosses(bad_batch=2)))
    lines = metrics(tmp_path)
    assert lines[1]["loss/train/ranknet"] is None
    assert lines[1]["not_finite"] == {"loss/train/ranknet": "nan"}
    assert "not_finite" not in lines[0]

    class Speak(Callback):
        def batch_end(self, state, logger) -> None:
            logger.log_metrics({"up": float("inf"), "down": torch.tensor(-float("inf"))})

    other = tmp_path / "other"
    finish(new_run(other, "1ba", callbacks=[Speak()]))
    assert metrics(other)[0]["not_finite"] == {"up": "inf", "down": "-inf"}


@pytest.mark.parametrize("torn", [b"", b'{"event": "batch", "ba', b'{"event": "batch"}\n', b"\x00" * 40])
@pytest.mark.parametrize("resume_at", [2, 4, 6])
def test_a_resumed_run_continues_the_file(tmp_path, resume_at, torn):
    """Batches 1 to `resume_at` are saved, two more are trained and lost, and the kill may cut the last line short."""
    saved = {"save_folder": str(tmp_path / "checkpoints"), "save_interval": f"{resume_at}ba"}
    killed = new_run(tmp_path, f"{resume_at + 2}ba", **saved)
    finish(killed)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    before = metrics(tmp_path)[:resume_at]
    (checkpoint,) = (tmp_path / "checkpoints").glob(f"ep*-ba{resume_at}-*")
    finish(new_run(tmp_path, "2ep", load_path=str(checkpoint)))
    after = metrics(tmp_path)
    assert after[:resume_at] == before
    assert [line["batch"] for line in after] == list(range(1, 9))
    assert path.read_bytes().count(b"\n") == len(read_metrics(path))


@pytest.mark.parametrize("name", ["ep0-ba4-rank0.pt", "ep1-ba4-rank0.pt"])
def test_an_evaluation_at_the_end_of_an_epoch_is_not_duplicated(tmp_path, name):
    """Whether the checkpoint was saved before that evaluation (ep0) or after it (ep1)."""

    def run(**options):
        evaluator = Evaluator(label="a", dataloader=new_loader(4), metric_names=["MeanLoss"])
        return new_run(tmp_path, "2ep", eval_dataloader=evaluator, eval_interval="1ep", **options)

    save = {"save_folder": str(tmp_path / "checkpoints"), "save_interval": "4ba" if name.startswith("ep0") else "1ep"}
    finish(run(**save))
    finish(run(load_path=str(tmp_path / "checkpoints" / name)))
    assert [line["batch"] for line in metrics(tmp_path, "eval")] == [4, 8]
    assert [line["batch"] for line in metrics(tmp_path)] == list(range(1, 9))


def test_a_new_run_replaces_the_file(tmp_path):
    finish(new_run(tmp_path, "1ep"))
    finish(new_run(tmp_path, "1ba"))
    assert [line["batch"] for line in metrics(tmp_path)] == [1]


def test_only_rank_0_writes_and_prints(tmp_path, monkeypatch):
    monkeypatch.setattr("rankllm_composer.training.progress.dist", SimpleNamespace(get_global_rank=lambda: 1))
    stream = Terminal()
    loggers = [MetricsFile(tmp_path / "m" / "metrics.jsonl"), ProgressLine(StatusLine(stream, tick_seconds=None))]
    finish(new_run(tmp_path, "1ep", loggers=loggers))
    assert not (tmp_path / "m").exists()
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock(Callback):
    """A clock that advances ten seconds per batch."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def after_dataloader(self, state, logger) -> None:
        self.now += 10.0


FIRST = "reading and training the first batch …"


def shown(tmp_path, stream, duration: str = "2ep", callbacks=(), **options) -> str:
    clock = Clock()
    rule = {name: options.pop(name) for name in list(options) if name in ("plain_seconds", "redraw_seconds")}
    line = ProgressLine(StatusLine(stream, clock=clock, tick_seconds=None, **rule))
    finish(new_run(tmp_path, duration, loggers=[line], callbacks=[clock, *callbacks], **options))
    return stream.getvalue()


def test_plain_lines_show_progress(tmp_path):
    first, *lines = shown(tmp_path, io.StringIO(), plain_seconds=0).splitlines()
    assert first == FIRST and len(lines) == 8
    # Two of eight batches took 20 s, so 60 s remain.
    pattern = r"epoch 1/2  batch 2/8  ETA 0:01:00  [\d.]+k? tokens/s  loss [\d.]+  ranknet [\d.]+( .*)?"
    assert re.fullmatch(pattern, lines[1])
    assert re.search(r"epoch 2/2  batch 8/8  ETA 0:00:00 ", lines[-1])
    assert max(map(len, lines)) <= 80


def test_plain_lines_come_at_intervals_and_at_the_ends_of_epochs(tmp_path):
    # The clock advances 10 s per batch: lines for the first batch, after 25 s or more, and for the last of each epoch.
    lines = shown(tmp_path, io.StringIO(), plain_seconds=25).splitlines()[1:]
    assert [int(re.search(r"batch (\d+)", line)[1]) for line in lines] == [1, 4, 7, 8]


def test_a_terminal_has_one_line_redrawn(tmp_path):
    text = shown(tmp_path, Terminal(), redraw_seconds=0)
    assert Counter(text)["\n"] == 1
    assert text.endswith("\n")
    drawn = text.rstrip("\n").split("\r\x1b[K")[1:]
    assert len(drawn) == 9 and drawn[0] == FIRST
    assert all(len(line) < 80 for line in drawn)


def test_lines_fit_narrow_terminals(tmp_path, monkeypatch):
    """Whole parts are left out, from the end."""
    monkeypatch.setenv("COLUMNS", "37")
    drawn = shown(tmp_path, Terminal(), "1ba", redraw_seconds=0).rstrip("\n").split("\r\x1b[K")[1:]
    assert drawn == ["reading and training the first batch", "epoch 1  batch 1/1  ETA 0:00:00"]


def test_ranking_quality_is_shown_once_measured(tmp_path):
    class Measure(Callback):
        def batch_end(self, state, logger) -> None:
            if state.timestamp.batch == 2:
                logger.log_metrics({"eval/first_token/ndcg@10": torch.tensor(0.5), "eval/chance/ndcg@10": 0.1})
            if state.timestamp.batch == 3:
                logger.log_metrics({"eval/generation/ndcg@10": torch.tensor(0.25)})

    lines = shown(tmp_path, io.StringIO(), "1ep", plain_seconds=0, callbacks=[Measure()]).splitlines()[1:]
    found = [re.search(r"tokens/s(?:  (nDCG@10 \S+))?  loss", line) for line in lines]
    assert [match and match[1] for match in found] == [None, *["nDCG@10 0.500"] * 3]  # of the first decoding


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        ("6ba", ["batch 1/6", "ETA 0:00:50"]),
        ("8sp", ["batch 1 ", "ETA 0:00:30"]),
        ("64tok", ["batch 1 ", "ETA 0:00:30"]),
    ],
)
def test_the_eta_works_for_every_unit_of_duration(tmp_path, duration, expected):
    # One reading, 10 s after the start, when one of six, four or four batches is done.
    first = shown(tmp_path, io.StringIO(), duration).splitlines()[1]
    assert all(part in first for part in expected)


def test_the_eta_of_a_resumed_run_counts_from_its_start(tmp_path):
    finish(new_run(tmp_path, "4ba", save_folder=str(tmp_path / "c"), save_interval="4ba"))
    (checkpoint,) = (tmp_path / "c").glob("ep*-ba4-*")
    first = shown(tmp_path, io.StringIO(), "2ep", load_path=str(checkpoint)).splitlines()[1]
    # One of the four batches left took 10 s.
    assert "batch 5/8" in first
    assert "ETA 0:00:30" in first


def test_an_incomplete_last_line_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps({"event": "batch", "batch": 1, "epoch": 0})
    path.write_text(whole + "\n" + whole[:10])
    assert read_metrics(path) == [json.loads(whole)]
