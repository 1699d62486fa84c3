"""What is fetched from the Hugging Face Hub before a run: one record, from a hub on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import constants
from support.dataset_hub import HubServer
from support.launching import REPOSITORY
from support.synthetic_records import conversation

from rankllm_composer.errors import RunError
from rankllm_composer.preflight.hub import require_hub


def test_inspect_streams_a_record_from_the_hub(tmp_path, mistral_v3_folder):
    """In a process of its own, as the client reads HF_ENDPOINT when it is imported."""
    lines = [json.dumps(conversation(index)) for index in range(20)]
    server = HubServer("".join(f"{line}\n" for line in lines).encode())
    overrides = [
        "data.train.source.input=owner/name",
        "data.train.local=absent",
        f"model.tokenizer={mistral_v3_folder}",
    ]
    variables = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    variables["HF_HUB_OFFLINE"] = variables["HF_DATASETS_OFFLINE"] = variables["TRANSFORMERS_OFFLINE"] = "0"
    command = [sys.executable, "-m", "rankllm_composer", "inspect", "first_mistral", *overrides]
    try:
        done = subprocess.run(command, env=os.environ | variables, cwd=tmp_path, capture_output=True, text=True)
    finally:
        server.close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"record {json.loads(lines[0])['id']}\n")
    assert "record 0 of owner/name (no shards in absent yet)" in done.stdout
    assert server.sent and not list(tmp_path.rglob("*.arrow"))  # streamed, not downloaded and converted


def test_no_network_is_said_plainly(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="there is no network to fetch it"):
        require_hub("KEY", "owner/name")
    require_hub("KEY", str(tmp_path))
