"""The report: its content, that it needs no other file, and how it looks in a browser."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rankllm_composer.cli import main
from rankllm_composer.errors import RunError
from rankllm_composer.ranking.comparison import RerankResult, compare_runs, read_rerank_result, write_rerank_result
from rankllm_composer.report.page import write_report
from rankllm_composer.report.pictures import COLORS, draw, gains, running_mean
from rankllm_composer.report.run_record import read_run, with_reranked

SECRET = "hf_abcdefghijklmnopqrstuvwx"
PICTURES = ["quality", "gains", "positions", "losses", "learning_rate", "throughput", "lengths"]


def write_run(folder: Path, *, slope: float = 1.0, num_batches: int = 20) -> Path:
    """Write a run whose loss falls linearly, with two evaluations of a model that repeats the presented order."""
    folder.mkdir(parents=True)
    lines, details = [], []
    for batch in range(1, num_batches + 1):
        line = {
            "event": "batch",
            "batch": batch,
            "epoch": 0,
            "tokens": 1000 * batch,
            "lr": 1e-3 * batch,
            "tokens_per_second": 500.0 + batch,
            "loss/train/total": 3.0 - slope * batch / num_batches,
            "loss/train/ranking": None if batch == 5 else 0.5,
            "data/lists_trained": 4 * batch,
            "data/lists_too_long": 2,
        }
        if batch % 10 == 0:
            figures = {"first_token/ndcg@10": 0.04 * batch, "generation/ndcg@10": 0.02 * batch}
            line |= {f"eval/{name}": value for name, value in figures.items()}
            line |= {"eval/presented/ndcg@10": 0.3, "eval/oracle/ndcg@10": 1.0}
            windows = {
                f"q{k}": {"presented": 0.5, "first_token": 0.5 + 0.1 * (k - 1), "generation": 0.4} for k in range(4)
            }
            positions = {"first_token": (10 * np.eye(6, dtype=int)).tolist()}
            details.append({"batch": batch, "epoch": 0, "ndcg@10": {**windows, "x": {}}, "positions": positions})
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = "".join(json.dumps(line) + "\n" for line in [details[0], *details])  # a resumed run evaluated it again
    (folder / "evaluations.jsonl").write_text(text + '{"batch": 99, "ep')
    (folder / "recipe.yaml").write_text(f"run: {{name: <b>x</b>}}\nhf_token: {SECRET}\n")
    return folder


class Page(html.parser.HTMLParser):
    """Content of a page: images by id, table rows, tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: dict[str, Image.Image] = {}
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        given = dict(attrs)
        if tag == "img":
            kind, _, content = given["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.pictures[given["id"]] = Image.open(io.BytesIO(base64.b64decode(content)))
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("th", "td")
        if self._in_cell:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self._in_cell = False


def has_color(image: Image.Image, color: str, minimum: int = 30) -> bool:
    """Whether at least `minimum` pixels have about the given color, such as #1f6fb4."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    pixels = np.asarray(image.convert("RGB"), int)
    return int((np.abs(pixels - wanted).max(axis=2) < 12).sum()) >= minimum


def test_page_is_complete_and_self_contained(tmp_path):
    run = read_run(write_run(tmp_path / "one"), [100, 200, 200, 300])
    drawn = write_report([run], tmp_path / "report.html", tmp_path / "pictures")
    assert drawn == PICTURES
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert list(page.pictures) == PICTURES
    assert page.tags.isdisjoint({"script", "link", "iframe", "b"}) and "http" not in text
    assert SECRET not in text
    cells = {row[0]: row[1] for row in page.rows}
    assert cells["batches"] == "20" and cells["tokens"] == "20,000" and cells["data/lists_too_long"] == "2"
    assert cells["loss/train/total"] == "2" and cells["first_token/ndcg@10"] == "0.8000"
    assert ["one, first token", "q3 +0.200, q2 +0.100", "q0 -0.100"] in page.rows
    assert ["one, generation", "none", "q0 -0.100, q1 -0.100, q2 -0.100"] in page.rows
    for name in PICTURES:
        saved = Image.open(tmp_path / "pictures" / f"{name}.png")
        assert saved.size == page.pictures[name].size
        assert has_color(saved, "#ffffff", 10_000)
    assert has_color(page.pictures["losses"], COLORS[0])
    assert {path.name for path in tmp_path.iterdir()} == {"one", "report.html", "pictures"}


def test_figures_show_the_metrics(tmp_path):
    run = read_run(write_run(tmp_path / "one"))
    figures = draw([run])
    panels = {panel.get_title(): panel for panel in figures["losses"].axes}
    (line,) = panels["total"].lines
    assert list(line.get_xdata()) == list(range(1, 21))
    assert np.allclose(line.get_ydata(), [3 - batch / 20 for batch in range(1, 21)])
    (line,) = panels["ranking"].lines
    assert np.isnan(line.get_ydata()[4]) and not np.isnan(line.get_ydata()[5])  # NaN is a gap
    curves = {line.get_label(): line for line in figures["quality"].axes[0].lines}
    assert list(curves["one, first token"].get_ydata()) == [0.4, 0.8]
    assert list(curves["one, generation"].get_xdata()) == [10, 20]
    assert set(curves["oracle"].get_ydata()) == {1.0} and set(curves["presented"].get_ydata()) == {0.3}
    assert [name for name, _ in gains(run, "first_token")] == ["q0", "q1", "q2", "q3"]
    assert [gain for _, gain in gains(run, "first_token")] == pytest.approx([-0.1, 0, 0.1, 0.2])
    heights = [bar.get_height() for bar in figures["gains"].axes[0].patches]
    assert heights == pytest.approx([-0.1, 0, 0.1, 0.2])
    assert figures["gains"].axes[0].get_title() == "one, first token\n2 better, 1 worse of 4"
    assert np.array_equal(figures["positions"].axes[0].images[0].get_array(), np.eye(6))
    assert "lengths" not in figures


def test_two_runs_share_figures_and_tables(tmp_path):
    runs = [read_run(write_run(tmp_path / name, slope=slope)) for name, slope in (("one", 1.0), ("two", 2.0))]
    pictures = draw(runs)
    first, second = pictures["losses"].axes[1].lines
    quality = {line.get_label(): line for line in pictures["quality"].axes[0].lines}
    assert "presented" in quality and "one, presented" not in quality  # the same windows, so one line for both
    assert quality["two, generation"].get_color() == COLORS[1]
    assert (first.get_label(), first.get_color()) == ("one", COLORS[0])
    assert (second.get_label(), second.get_color(), second.get_ydata()[-1]) == ("two", COLORS[1], 1.0)
    write_report(runs, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert page.rows[0] == ["Training", "one", "two"]
    assert ["loss/train/total", "2", "1"] in page.rows
    assert all(has_color(page.pictures["losses"], color) for color in COLORS[:2])


def test_run_with_one_batch(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"event": "batch", "batch": 1, "epoch": 0, "tokens": 5, "lr": 0.1}\n{"eve')
    assert write_report([read_run(folder)], tmp_path / "report.html") == ["learning_rate"]


def test_windows_without_judgments_have_a_table_but_no_curve(tmp_path):
    folder = write_run(tmp_path / "one")
    text = (folder / "metrics.jsonl").read_text().replace("/ndcg@10", "/tau").replace("eval/presented/tau", "x")
    (folder / "metrics.jsonl").write_text(text)
    assert "quality" not in write_report([read_run(folder)], tmp_path / "report.html")
    assert ["first_token/tau", "0.8000"] in Page((tmp_path / "report.html").read_text()).rows


def test_folder_without_a_run_is_an_error(tmp_path, capsys):
    with pytest.raises(RunError, match=r"contains no metrics.jsonl; expected the folder of a training run"):
        read_run(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2 and "contains no metrics.jsonl" in capsys.readouterr().err


def test_report_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", str(write_run(tmp_path / "one")), "--png", str(tmp_path / "png")])
    assert not ended.value.code
    assert "report.html: quality, gains, positions" in capsys.readouterr().out
    assert (tmp_path / "one" / "report.html").exists() and len(list((tmp_path / "png").iterdir())) == 6


def rerank_result(folder: Path, name: str = "dl20-bm25") -> RerankResult:
    """Three queries: one gains, one loses, one does not change."""
    first = {"a": ["x", "y"], "b": ["y", "x"], "c": ["y", "x"]}
    second = {"a": ["y", "x"], "b": ["y", "x"], "c": ["x", "y"]}
    rows = compare_runs(first, second, {qid: {"y": 1} for qid in first}, ["nDCG@10"])
    return RerankResult(name, str(folder / "hf" / "epoch_2"), "first_token", tuple(rows))


def test_reranking_results_are_compared_with_published_ones(tmp_path, capsys):
    for name in ("one", "two"):
        folder = write_run(tmp_path / name)
        (folder / "recipe.yaml").write_text("run: {name: first_mistral}\n")
    write_rerank_result(tmp_path / "out.figures.json", rerank_result(tmp_path / "one"))
    again = read_rerank_result(tmp_path / "out.figures.json")
    assert again == rerank_result(tmp_path / "one")
    lost = 1 / np.log2(3)
    assert again.figures() == {"dl20-bm25/nDCG@10": pytest.approx((2 + lost) / 3)}
    with pytest.raises(SystemExit) as ended:
        main(
            ["report", *(str(tmp_path / name) for name in ("one", "two")), "--reranked", f"{tmp_path}/out.figures.json"]
        )
    assert not ended.value.code and "reranked" in capsys.readouterr().out
    page = Page((tmp_path / "one" / "report.html").read_text())
    mean = f"{(2 + lost) / 3:.4f}"
    assert ["dl20-bm25/nDCG@10", "one", mean, "0.7043", "above"] in page.rows
    assert ["dl20-bm25/nDCG@10", "two", "–", "0.7043", "not measured"] in page.rows
    cells = [f"{mean} → {mean}", "+0.0000", "1/1/1", "1.000"]
    assert ["dl20-bm25/nDCG@10", "one, epoch_2, first token", *cells] in page.rows
    runs = [read_run(tmp_path / name) for name in ("one", "two")]
    folders = [tmp_path / "one", tmp_path / "two"]
    heights = [bar.get_height() for bar in draw(with_reranked(runs, folders, [again]))["reranked"].axes[0].patches]
    assert heights == pytest.approx([lost - 1, 0, 1 - lost])
    elsewhere = rerank_result(tmp_path / "three")
    with pytest.raises(RunError, match=r"dl20-bm25 contains results of the model .*three/hf/epoch_2; expected"):
        with_reranked(runs, folders, [elsewhere])
    assert with_reranked(runs[:1], folders[:1], [elsewhere])[0].reranked == (elsewhere,)  # the model was moved
    (tmp_path / "bad.json").write_text('{"name": "x"}')
    with pytest.raises(RunError, match=r"bad.json is not the result of a reranking"):
        read_rerank_result(tmp_path / "bad.json")


def test_runs_with_the_same_name_are_numbered(tmp_path):
    runs = [read_run(write_run(tmp_path / place / "run")) for place in ("a", "b")]
    write_report(runs, tmp_path / "report.html")
    assert Page((tmp_path / "report.html").read_text()).rows[0] == ["Training", "run (1)", "run (2)"]


def test_running_mean_keeps_gaps():
    values = np.array([1.0, 2.0, np.nan, 4.0, 100.0])
    mean = running_mean(values, 3)
    assert np.isnan(mean[2])
    assert mean[[0, 1, 3, 4]].tolist() == [1.5, 1.5, 52.0, 52.0]
    assert np.array_equal(running_mean(values, 0), values, equal_nan=True)


def test_long_runs_are_drawn_with_their_running_mean(tmp_path):
    figure = draw([read_run(write_run(tmp_path / "one", num_batches=200))])["losses"]
    raw, mean = next(panel for panel in figure.axes if panel.get_title() == "total").lines
    assert len(raw.get_ydata()) == len(mean.get_ydata()) == 200 and raw.get_alpha() == 0.3
    assert mean.get_ydata()[100] == pytest.approx(raw.get_ydata()[96:105].mean(), rel=1e-9)


def chromium() -> str:
    """Path of the browser, which `make test` installs if it is root."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    assert found, "needs Chromium, which is not on this machine: apt-get install chromium (as root `make test` does it)"
    return found


def solid(pixels: np.ndarray, color: str, size: int = 9) -> np.ndarray:
    """(height, width) bool: pixels inside squares of one color, wider than any line."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    filled = np.abs(pixels - wanted).max(axis=2) < 12
    for combine in (np.all, np.any):  # erode, then dilate
        for axis in (0, 1):
            filled = combine([np.roll(filled, shift, axis) for shift in range(-(size // 2), size // 2 + 1)], axis=0)
    return filled


def test_page_in_a_browser(tmp_path):
    runs = [read_run(write_run(tmp_path / name, slope=slope)) for name, slope in (("one", 1.0), ("two", 2.0))]
    write_report(runs, tmp_path / "report.html")
    shot = tmp_path / "shot.png"
    options = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,3600", "--no-first-run"]
    options += [f"--disable-{name}" for name in ("quic", "background-networking", "component-update", "sync")]
    options += [f"--user-data-dir={tmp_path / 'browser'}", f"--screenshot={shot}"]
    subprocess.run(
        [chromium(), "--headless", *options, (tmp_path / "report.html").as_uri()],
        check=True,
        capture_output=True,
        timeout=300,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    picture = Image.open(shot)
    assert picture.size == (1100, 3600)
    assert all(has_color(picture, color, 300) for color in COLORS[:2])  # both runs' curves
    pixels = np.asarray(picture.convert("RGB"), int)
    yellow = (np.abs(pixels - np.array([253, 231, 37])).max(axis=2) < 12).sum()  # viridis: the top of its scale
    purple = (np.abs(pixels - np.array([68, 1, 84])).max(axis=2) < 12).sum()  # and its bottom
    assert yellow > 2000 and 3 < purple / yellow < 7  # six bright squares on the diagonal of thirty-six, for two runs
    bars = solid(pixels, COLORS[0])
    left, right = bars[:, :520], bars[:, 520:]  # the first run's gains by first token, -0.1 … 0.2, and generation, -0.1
    assert np.ptp(np.flatnonzero(left.any(axis=1))) / np.ptp(np.flatnonzero(right.any(axis=1))) == pytest.approx(
        3, rel=0.1
    )
    assert left.sum() / right.sum() == pytest.approx(1, rel=0.1)  # 0.1 + 0.1 + 0.2 as high as four times 0.1
    dark_rows = np.flatnonzero((pixels.sum(axis=2) < 200).sum(axis=1) > 5)
    assert dark_rows.min() < 100 and dark_rows.max() > 2000  # text from the headline to the recipes
    assert (pixels[:, 1080:] == 255).all()  # nothing is wider than the page
