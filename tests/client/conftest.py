"""The inference client beside us: installed into a folder of its own, asked in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CLIENT = "rank-llm==0.25.7"
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def client_folder(pytestconfig: pytest.Config) -> Path:
    """Folder with the client's package and nothing it depends on, installed once and kept between runs."""
    cache = pytestconfig.cache.mkdir("client")
    folder = cache / CLIENT
    if not folder.exists():
        made = Path(tempfile.mkdtemp(dir=cache))
        # Not to be taken for a package of ours: its dependencies would replace torch and transformers.
        options = ["--quiet", "--no-deps", "--no-compile", "--ignore-requires-python", "--target", made]
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, CLIENT], capture_output=True, text=True, check=False
        )
        if pip.returncode:
            shutil.rmtree(made)
            pytest.skip(f"needs {CLIENT}, which pip could not install: {pip.stderr.strip().splitlines()[-1:]}")
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    return folder


@pytest.fixture(scope="session")
def ask_client(
    client_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[list[tuple[str, dict[str, Any]]]], list[Any]]]:
    """Function: questions for `ask_client.py` → the client's answers, from one process that stays."""
    log = tmp_path_factory.mktemp("client") / "stderr.txt"
    path = os.pathsep.join(map(str, (HERE / "stand_ins", client_folder)))
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, HERE / "ask_client.py"],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None

        def ask(questions: list[tuple[str, dict[str, Any]]]) -> list[Any]:
            process.stdin.write(json.dumps(questions) + "\n")
            process.stdin.flush()
            answers = process.stdout.readline()
            assert answers, log.read_text()[-4000:]
            return json.loads(answers)

        yield ask
        process.stdin.close()
