"""The page of a run: what is on it, that it needs nothing else, and how it looks in a browser."""

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
from rankllm_composer.report import COLOURS, ReportError, draw, gains, read_run, write_report

SECRET = "hf_abcdefghijklmnopqrstuvwx"
PICTURES = ["losses", "learning_rate", "throughput", "quality", "gains", "lengths", "positions"]


def write_run(folder: Path, *, slope: float = 1.0, num_batches: int = 20) -> Path:
    """A run whose loss falls by a slope, with two evaluations, and a model that repeats the order it is shown."""
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
    text = "".join(json.dumps(line) + "\n" for line in [details[0], *details])  # a resumed run came by it again
    (folder / "evaluations.jsonl").write_text(text + '{"batch": 99, "ep')
    (folder / "recipe.yaml").write_text(f"run: {{name: <b>x</b>}}\nhf_token: {SECRET}\n")
    return folder


class Page(html.parser.HTMLParser):
    """What a page holds: pictures by id, cells, addresses of anything else."""

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


def has_colour(image: Image.Image, colour: str, least: int = 30) -> bool:
    """Whether so many pixels are about of a colour such as #1f6fb4."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    pixels = np.asarray(image.convert("RGB"), int)
    return int((np.abs(pixels - wanted).max(axis=2) < 12).sum()) >= least


def test_the_page_is_whole_and_alone(tmp_path):
    run = read_run(write_run(tmp_path / "one"), [100, 200, 200, 300])
    drawn = write_report([run], tmp_path / "report.html", tmp_path / "pictures")
    assert drawn == PICTURES
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert list(page.pictures) == PICTURES
    assert page.tags.isdisjoint({"script", "link", "iframe", "b"}) and "http" not in text
    assert SECRET not in text
    cells = dict(page.rows)
    assert cells["batches"] == "20" and cells["tokens"] == "20,000" and cells["data/lists_too_long"] == "2"
    assert cells["loss/train/total"] == "2" and cells["first_token/ndcg@10"] == "0.8000"
    for name in PICTURES:
        saved = Image.open(tmp_path / "pictures" / f"{name}.png")
        assert saved.size == page.pictures[name].size
        assert has_colour(saved, "#ffffff", 10_000)
    assert has_colour(page.pictures["losses"], COLOURS[0])
    assert {path.name for path in tmp_path.iterdir()} == {"one", "report.html", "pictures"}


def test_what_is_drawn_is_what_was_measured(tmp_path):
    run = read_run(write_run(tmp_path / "one"))
    figures = draw([run])
    panels = {panel.get_title(): panel for panel in figures["losses"].axes}
    (line,) = panels["total"].lines
    assert list(line.get_xdata()) == list(range(1, 21))
    assert np.allclose(line.get_ydata(), [3 - batch / 20 for batch in range(1, 21)])
    (line,) = panels["ranking"].lines
    assert np.isnan(line.get_ydata()[4]) and not np.isnan(line.get_ydata()[5])  # a loss that was no number is a gap
    curves = {line.get_label(): line for line in figures["quality"].axes[0].lines}
    assert list(curves["one, first token"].get_ydata()) == [0.4, 0.8]
    assert list(curves["one, generation"].get_xdata()) == [10, 20]
    assert set(curves["one, oracle"].get_ydata()) == {1.0} and set(curves["one, presented"].get_ydata()) == {0.3}
    assert gains(run, "first_token") == pytest.approx([-0.1, 0, 0.1, 0.2])
    heights = [bar.get_height() for bar in figures["gains"].axes[0].patches]
    assert heights == pytest.approx([-0.1, 0, 0.1, 0.2])
    assert figures["gains"].axes[0].get_title() == "one, first token: 2 better, 1 worse"
    assert np.array_equal(figures["positions"].axes[0].images[0].get_array(), np.eye(6))
    assert "lengths" not in figures


def test_runs_side_by_side(tmp_path):
    runs = [read_run(write_run(tmp_path / name, slope=slope)) for name, slope in (("one", 1.0), ("two", 2.0))]
    first, second = draw(runs)["losses"].axes[1].lines
    assert (first.get_label(), first.get_color()) == ("one", COLOURS[0])
    assert (second.get_label(), second.get_color(), second.get_ydata()[-1]) == ("two", COLOURS[1], 1.0)
    write_report(runs, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert page.rows[0] == ["", "one", "two"]
    assert ["loss/train/total", "2", "1"] in page.rows
    assert all(has_colour(page.pictures["losses"], colour) for colour in COLOURS[:2])


def test_a_run_that_has_hardly_begun(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"event": "batch", "batch": 1, "epoch": 0, "tokens": 5, "lr": 0.1}\n{"eve')
    assert write_report([read_run(folder)], tmp_path / "report.html") == ["learning_rate"]


def test_a_folder_without_a_run(tmp_path, capsys):
    with pytest.raises(ReportError, match=r"found no metrics.jsonl, allowed is the folder of a run"):
        read_run(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2 and "found no metrics.jsonl" in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", str(write_run(tmp_path / "one")), "--png", str(tmp_path / "png")])
    assert not ended.value.code
    assert "report.html: losses, learning_rate" in capsys.readouterr().out
    assert (tmp_path / "one" / "report.html").exists() and len(list((tmp_path / "png").iterdir())) == 6


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian package chromium)")
def test_how_it_looks_in_a_browser(tmp_path):
    runs = [read_run(write_run(tmp_path / name, slope=slope)) for name, slope in (("one", 1.0), ("two", 2.0))]
    write_report(runs, tmp_path / "report.html")
    shot = tmp_path / "shot.png"
    options = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,4200"]
    subprocess.run(
        [CHROMIUM, "--headless", *options, f"--screenshot={shot}", (tmp_path / "report.html").as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    picture = Image.open(shot)
    assert picture.size == (1100, 4200)
    assert all(has_colour(picture, colour, 300) for colour in COLOURS[:2])  # both runs' curves
    pixels = np.asarray(picture.convert("RGB"), int)
    yellow = (np.abs(pixels - np.array([253, 231, 37])).max(axis=2) < 12).sum()  # viridis: the top of its scale
    purple = (np.abs(pixels - np.array([68, 1, 84])).max(axis=2) < 12).sum()  # and its bottom
    assert 3 < purple / yellow < 7  # six bright squares on the diagonal of thirty-six, for two runs
    dark_rows = np.flatnonzero((pixels.sum(axis=2) < 200).sum(axis=1) > 5)
    assert dark_rows.min() < 100 and dark_rows.max() > 2000  # text from the headline to the recipes
