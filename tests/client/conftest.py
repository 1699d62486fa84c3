"""The inference client beside us, in each version: installed into a folder, asked in a process of its own.

With the stand-in for vLLM everything is asked. `make serve-check` sends the whole rerankings through the real one, of
the Python that RANKLLM_VLLM_PYTHON names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rankllm_composer.prompts.clients import CLIENT_VERSIONS, ClientVersion

HERE = Path(__file__).parent
SERVER_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="session", params=CLIENT_VERSIONS)
def version(request: pytest.FixtureRequest) -> ClientVersion:
    """Each version of the client."""
    return request.param


@pytest.fixture(scope="session")
def client_folder(pytestconfig: pytest.Config, version: ClientVersion) -> Path:
    """Folder with the client's package and nothing it depends on, installed once and kept between runs.

    Version 0.26.0 asks for Python 3.12, but runs on 3.11 as far as it is asked here.
    """
    cache = pytestconfig.cache.mkdir("client")
    client = f"rank-llm=={version}"
    folder = cache / client
    if not folder.exists():
        made = Path(tempfile.mkdtemp(dir=cache))
        # Not to be taken for a package of ours: its dependencies would replace torch and transformers.
        options = ["--quiet", "--no-deps", "--no-compile", "--ignore-requires-python", "--target", made]
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, client], capture_output=True, text=True, check=False
        )
        if pip.returncode:
            shutil.rmtree(made)
            pytest.fail(f"needs {client}, which pip could not install: {pip.stderr.strip().splitlines()[-1:]}")
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    return folder


Ask = Callable[[list[tuple[str, dict[str, Any]]]], list[Any]]


@contextmanager
def asking(python: str, path: list[Path], log: Path, **environment: str) -> Iterator[Ask]:
    """Function: questions for `ask_client.py` → the client's answers, from one process that stays."""
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [python, HERE / "ask_client.py"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment},
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


@pytest.fixture(scope="session")
def ask_client(client_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """The client over a stand-in for vLLM."""
    log = tmp_path_factory.mktemp("client") / "stderr.txt"
    with asking(
        sys.executable, [HERE / "stand_ins" / "server", HERE / "stand_ins" / "imported", client_folder], log
    ) as ask:
        yield ask


@pytest.fixture(scope="session")
def ask_server(ask_client: Ask, client_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """The client over the real vLLM of the Python that RANKLLM_VLLM_PYTHON names; without it as `ask_client`."""
    python = os.environ.get("RANKLLM_VLLM_PYTHON")
    if not python:
        yield ask_client
        return
    log = tmp_path_factory.mktemp("server") / "stderr.txt"
    with asking(python, [client_folder], log, **SERVER_ENVIRONMENT) as ask:
        yield ask
