"""The check on one GPU, at toy sizes on the CPU: every section, what its tables say, and cases that fail."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "benchmarks"


@pytest.fixture()
def in_process(benchmark, monkeypatch):
    """Return gpu.py, with its cases in this process, where libraries are loaded."""
    gpu, cases = benchmark("gpu"), benchmark("gpu_cases")

    def run(modules, setting, finished, deadline, keep):
        cases.run_cases(modules, setting, finished, deadline, lambda message: "case" in message and keep(message))

    monkeypatch.setattr(gpu, "supervise", run)
    return gpu


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Read the tables of a section: heading → rows."""
    found = {}
    for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        title, *lines = part.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        found[title] = [dict(zip(rows[0], row)) for row in rows[2:]]
    return found


def measure(gpu, folder: Path, sections: str) -> dict[str, list[dict[str, str]]]:
    """Run sections at toy sizes and return the tables of the results."""
    results, handler = folder / "RESULTS.md", signal.getsignal(signal.SIGTERM)
    arguments = ["--device", "cpu", "--reduced", "--output", str(results), "--folder", str(folder / "gpu")]
    assert gpu.main([*arguments, "--only", sections]) == 0
    assert signal.getsignal(signal.SIGTERM) == handler
    text = results.read_text()
    assert "<!-- gpu -->\n## How fast" in text and "Failed or skipped" not in text
    assert re.search(r"^card: CPU; cores: \d+; Python: 3[.\d]+; torch: \S+; .*; \d{4}-\d\d-\d\d; \d+ s", text, re.M)
    found = tables(text)
    assert list(found) == [title for name, title in gpu.TITLES.items() if name in sections.split(",")]
    return found


@pytest.mark.slow
def test_correctness_waits_and_compiled_layers(in_process, tmp_path):
    attention, step, waits, compiled = measure(in_process, tmp_path, "attention,step,waits,compile").values()
    assert [row["case"].split(",")[0] for row in attention] == ["packed_sdpa"] * 4
    assert all(0 < float(row[part]) < 0.01 for row in attention for part in ("output", "query gradient"))
    assert [row["change of other lists"] for row in step] == ["0", "0"]
    assert len(waits) == 2 and all(0 < int(row["waits per step"]) <= int(row["layers"]) for row in waits)
    assert int(compiled[0]["graphs"]) >= 1 and int(compiled[0]["graph breaks"]) >= 1


@pytest.mark.slow
def test_speed_memory_and_runs(in_process, tmp_path, capsys):
    speed, demo, real = measure(in_process, tmp_path, "speed,demo,real").values()
    printed, text = capsys.readouterr().out, (tmp_path / "RESULTS.md").read_text()
    steps = ["plain, sdpa", "packed, packed_sdpa", "packed, sharded, packed_sdpa"]
    assert [row["case"] for row in speed] == [f"toy, mixed lists, {step}" for step in steps]
    assert all(float(row["tokens/s"].replace(",", "")) > 0 for row in speed)
    ratios = [row["plan / measured"] for row in speed]
    assert ratios[0] == "–" and all(abs(float(ratio) - 1) < 0.1 for ratio in ratios[1:])
    stop, per_update = demo
    assert stop["bit for bit"] == "yes" and stop["largest difference of a loss"] == "0"
    assert 4 <= int(stop["stopped after"]) < 8 == int(stop["updates"])
    assert float(per_update["waits per update"]) > 0
    assert len(real) == 1 and float(real[0]["planned GiB"]) > 0
    records = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert records == [json.loads(line) for line in (tmp_path / "gpu" / "cases.jsonl").read_text().splitlines()]
    assert len(records) == 1 + 3 + 2 + 1
    for aim in ("planned memory within 10% of the measured peak, in all cases", "the steps compute the same loss"):
        assert re.search(rf"^\| {aim}.* \| \*\*yes\*\* \|$", text, re.M)


CASES = """
import os, time
from gpu_cases import Case

def machine_cases(setting):
    yield Case("this machine", lambda: {"card": setting.device}, 10)

def some_cases(setting):
    yield Case("first", lambda: {"value": 1.5}, 10)
    yield Case("raises", lambda: 1 / 0, 10)
    yield Case("ends its process", lambda: os._exit(3), 10)
    yield Case("hangs", lambda: time.sleep(1000), 0.2)
    yield Case("too long", lambda: {"value": 0}, 10_000)
    yield Case("last", lambda: {"value": 2}, 10)
"""


def test_a_case_that_fails_ends_or_hangs_does_not_stop_the_others(benchmark, monkeypatch, tmp_path, capsys):
    (tmp_path / "some_gpu_cases.py").write_text(CASES)
    monkeypatch.syspath_prepend(str(tmp_path))
    gpu, results = benchmark("gpu"), tmp_path / "RESULTS.md"
    sections = {"machine": "machine_cases", "demo": "some_cases", "real": "none"}
    monkeypatch.setattr(gpu, "SECTIONS", {name: f"some_gpu_cases:{cases}" for name, cases in sections.items()})
    results.write_text("<!-- heap -->\n## Kept?\n")
    arguments = ["--device", "cpu", "--reduced", "--output", str(results), "--folder", str(tmp_path / "gpu")]
    assert gpu.main(arguments) == 1
    printed = capsys.readouterr().out
    records = {record["case"]: record for record in map(json.loads, re.findall(r"^\{.*\}$", printed, re.MULTILINE))}
    assert [records[f"demo: {name}"]["result"]["value"] for name in ("first", "last")] == [1.5, 2]
    assert records["demo: raises"]["error"] == "ZeroDivisionError: division by zero"
    assert records["demo: ends its process"]["error"] == "its process ended with exit code 3"
    assert records["demo: hangs"]["error"].startswith("it took more than")
    assert "and it takes about 10000" in records["demo: too long"]["skipped"]
    assert "has no attribute 'none'" in records["real"]["error"]
    text = results.read_text()
    assert "## Kept?" in text and text.count("<!-- gpu -->") == 1
    assert [row["case"] for row in tables(text)["The demo"]] == ["first", "last"]
    assert len(tables(text)["Failed or skipped"]) == 5

    (tmp_path / "some_gpu_cases.py").write_text(CASES.replace("1 / 0", '{"value": 3}').replace("1.5", "9"))
    assert gpu.main([*arguments, "--resume", "--only", "demo"]) == 1
    again = re.findall(r'"case": "([^"]+)"', capsys.readouterr().out)
    missing = ["raises", "ends its process", "hangs", "too long"]
    assert again == ["machine: this machine", *(f"demo: {name}" for name in missing)]
    rows = {row["case"]: row["value"] for row in tables(results.read_text())["The demo"]}
    assert rows == {"first": "1.5", "raises": "3", "last": "2"}


def test_aims_are_compared_with_what_was_measured(benchmark):
    gpu = benchmark("gpu")

    def row(lists, step, tokens, peak, **others):
        values = {"shape": "7b", "lists": lists, "step": step, "tokens/s": tokens, "peak GiB": peak, **others}
        return {"case": f"speed: {lists} {step}", "result": values}

    plan = {"plan / measured": 0.95}
    records = [
        row("4k", "plain", 1, 1, MFU=0.6),
        row("4k", "packed", 1, 1, MFU=0.44, **plan),
        row("4k", "packed, sharded", 1, 1, MFU=0.47, **{"plan / measured": 1.11}),
        row("mixed", "plain", 100, 40.0),
        row("mixed", "packed", 149, 24.0, **plan),
        {"case": "speed: 135m", "error": "any"},
    ]
    assert [(measured, met) for _, measured, met in gpu.aims(records)] == [
        ("47.0%", "**yes**"),
        ("1.49 ×", "**no**"),
        ("0.60 ×", "**yes**"),
        ("+11.0% at most", "**no**"),
        ("–", "not measured"),
    ]
    records[0]["result"]["loss"], records[1]["result"]["loss"] = 2.0, 2.03
    assert list(gpu.aims(records))[-1][1:] == ("1.50% at most", "**no**")
    records[3]["result"] = {"shape": "7b", "lists": "mixed", "step": "plain", "peak GiB": "out of memory"}
    assert [met for _, _, met in gpu.aims(records)] == ["**yes**", "not measured", "not measured", "**no**", "**no**"]
    assert [met for _, _, met in gpu.aims([])] == ["not measured"] * 3


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", None),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GH200 480GB", None),
        ("Tesla T4", None),
    ],
)
def test_peak_of_a_card(benchmark, name, teraflops):
    found = benchmark("gpu_speed").card_flops(name)
    assert found == (None if teraflops is None else teraflops * 1e12)


def test_reduced_figures_do_not_go_into_the_results(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark("gpu").parse(["--reduced"])
    assert "--output: required" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark("gpu").parse(["--only", "speed,fast"])
    assert "unknown section fast; expected some of machine, attention" in capsys.readouterr().err


def test_wheels_are_those_of_the_current_stack():
    """But for zstd, of which later versions have no wheel."""
    lines = (FOLDER / "gpu_wheels.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#") and not line.startswith("zstd==")]
    assert len(pins) > 30
    assert set(pins) <= set((REPOSITORY / "constraints-current.txt").read_text().splitlines())


def test_the_readme_says_whether_a_gpu_was_measured():
    measured = "<!-- gpu -->" in (FOLDER / "RESULTS.md").read_text()
    assert ("not yet run on a GPU" in (REPOSITORY / "README.md").read_text()) != measured
