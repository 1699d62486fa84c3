"""Several machines simulated on one: one launcher per machine with one rank each, connected over loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.killing import NOT_COMPARED
from support.launching import REPOSITORY, TRAIN, metrics
from support.small_run import RECIPE, small_run
from support.warm_python import WarmProcess

from rankllm_composer.checkpoints.folder import complete_checkpoints

CLUSTER = REPOSITORY / "docs" / "cluster"


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.fixture(scope="module")
def overlay(tmp_path_factory, mistral_v3_folder) -> list[str]:
    overlay = small_run(tmp_path_factory.mktemp("machines"), mistral_v3_folder)
    # The order of lists depends on the number of machines unless num_canonical_nodes is set.
    return [*overlay, "run.max_duration=1ep", "schedule.warmup=1ba", "data.train.num_canonical_nodes=2"]


def run_all(commands: list[list[str]], folder: Path) -> list[dict]:
    """Start the commands at once, as on separate machines; return the run's metrics without timings."""
    folder.mkdir()
    processes: list[WarmProcess | subprocess.Popen[bytes]] = []
    for machine, command in enumerate(commands):
        environment = {**os.environ, "NODE_RANK": str(machine), "OMP_NUM_THREADS": "1"}
        with (folder / f"output-{machine}").open("wb") as output:
            if command[0] == "-m":
                processes.append(WarmProcess(command, output.fileno(), folder=folder, environment=environment))
            else:
                streams = {"stdout": output, "stderr": subprocess.STDOUT}
                processes.append(subprocess.Popen(command, cwd=folder, env=environment, **streams))
    codes = [process.wait(timeout=900) for process in processes]
    outputs = [(folder / f"output-{machine}").read_text() for machine in range(len(commands))]
    assert codes == [0] * len(processes), "\n".join(outputs)
    assert sum("epoch 1/1  batch 6/6" in output for output in outputs) == 1  # only rank 0 prints
    assert complete_checkpoints(folder / "run" / "checkpoints")[-1][1].num_ranks == 2
    lines = metrics(folder / "run" / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in NOT_COMPARED} for line in lines]


def program(name: str) -> list[str]:
    return [sys.executable, str(Path(sys.executable).with_name(name))]


@pytest.mark.slow
def test_two_launchers_train_like_one(tmp_path, overlay):
    arguments = [str(TRAIN), str(RECIPE), *overlay, "run.folder=run"]
    meet = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    composer = ["-m", "composer.cli.launcher"]
    launcher = [*composer, "-n", "1", "--world_size", "2", *meet]
    two = [[*launcher, "--node_rank", str(k), "--base_rank", str(k), *arguments] for k in range(2)]
    together = run_all(two, tmp_path / "two")
    assert together == run_all([[*composer, "-n", "2", *arguments]], tmp_path / "one")
    meet = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    launcher = [*program("torchrun"), "--nnodes", "2", "--nproc-per-node", "1", *meet]
    torchrun = [[*launcher, "--node-rank", str(k), *arguments] for k in range(2)]
    assert together == run_all(torchrun, tmp_path / "torchrun")


def test_the_batch_script_is_valid_and_forwards_its_arguments(tmp_path):
    """srun and python are stubs that record their arguments, as on each of two machines."""
    script = CLUSTER / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/bash\necho machine-7\necho machine-8\n")
    (tools / "srun").write_text('#!/bin/bash\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n')
    (tools / "python").write_text('#!/bin/bash\necho "python $*"\necho "$SRUN_CPUS_PER_TASK cores" >&2\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "machine-[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "48",
        "GPUS_PER_NODE": "8",
        "VENV": str(tmp_path / "absent"),
    }
    done = subprocess.run(
        ["bash", str(script), "yamls/first_mistral.yaml", "optimizer.lr=1e-5"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout.splitlines()
    assert done.stderr.splitlines() == ["48 cores"] * 2
    for machine, line in enumerate(said):
        assert line.startswith("python -m rankllm_composer.launch -n 8 --world_size 16 ")
        assert f"--node_rank {machine} --base_rank {8 * machine} --master_addr machine-7 --master_port " in line
        assert line.endswith("rankllm_composer/train.py yamls/first_mistral.yaml optimizer.lr=1e-5")
    assert len(said) == 2
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=TERM@300" in directives and "#SBATCH --requeue" in directives


def test_the_dockerfile_is_valid():
    """Hadolint reports nothing, and the files that it copies exist."""
    path = CLUSTER / "Dockerfile"
    lint = subprocess.run([*program("hadolint")[1:], str(path)], capture_output=True, text=True, check=False)
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")
    text = path.read_text().replace("\\\n", " ")
    base, *rest = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert base.startswith("FROM python:3.11-slim-")
    copied = [source for line in rest if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert all((REPOSITORY / source).exists() for source in copied)
    current = "--constraint constraints-current.txt --overrides overrides-current.txt"
    for files in ("--constraint constraints.txt", current):
        assert f"set -- {files} ;;" in text and set(files.split()[1::2]) <= set(copied)
    assert rest[-2] == "USER 1000"


def test_scripts_pass_shellcheck():
    scripts = [CLUSTER / "train.sbatch", REPOSITORY / ".ci" / "run"]
    lint = subprocess.run([*program("shellcheck")[1:], *map(str, scripts)], capture_output=True, text=True, check=False)
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")
