"""What CUDA reads when it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig

import pytest
import torch
from support.launching import REPOSITORY
from support.packed_models import random_sequences
from torch._subclasses.fake_tensor import FakeTensorMode

from rankllm_composer.data.packing import split_batch
from rankllm_composer.model.losses import LOSSES
from rankllm_composer.model.objective import Objective
from rankllm_composer.training import devices
from rankllm_composer.training.devices import allocator_settings


@pytest.mark.parametrize(
    "environment, version, expected",
    [
        ({}, "2.7.0+cu126", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"HOME": "/root"}, "2.8.1", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({}, "2.9.0", {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({}, "2.11.0a0+git123", {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({}, "3.0.0", {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "2.11.0", {}),
        ({"PYTORCH_ALLOC_CONF": ""}, "2.7.0", {}),
    ],
)
def test_memory_grows_in_segments_unless_the_user_says_otherwise(environment, version, expected):
    assert allocator_settings(environment, version) == expected


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["combined", "ranking"])
def test_losses_stay_on_the_device_of_the_logits(name, loss):
    """Tensors without data know their device, here one other than the CPU: an operation on both would be an error."""
    (batch,) = split_batch({"sequences": random_sequences(name)}, max_lists=10)
    with FakeTensorMode() as mode:
        on_device = {
            key: mode.from_tensor(value).to("meta") if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        logits = torch.zeros(len(on_device["logit_positions"]), 96, device="meta", requires_grad=True)
        losses = Objective(name, ranking_loss=loss)(logits, on_device)
        assert {value.device.type for value in losses.values()} == {"meta"}
        with pytest.raises(RuntimeError, match="two different devices"):
            losses["total"] + torch.ones(1)


def test_ranks_start_without_a_script_beside_the_interpreter(tmp_path):
    """An interpreter alone in its folder, as where packages were installed into another one."""
    (tmp_path / "bin").mkdir()
    interpreter = tmp_path / "bin" / "python"
    interpreter.symlink_to(os.path.realpath(sys.executable))
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), sysconfig.get_path("purelib")])
    probe = tmp_path / "probe.py"
    probe.write_text("import os, sys; open(os.environ['RANK'], 'w').write(sys.executable)")
    command = [interpreter, "-m", "rankllm_composer.launch", "-n", "2", probe]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == [str(interpreter)] * 2


@pytest.mark.parametrize(
    "gpus, capability, problem",
    [
        (0, None, "as the device is cpu, and the kernel needs CUDA; expected 8 GPUs of"),
        (8, (7, 5), "as the GPU has compute capability 7.5, below 8.0; expected 8 GPUs of"),
        (2, (9, 0), "NPROC is 8, but this machine has 2 GPUs; expected one per process. Set NPROC=2, or SLOW=1"),
        (8, (9, 0), None),
    ],
)
def test_a_reproduction_needs_fast_gpus(monkeypatch, capsys, gpus, capability, problem):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert devices.main(["8"]) == (0 if problem is None else 2)
    error = capsys.readouterr().err
    assert error == "" if problem is None else problem in error and "SLOW=1" in error


@pytest.mark.parametrize("target", ["reproduce-first-mistral", "reproduce-zephyr"])
def test_a_reproduction_says_what_it_does_and_checks_the_gpus_first(target):
    def lines(*variables: str) -> list[str]:
        command = ["make", "-n", "-o", "setup", target, "NPROC=4", "MODEL=/models/base", *variables]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    said, checked, started, *_ = lines()
    assert "on 4 processes" in said and "'  base model  /models/base'" in said and "'  writes      runs/" in said
    assert checked.endswith("-m rankllm_composer.training.devices 4") and "train.py" in started
    assert not any("training.devices" in line for line in lines("SLOW=1"))
