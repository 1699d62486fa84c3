"""The report: what is on the page, what its pictures show, and how it looks in a browser."""

from __future__ import annotations

import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rankllm_composer.cli import main
from rankllm_composer.errors import RunError
from rankllm_composer.ranking.comparison import RerankResult, compare_runs, read_rerank_result, write_rerank_result
from rankllm_composer.report.headline import headlines
from rankllm_composer.report.page import write_report
from rankllm_composer.report.pictures import COLORS, draw, running_mean, window_gains
from rankllm_composer.report.run_record import read_run, with_reranked
from rankllm_composer.report.wording import amount, duration, metric_name

SECRET = "hf_" + "a" * 30
PICTURES = ["quality", "windows", "positions", "losses", "learning_rate", "throughput", "lengths"]


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
    objective = "objective: {name: combined, ranking_loss: ranknet, ranking_loss_options: {weighted: true}}"
    (folder / "recipe.yaml").write_text(f"run: {{name: <b>x</b>}}\n{objective}\nhf_token: {SECRET}\n")
    start = {"event": "start", "time": "2026-11-27T23:30:00+00:00", "batch": 0, "ranks": 8, "machine": "8 × H100"}
    start |= {"model": "a/base", "data": ["a/lists[train]"], "lists_per_epoch": 40, "parameters": 7_000_000_000}
    start |= {
        "trained_parameters": 2_000_000,
        "versions": {"torch": "2.7.0"},
        "published": {"dl20-bm25/nDCG@10": 0.7043},
    }
    lengths, end = (
        {"event": "lengths", "tokens": [100, 200, 200, 300]},
        {"event": "end", "time": "2026-11-28T00:40:00+00:00"},
    )
    (folder / "history.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in (start, lengths, end)) + '{"event'
    )
    return folder


class Page(html.parser.HTMLParser):
    """Content of a page: pictures by section, table rows, tags, text, and the values that show when pointed at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.titles: list[str] = []
        self.values: list[str] = []
        self.text = ""
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self._tag = tag
        if tag == "figure" and dict(attrs)["class"] not in self.pictures:
            self.pictures.append(dict(attrs)["class"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self._tag in ("th", "td"):
            self.rows[-1][-1] += data
        elif self._tag in ("title", "figcaption"):
            (self.values if self._tag == "title" else self.titles).append(data)
        if self._tag not in ("style", "script", "title"):
            self.text += data

    def handle_endtag(self, tag):
        if tag in ("th", "td", "title", "figcaption", "style", "script"):
            self._tag = ""


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_page_is_complete_and_self_contained(tmp_path):
    run = read_run(write_run(tmp_path / "one"))
    drawn = write_report([run], tmp_path / "report.html", tmp_path / "pictures")
    assert drawn == PICTURES
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.pictures == PICTURES
    assert page.tags.isdisjoint({"link", "iframe", "b", "img", "image"}) and text.count("<script>") == 1
    links = set(re.findall(r"https?://[^\s\"]+", text))
    assert links <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}  # names, not places
    assert '<meta name="viewport" content="width=device-width' in text and SECRET not in text
    cells = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert cells["Model"] == "a/base, 7 B parameters, 2 M of them trained"
    assert cells["Data"] == "a/lists[train]; 40 lists per epoch"
    assert cells["Objective"] == "combined, with ranknet (weighted=True)"
    assert (
        cells["Trained"] == "20 batches, 20 k tokens" and cells["Lists left out as too long in the last epoch"] == "2"
    )
    assert (cells["Machine"], cells["Versions"]) == ("8 × H100; 8 ranks", "torch 2.7.0")
    assert (cells["Started"], cells["Duration"]) == ("27 November 2026, 23:30 UTC", "1 h 10 min")
    assert cells["Total loss"] == "2" and cells["nDCG@10, first-token decoding"] == "0.8000"
    assert ["first-token decoding", "q3 +0.200, q2 +0.100", "q0 -0.100"] in page.rows
    assert ["generated answers", "none", "q0 -0.100, q1 -0.100, q2 -0.100"] in page.rows
    assert len(page.titles) == len(set(page.titles)) == 9  # one title per panel
    for value in ("batch 20 · 2", "batch 10 · first-token decoding 0.4000 · generated answers 0.2000"):
        assert value in page.values
    assert "presented 3 → ranked 3: 100%" in page.values and "window q3 (+0.200)" in page.values
    assert "about 297 · 1 list" in page.values
    saved = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {"quality.png", "losses-1.png", "losses-2.png", "windows-2.png"} <= saved and len(saved) == 9
    for path in (tmp_path / "pictures").iterdir():
        assert has_color(Image.open(path), "#ffffff", 10_000), path
    assert has_color(Image.open(tmp_path / "pictures" / "losses-1.png"), COLORS[0])
    assert {path.name for path in tmp_path.iterdir()} == {"one", "report.html", "pictures"}


def has_color(image: Image.Image, color: str, minimum: int = 30) -> bool:
    """Whether at least `minimum` pixels have about the given color, such as #1f6fb4."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    pixels = np.asarray(image.convert("RGB"), int)
    return int((np.abs(pixels - wanted).max(axis=2) < 12).sum()) >= minimum


def axes_of(panels, title):
    (axes,) = next(panel.figure.axes for panel in panels if panel.title.startswith(title))
    return axes


def test_starts_and_batches_are_counted(tmp_path):
    folder = write_run(tmp_path / "one")
    start, *others = (folder / "history.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    for starts, resumed in ((2, "resumed 1 time"), (3, "resumed 2 times")):
        (folder / "history.jsonl").write_text("".join([start] * starts + others))
        write_report([read_run(folder)], tmp_path / "report.html")
        cells = {row[0]: row[1] for row in Page((tmp_path / "report.html").read_text()).rows if len(row) == 2}
        assert cells["Started"] == f"27 November 2026, 23:30 UTC; {resumed}"
        assert cells["Trained"].startswith("1 batch, ")


def test_pictures_show_the_metrics(tmp_path):
    run = read_run(write_run(tmp_path / "one"))
    drawn = draw([run])
    assert [panel.title for panel in drawn["losses"]] == ["Total loss", "Ranking loss"]
    (line,) = axes_of(drawn["losses"], "Total").lines
    assert list(line.get_xdata()) == list(range(1, 21))
    assert np.allclose(line.get_ydata(), [3 - batch / 20 for batch in range(1, 21)])
    (line,) = axes_of(drawn["losses"], "Ranking").lines
    assert np.isnan(line.get_ydata()[4]) and not np.isnan(line.get_ydata()[5])  # NaN is a gap
    axes = axes_of(drawn["quality"], "nDCG@10")
    curves = {line.get_label(): line for line in axes.lines}
    assert list(curves["one, first-token decoding"].get_ydata()) == [0.4, 0.8]
    assert list(curves["one, generated answers"].get_xdata()) == [10, 20]
    bounds = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert bounds == {"first stage": 0.3, "best possible": 1.0}
    assert [name for name, _ in window_gains(run, "first_token")] == ["q0", "q1", "q2", "q3"]
    assert [gain for _, gain in window_gains(run, "first_token")] == pytest.approx([-0.1, 0, 0.1, 0.2])
    better, worse = (stairs.get_data().values for stairs in axes_of(drawn["windows"], "First").patches)
    assert better + worse == pytest.approx([-0.1, 0, 0.1, 0.2])
    assert drawn["windows"][0].title == "First-token decoding: 2 better, 1 worse of 4"
    (mesh,) = axes_of(drawn["positions"], "First").collections
    assert np.allclose(mesh.get_array()[..., 3], np.eye(6))


def test_two_runs_share_pictures_and_tables(tmp_path):
    runs = [read_run(write_run(tmp_path / name, slope=slope)) for name, slope in (("one", 1.0), ("two", 2.0))]
    drawn = draw(runs)
    first, second = axes_of(drawn["losses"], "Total").lines
    assert (first.get_label(), first.get_color()) == ("one", COLORS[0])
    assert (second.get_label(), second.get_color(), second.get_ydata()[-1]) == ("two", COLORS[1], 1.0)
    assert "one, First-token"[:5] == drawn["windows"][0].title[:5]
    write_report(runs, tmp_path / "report.html")
    page = read_page(tmp_path / "report.html")
    assert ["", "one", "two"] in page.rows and ["Total loss", "2", "1"] in page.rows
    assert "batch 20 · one 2 · two 1" in page.values


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
    assert ["Kendall's τ, first-token decoding", "0.8000"] in read_page(tmp_path / "report.html").rows


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
    assert "report.html: quality, windows, positions" in capsys.readouterr().out
    assert (tmp_path / "one" / "report.html").exists() and len(list((tmp_path / "png").iterdir())) == 9


def rerank_result(folder: Path, name: str = "dl20-bm25", model: str | None = None) -> RerankResult:
    """Three queries: one gains, one loses, one does not change."""
    first = {"a": ["x", "y"], "b": ["y", "x"], "c": ["y", "x"]}
    second = {"a": ["y", "x"], "b": ["y", "x"], "c": ["x", "y"]}
    rows = compare_runs(first, second, {qid: {"y": 1} for qid in first}, ["nDCG@10"])
    return RerankResult(name, model or str(folder / "hf" / "epoch_2"), "first_token", tuple(rows))


def test_reranking_results_are_compared_with_published_ones(tmp_path, capsys):
    for name in ("one", "two"):
        write_run(tmp_path / name)
    write_rerank_result(tmp_path / "out.figures.json", rerank_result(tmp_path / "one"))
    again = read_rerank_result(tmp_path / "out.figures.json")
    assert again == rerank_result(tmp_path / "one")
    lost = 1 / np.log2(3)
    assert again.figures() == {"dl20-bm25/nDCG@10": pytest.approx((2 + lost) / 3)}
    with pytest.raises(SystemExit) as ended:
        main(
            ["report", *(str(tmp_path / name) for name in ("one", "two")), "--reranked", f"{tmp_path}/out.figures.json"]
        )
    assert not ended.value.code and "report.html: gains" in capsys.readouterr().out
    page = read_page(tmp_path / "one" / "report.html")
    mean = f"{(2 + lost) / 3:.4f}"
    assert ["dl20-bm25/nDCG@10", "one", mean, "0.7043", "above"] in page.rows
    assert ["dl20-bm25/nDCG@10", "two", "–", "0.7043", "not measured"] in page.rows
    cells = [f"{mean} → {mean}", "+0.0000", "1/1/1", "1.000"]
    assert ["dl20-bm25, nDCG@10", "one, epoch_2, first-token decoding", *cells] in page.rows
    runs = [read_run(tmp_path / name) for name in ("one", "two")]
    folders = [tmp_path / "one", tmp_path / "two"]
    (panel,) = draw(with_reranked(runs, folders, [again]))["gains"]
    better, worse = (stairs.get_data().values for stairs in panel.figure.axes[0].patches)
    assert better + worse == pytest.approx([lost - 1, 0, 1 - lost])
    assert panel.areas[0].text == f"query c: 1.000 → {lost:.3f} ({lost - 1:+.3f})"
    elsewhere = rerank_result(tmp_path / "three")
    with pytest.raises(RunError, match=r"dl20-bm25 contains results of the model .*three/hf/epoch_2; expected"):
        with_reranked(runs, folders, [elsewhere])
    assert with_reranked(runs[:1], folders[:1], [elsewhere])[0].reranked == (elsewhere,)  # the model was moved
    (tmp_path / "bad.json").write_text('{"name": "x"}')
    with pytest.raises(RunError, match=r"bad.json is not the result of a reranking"):
        read_rerank_result(tmp_path / "bad.json")


def test_results_in_the_folder_of_a_run_are_found_also_in_a_copy(tmp_path):
    folder = write_run(tmp_path / "one")
    (folder / "reranked" / "deep").mkdir(parents=True)
    for place, name, model in (
        ("b.trec", "dl20-bm25", "/gone/one/hf/epoch_10"),
        ("a.trec", "dl20-bm25", "/gone/one/hf/epoch_9"),
        ("untrained.trec", "dl20-bm25", "/gone/one/untrained"),
        ("reranked/deep/c.trec", "dl19-bm25", "/gone/one/hf/epoch_9"),
    ):
        write_rerank_result(folder / f"{place}.figures.json", rerank_result(Path("/x"), name, model))
    (folder / "damaged.figures.json").write_text("{")
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    run = read_run(tmp_path / "copy")
    assert len(run.reranked) == 4 and run.num_damaged == 1
    assert [(one.where, one.model) for one in headlines(run)] == [
        ("dl20-bm25, 3 queries", "epoch_10, first-token decoding"),
        ("dl19-bm25, 3 queries", "epoch_9, first-token decoding"),
    ]
    (tmp_path / "copy" / "hf" / "epoch_9").mkdir(parents=True)
    (tmp_path / "copy" / "hf" / "best").symlink_to("epoch_9")  # chosen on held-out windows
    assert headlines(read_run(tmp_path / "copy"))[0].model == "epoch_9, first-token decoding"
    write_report([run], tmp_path / "report.html")
    page = read_page(tmp_path / "report.html")
    mean = (2 + 1 / np.log2(3)) / 3
    assert re.search(rf"nDCG@10 on dl20-bm25, 3 queries\s*{mean:.3f} → {mean:.3f}", page.text)
    assert f"<strong>{mean:.3f}</strong>" in (tmp_path / "report.html").read_text()
    assert "1 better, 1 equal, 1 worse; p = 1.000" in page.text
    assert "dl20-bm25, epoch_10, first-token decoding: 1 better, 1 worse of 3" in page.titles


def test_without_reranking_the_top_shows_the_held_out_windows(tmp_path):
    write_report([read_run(write_run(tmp_path / "one"))], tmp_path / "report.html")
    page = read_page(tmp_path / "report.html")
    assert re.search(r"nDCG@10 on 4 held-out windows\s*0.500 → 0.550", page.text)
    (tmp_path / "one" / "evaluations.jsonl").unlink()
    write_report([read_run(tmp_path / "one")], tmp_path / "report.html")
    assert "No ranking was measured." in read_page(tmp_path / "report.html").text


def test_durations_and_names_are_for_people():
    assert [duration(seconds) for seconds in (20, 119, 4200, 90_000)] == ["20 s", "2 min", "1 h 10 min", "1.0 days"]
    assert [amount(number) for number in (12, 135_000_000, 7.25e9)] == ["12", "135 M", "7.25 B"]
    assert metric_name("generation/malformed") == "answers that deviate from the format, generated answers"
    assert metric_name("mine/x") == "mine/x"


def test_runs_with_the_same_name_are_numbered(tmp_path):
    runs = [read_run(write_run(tmp_path / place / "run")) for place in ("a", "b")]
    write_report(runs, tmp_path / "report.html")
    assert ["", "run (1)", "run (2)"] in read_page(tmp_path / "report.html").rows


def test_running_mean_keeps_gaps():
    values = np.array([1.0, 2.0, np.nan, 4.0, 100.0])
    mean = running_mean(values, 3)
    assert np.isnan(mean[2])
    assert mean[[0, 1, 3, 4]].tolist() == [1.5, 1.5, 52.0, 52.0]
    assert np.array_equal(running_mean(values, 0), values, equal_nan=True)


def test_long_runs_are_drawn_with_their_running_mean(tmp_path):
    panels = draw([read_run(write_run(tmp_path / "one", num_batches=200))])["losses"]
    raw, mean = axes_of(panels, "Total").lines
    assert len(raw.get_ydata()) == len(mean.get_ydata()) == 200 and raw.get_alpha() == 0.3
    assert mean.get_ydata()[100] == pytest.approx(raw.get_ydata()[96:105].mean(), rel=1e-9)
    assert len(panels[0].areas) == 120  # of 200 batches


WIDTHS = (1280, 390)
HEIGHT = 3000
INK = {"light": "#1c2430", "dark": "#e6ebf1"}
PAPER = {"light": "#ffffff", "dark": "#11161d"}
FIRST_RUN = {"light": "#1f6fb4", "dark": "#6cb4f5"}
SECOND_RUN = {"light": "#c4560a", "dark": "#f5a05a"}


def run_chromium(folder: Path, page: Path, *options: str) -> str:
    """Open a page in the browser, which `make test` installs if it is root; return its standard output."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs Chromium, which is not on this machine: apt-get install chromium (as root `make test` does)")
    common = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    common += [f"--disable-{name}" for name in ("quic", "background-networking", "component-update", "sync")]
    common += [f"--user-data-dir={folder / 'browser'}", f"--window-size={sum(WIDTHS)},{HEIGHT}"]
    environment = {"HOME": str(folder), "PATH": "/usr/bin:/bin"}
    command = [browser, "--headless", *common, *options, page.as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=environment)
    return done.stdout


def pixels_near(pixels: np.ndarray, color: str) -> np.ndarray:
    """(height, width) bool: pixels of about a color."""
    return np.abs(pixels - np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])).max(axis=2) < 12


def test_page_in_a_browser(tmp_path):
    """At the width of a desktop and of a phone, in light and dark: read, wide enough, and nothing cut."""
    runs = []
    for name, slope in (("one", 1.0), ("two", 2.0)):
        folder = write_run(tmp_path / name, slope=slope)
        write_rerank_result(folder / "x.figures.json", rerank_result(folder, "a-long-name-of-a-set-of-queries" * 2))
        runs.append(read_run(folder))
    write_report(runs, tmp_path / "report.html")
    content = html.escape((tmp_path / "report.html").read_text())
    frames = [f'<iframe width="{width}" height="{HEIGHT}" srcdoc="{content}"></iframe>' for width in WIDTHS]
    measure = """<script>onload = () => {
        document.title = [...document.querySelectorAll("iframe")].map(frame => {
            let page = frame.contentDocument.documentElement;
            let parts = [...page.querySelectorAll("h1,.card,figure,.scroll,p")];
            let right = Math.max(...parts.map(part => part.getBoundingClientRect().right));
            return [page.scrollWidth, right, page.scrollHeight];
        }).join(";");
    }</script>"""
    style = "<style>:root{color-scheme:light dark}body{margin:0;display:flex}iframe{border:0;flex:none}</style>"
    frame_page = tmp_path / "frames.html"
    frame_page.write_text(f'<meta charset="utf-8"><title></title>{style}{"".join(frames)}{measure}')
    dumped = run_chromium(tmp_path, frame_page, "--dump-dom")
    measured = [
        tuple(map(float, one.split(","))) for one in dumped.partition("<title>")[2].partition("<")[0].split(";")
    ]
    for width, (scrolled, rightmost, height) in zip(WIDTHS, measured, strict=True):
        assert scrolled == width and rightmost <= width  # wide tables scroll by themselves
        assert height > 2000
    for scheme, option in (("light", "1"), ("dark", "0")):
        shot = tmp_path / f"{scheme}.png"
        run_chromium(tmp_path, frame_page, f"--blink-settings=preferredColorScheme={option}", f"--screenshot={shot}")
        picture = np.asarray(Image.open(shot).convert("RGB"), int)
        assert picture.shape[:2] == (HEIGHT, sum(WIDTHS))
        desktop, phone = picture[:, : WIDTHS[0]], picture[:, WIDTHS[0] :]
        for part, margin in ((desktop, 60), (phone, 10)):
            paper, ink = pixels_near(part, PAPER[scheme]), pixels_near(part, INK[scheme])
            assert paper[:, :margin].all() and paper[:, -margin:].all()  # nothing reaches the edges
            assert paper.mean() > 0.6
            rows = np.flatnonzero(ink.any(axis=1))
            assert rows.min() < 120 and rows.max() > 2000  # text from the headline down
            assert ink[:500].sum() > 500  # the figures at the top are large and bold
            for color in (FIRST_RUN, SECOND_RUN):
                assert pixels_near(part, color[scheme]).sum() > 1000
