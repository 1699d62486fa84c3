"""How fast, how large and how exact is training on one GPU?

    python benchmarks/gpu.py [--only SECTION,…] [--seconds 540] [--folder build/gpu] [--resume]
    python benchmarks/gpu.py --device cpu --reduced --output FILE    # toy sizes, to test the code without a GPU

Sections, in the order in which they run; `make gpu-check ONLY=speed,real` runs some of them:

- machine: the card, the versions, and the fastest matrix product and copy;
- attention: each attention in bfloat16 against float64, forward and gradients;
- step: the packed step in bfloat16 against each list alone in float32;
- speed: the packed step against a plain Hugging Face loop: tokens per second, MFU, peak memory and its plan;
- waits: how often the host waits for the device in a step;
- demo: the demo trained in one go, and stopped and resumed;
- real: `train` on lists of real lengths;
- compile: graph breaks and speed of compiled layers.

The plain loop pads lists to the longest and computes logits at every position. Its attention is SDPA without a mask,
for the fastest kernel, and its loss has no loops over pairs, unlike the published code: both only help it. Steps follow
each other without waiting for the device in between. Useful tokens are real ones, whatever was computed. MFU (model
FLOPs utilization) divides the FLOPs of real tokens, without recomputation (`rankllm_composer.model.flops`), by the
card's dense bfloat16 peak in `rankllm_composer.preflight.plan`. Weights and token ids are random, which does not change
the cost; only the demo measures quality. Peak memory is what PyTorch has allocated, without the CUDA context.

Each case prints a line of JSON when it ends. A case that fails does not stop the others: they run in a separate
process, which is replaced if it dies. Results are kept in cases.jsonl in the folder, and `--resume` measures only what
is missing there; without it, they are replaced. section.md there is the section of RESULTS.md, which is written at the
end. The exit code is 1 if a case failed. docs/planning.md says how to run it on a machine without network.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_cases import Record, Setting, read_records, supervise
from run_all import FOLDER, question, write_section

SECTIONS = {
    "machine": "gpu_speed:machine_cases",
    "attention": "gpu_steps:attention_cases",
    "step": "gpu_steps:step_cases",
    "speed": "gpu_speed:speed_cases",
    "waits": "gpu_steps:waits_cases",
    "demo": "gpu_runs:demo_cases",
    "real": "gpu_runs:real_cases",
    "compile": "gpu_steps:compile_cases",
}
TITLES = {
    "machine": "The machine",
    "attention": "Relative errors of attention in bfloat16, against float64",
    "step": "Relative errors of the packed step in bfloat16, against each list alone in float32",
    "speed": "The packed step and a plain padded loop",
    "waits": "Host waits of one step",
    "demo": "The demo",
    "real": "Runs of `train` on lists of real lengths",
    "compile": "Compiled layers, every layer recomputed",
}
MIN_MFU, MIN_SPEED, MAX_MEMORY, PLAN_TOLERANCE, LOSS_TOLERANCE = 0.45, 1.5, 0.6, 0.1, 0.01


def aims(records: Sequence[Record]) -> Iterator[tuple[str, str, str]]:
    """Yield what is aimed at on an H100, what was measured, and whether that meets the aim."""
    found = {record["case"]: record["result"] for record in records if "result" in record}
    rows = [result for case, result in found.items() if case.startswith("speed: ")]

    def verdict(value: float | None, text: str, met: bool) -> tuple[str, str]:
        return ("–", "not measured") if value is None else (text, "**yes**" if met else "**no**")

    of_packed = [row for row in rows if row["lists"] == "4k" and row["step"] != "plain"]
    mfu = max((row["MFU"] for row in of_packed if "MFU" in row), default=None)
    yield (
        f"MFU at the 7B shape with lists of 4,096 tokens ≥ {MIN_MFU:.0%}",
        *verdict(mfu, f"{mfu or 0:.1%}", (mfu or 0) >= MIN_MFU),
    )
    for shape in dict.fromkeys(row["shape"] for row in rows if row["lists"] == "mixed"):
        mixed = [row for row in rows if row["shape"] == shape and row["lists"] == "mixed"]
        plain = [row for row in mixed if row["step"] == "plain"]
        packed = [row for row in mixed if row["step"] == "packed"]
        speed = memory = None
        if plain and packed and "tokens/s" in plain[0]:
            speed = packed[0]["tokens/s"] / plain[0]["tokens/s"]
            memory = packed[0]["peak GiB"] / plain[0]["peak GiB"]
        yield (
            f"{shape}, mixed lists: useful tokens/s ≥ {MIN_SPEED} × the plain loop",
            *verdict(speed, f"{speed or 0:.2f} ×", (speed or 0) >= MIN_SPEED),
        )
        yield (
            f"{shape}, mixed lists: peak memory ≤ {MAX_MEMORY} × the plain loop",
            *verdict(memory, f"{memory or 0:.2f} ×", (memory or 0) <= MAX_MEMORY),
        )
    ratios = [result["plan / measured"] for result in found.values() if "plan / measured" in result]
    worst = max(ratios, key=lambda ratio: abs(ratio - 1), default=None)
    yield (
        f"planned memory within {PLAN_TOLERANCE:.0%} of the measured peak, in all cases",
        *verdict(worst, f"{(worst or 1) - 1:+.1%} at most", abs((worst or 1) - 1) <= PLAN_TOLERANCE),
    )
    losses: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if "loss" in row:
            losses.setdefault((row["shape"], row["lists"]), []).append(row["loss"])
    spread = max((max(same) / min(same) - 1 for same in losses.values()), default=None)
    yield (
        f"the steps compute the same loss, within {LOSS_TOLERANCE:.0%}",
        *verdict(spread, f"{spread or 0:.2%} at most", (spread or 0) <= LOSS_TOLERANCE),
    )


def shown(value: Any) -> str:
    """Format a figure for a table."""
    if isinstance(value, dict):
        return ", ".join(f"`{name}` {shown(number)}" for name, number in value.items()) or "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *([shown(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines]


def results_section(records: Sequence[Record], command: str, seconds: float) -> str:
    """Return the section of the results: machine, aims, and a table per section."""
    lines = ["<!-- gpu -->", f"## {question('gpu')}", "", f"    {command}", ""]
    machine = next((r["result"] for r in records if r["case"].startswith("machine: ") and "result" in r), {})
    described = "; ".join(f"{name}: {shown(value)}" for name, value in machine.items())
    lines += [f"{described or 'unknown machine'}; {datetime.date.today()}; {seconds:.0f} s in total", ""]
    lines += [*table(["aim on an H100", "measured here", "met"], list(aims(records))), ""]
    for section, title in TITLES.items():
        if section == "machine":
            continue
        found = [(r["case"].removeprefix(f"{section}: "), r) for r in records if r["case"].startswith(f"{section}: ")]
        results = [(name, record["result"]) for name, record in found if "result" in record]
        if results:
            hidden = {"shape", "lists", "step", "attention"} if section == "speed" else set()
            columns = [name for name in dict.fromkeys(key for _, r in results for key in r) if name not in hidden]
            rows = [[name, *(result.get(column, "–") for column in columns)] for name, result in results]
            lines += [f"### {title}", "", *table(["case", *columns], rows), ""]
    problems = [(r["case"], r.get("error") or r["skipped"]) for r in records if "result" not in r]
    if problems:
        lines += ["### Failed or skipped", "", *table(["case", "reason"], problems), ""]
    return "\n".join(lines).rstrip() + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--seconds", type=float, default=540, help="no case starts later than its own time before this")
    parser.add_argument("--folder", type=Path, default=FOLDER.parent / "build" / "gpu")
    parser.add_argument("--output", type=Path, help="file of results to update; default: benchmarks/RESULTS.md")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--reduced", action="store_true", help="toy sizes")
    parser.add_argument("--resume", action="store_true", help="keep the results that are in the folder")
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name]
    if unknown := set(options.only) - set(SECTIONS):
        parser.error(f"--only: unknown section {', '.join(sorted(unknown))}; expected some of {', '.join(SECTIONS)}")
    if (options.reduced or options.device == "cpu") and options.output is None:
        parser.error("--output: required with --reduced or --device cpu, whose figures do not belong into RESULTS.md")
    options.output = options.output or FOLDER / "RESULTS.md"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases and write the results; return 1 if a case failed, else 0."""
    options = parse(arguments)
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.time()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cases.jsonl"
    if not options.resume:
        path.unlink(missing_ok=True)
    machine = next(iter(SECTIONS))
    finished = [record["case"] for record in read_records(path) if "result" in record]
    finished = [case for case in finished if not case.startswith(f"{machine}: ")]

    def keep(record: Record) -> None:
        line = json.dumps(record)
        print(line, flush=True)
        with path.open("a") as file:
            file.write(line + "\n")
        (folder / "section.md").write_text(section())

    def section() -> str:
        words = ["python", "benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)]
        return results_section(read_records(path), " ".join(words), time.time() - started)

    modules = {name: SECTIONS[name] for name in SECTIONS if name in options.only or name == machine}
    setting = Setting(options.device, options.reduced, folder)
    try:
        supervise(modules, setting, finished, started + options.seconds, keep)
    finally:
        signal.signal(signal.SIGTERM, handler)
        write_section(options.output, "gpu", section())
    records = read_records(path)
    for aim, measured, met in aims(records):
        print(f"{met.strip('*'):<13} {measured:>12}  {aim}")
    failed = [record["case"] for record in records if "error" in record]
    print(f"{options.output}" + (f"; failed: {'; '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
