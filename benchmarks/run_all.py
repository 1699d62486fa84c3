"""Run every benchmark and write RESULTS.md in this folder: `make bench`.

    python benchmarks/run_all.py [--only packed_step,ranks] [--threads N] [--output FILE]

Benchmarks run one after the other, each in a separate process. The machine should be otherwise idle; the load average
before each is recorded with it. RESULTS.md is updated after every benchmark; with --only, the sections of the others
are kept. With --threads 1, CPU time is measured instead of elapsed time, for a machine that is not idle. If a benchmark
fails or exceeds its time limit, its section says so, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from report import machine

FOLDER = Path(__file__).parent
# name → arguments
BENCHMARKS: dict[str, list[str]] = {
    "packed_step": ["--repeats", "1"],
    "machine_limit": [],
    "profile_step": [],
    "scaling": [],
    "ranks": [],
    "compile_layers": [],
    "heap": ["--repeats", "1"],
    "recomputation": ["--shape", "mistral-30m", "--repeats", "1", "--threads", "1"],
    "plan_vs_measured": [],
    "plan_seconds": [],
    "input_pipeline": [],
    "shard_build": ["--processes", "1"],
}
ELSEWHERE = ["gpu"]  # benchmarks with a command of their own, whose sections are kept: `make gpu-check`
LIMIT_SECONDS = 3600
HEAD = """# Benchmark results

Written by `make bench` and `make gpu-check`: one section per benchmark in this folder. The docstring of each file
describes the measurement. Each table is from one run on one machine; across machines, compare ratios, not absolute
values.
"""


def question(name: str) -> str:
    """Return the first line of a benchmark's docstring."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert text is not None
    return text.splitlines()[0]


def run(name: str, arguments: list[str]) -> tuple[str, bool]:
    """Run a benchmark and print its output; return its section of the results and whether it succeeded."""
    heading = f"<!-- {name} -->\n## {question(name)}\n\n    python benchmarks/{' '.join([f'{name}.py', *arguments])}\n"
    description, started = machine(), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", FOLDER / f"{name}.py", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    limit = threading.Timer(LIMIT_SECONDS, os.killpg, (process.pid, signal.SIGTERM))
    limit.start()
    lines = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        code = process.wait()
    finally:
        limit.cancel()
        if process.poll() is None:  # this process was stopped: stop the benchmark too
            os.killpg(process.pid, signal.SIGTERM)
    output = "".join(lines).strip()
    if "|---" not in output:
        output = f"```\n{output}\n```"
    if description.split(";")[0] not in output:
        output = f"{description}\n\n{output}"
    if code:
        output += f"\n\n**Failed** with exit code {code} after {time.monotonic() - started:.0f} s."
    return f"{heading}\n{output}\n", code == 0


def sections(path: Path) -> dict[str, str]:
    """Read the sections of an existing results file, by benchmark."""
    if not path.exists():
        return {}
    parts = re.split(r"^(?=<!-- (\w+) -->$)", path.read_text(), flags=re.MULTILINE)[1:]
    known = [*BENCHMARKS, *ELSEWHERE]
    return {name: text.rstrip() + "\n" for name, text in zip(parts[::2], parts[1::2]) if name in known}


def write_section(path: Path, name: str, section: str) -> None:
    """Write a benchmark's section into a results file, and keep the others."""
    results = {**sections(path), name: section}
    written = [results[benchmark] for benchmark in [*BENCHMARKS, *ELSEWHERE] if benchmark in results]
    path.write_text("\n".join([HEAD, *written]))


def main() -> int:
    """Write the results; return 1 if a benchmark failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHMARKS))
    parser.add_argument("--threads", help="number of threads, for benchmarks with this option; default: all cores")
    parser.add_argument("--output", type=Path, default=FOLDER / "RESULTS.md")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(BENCHMARKS):
        parser.error(
            f"--only: unknown benchmark {', '.join(sorted(unknown))}; expected some of {', '.join(BENCHMARKS)}"
        )
    failed = []
    for name in chosen:
        print(f"\n=== {name}", flush=True)
        has_threads = '"--threads"' in (FOLDER / f"{name}.py").read_text()
        threads = ["--threads", options.threads] if options.threads and has_threads else []
        section, succeeded = run(name, [*BENCHMARKS[name], *threads])
        write_section(options.output, name, section)
        if not succeeded:
            failed.append(name)
    print(f"\n{options.output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
