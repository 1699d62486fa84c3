"""`make setup`: the versions that it installs, and the CPU build of torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.launching import REPOSITORY


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with the files that `make setup` reads, and no environment."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-current.txt"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


def make(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("stack", "venv"), [("pinned", ".venv"), ("current", ".venv-current")])
def test_the_cpu_build_has_the_same_versions_without_the_cuda_packages(checkout, stack, venv):
    all_versions = {"pinned": "constraints.txt", "current": "constraints-current.txt"}[stack]
    make(checkout, f"{venv}/cpu-constraints.txt", f"STACK={stack}", "TORCH=cpu")
    before = (checkout / all_versions).read_text().splitlines()
    after = (checkout / venv / "cpu-constraints.txt").read_text().splitlines()
    changed = {line for line in after if line not in before}
    assert sorted(line.partition("==")[0] for line in changed) == ["torch", "torchvision"]
    assert all(line.endswith("+cpu") and line.removesuffix("+cpu") in before for line in changed)
    dropped = {line.partition("==")[0] for line in before} - {line.partition("==")[0] for line in after}
    families = {"pinned": {"nvidia", "triton"}, "current": {"cuda", "nvidia", "triton"}}
    assert {name.split("-")[0] for name in dropped} == families[stack]
    assert not [line for line in after if line.startswith(("nvidia", "cuda", "triton"))]
    command = make(checkout, "--dry-run", "setup", f"STACK={stack}", "TORCH=cpu")
    assert command.count(f" {venv}/cpu-constraints.txt ") == 2  # uv, then pip


def write_wheel(folder: Path, name: str, version: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        within = f"{name}-{version}.dist-info"
        wheel.writestr(f"{within}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{within}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{within}/RECORD", "")


def test_pip_takes_the_cpu_build_or_none(checkout):
    make(checkout, ".venv/cpu-constraints.txt", "TORCH=cpu")
    (version,) = re.findall(r"^torch==(.*)$", (checkout / "constraints.txt").read_text(), re.MULTILINE)
    (checkout / "wheels").mkdir()
    write_wheel(checkout / "wheels", "torch", version)  # as on PyPI

    def download() -> list[str]:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-index", "--find-links", "wheels"]
        command += ["--dest", "found", "--constraint", ".venv/cpu-constraints.txt", f"torch>={version}"]
        environment = os.environ | {"PIP_CONFIG_FILE": os.devnull}
        subprocess.run(command, cwd=checkout, env=environment, capture_output=True, check=False)
        return [path.name for path in (checkout / "found").glob("*.whl")]

    assert download() == []
    write_wheel(checkout / "wheels", "torch", f"{version}+cpu")
    assert download() == [f"torch-{version}+cpu-py3-none-any.whl"]


def test_an_environment_keeps_its_build(checkout):
    (checkout / ".venv").mkdir()
    for build in ("cpu", "cuda", ""):
        versions = ".venv/cpu-constraints.txt" if build == "cpu" else "constraints.txt"
        (checkout / ".venv" / ".installed").write_text(f"{build}\n" * bool(build))
        commands = make(checkout, "--dry-run", "--what-if", "pyproject.toml", "demo")
        assert f"--constraint {versions} " in commands, build
        assert ("--torch-backend cpu" in commands) == (build == "cpu")
