"""Pushing an export with huggingface_hub's own client, to a hub on the loopback interface."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.contracts import new_contract
from support.exporting import write
from support.hub_server import TOKENS, Hub, hub

from rankllm_composer.errors import ModelError
from rankllm_composer.export.hub import files_to_push
from rankllm_composer.export.model_card import CardFacts, render_card

WRITER, READER = TOKENS
REFUSED = "error: me/mine: "


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    card = render_card(CardFacts("mine", None, new_contract()))
    return write(tmp_path_factory.mktemp("run") / "hf" / "epoch_0", card=card, max_shard_size="40KB")


def push(run: Path, repo: str, *options: str, server: Hub | str, token: str = WRITER) -> subprocess.CompletedProcess:
    home = run if run.name != "epoch_0" else run.parent.parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": server if isinstance(server, str) else server.url, "HF_HOME": str(home / "no_home")}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "rankllm_composer", "export", str(run), "--push", repo, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_an_export_is_pushed_as_it_is_and_nothing_else(exported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(exported, run / "hf" / "epoch_0")
    folder = run / "hf" / "epoch_0"
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / ".env").write_text("HF_TOKEN=x")
    names = {path.name for path in exported.iterdir()}
    assert "model-00002-of-00002.safetensors" in names or len(names) > 8
    with hub() as server:
        dry = push(run, "mine", "--dry-run", server=server)
        assert dry.returncode == 0, dry.stderr
        assert f"{server.url}/me/mine (private, new), " in dry.stdout and "would be pushed to" in dry.stdout
        assert "left here: optimizer.pt" in dry.stdout and server.changes == []
        done = push(run, "mine", server=server)  # of a run, its best or newest export
        assert done.returncode == 0, done.stderr
        repo = server.repos["me/mine"]
        assert repo["private"] is True and server.changes == ["create me/mine", "commit me/mine"]
        assert {name: (folder / name).read_bytes() for name in names} == repo["files"]
        # A later push of other weights leaves none of these behind, but what the user added.
        repo["files"] |= {"pytorch_model.bin": b"", "adapter_config.json": b"", "LICENSE": b"mine"}
        again = push(exported, "me/mine", server=server)
        assert again.returncode == 0, again.stderr
        assert repo["files"].keys() == names | {"LICENSE"} and server.changes[2:] == ["commit me/mine"]
        repo["private"] = False
        refused = push(exported, "me/mine", server=server)
        assert refused.returncode == 2 and "error: me/mine is public, so that everyone could read" in refused.stderr
        assert push(exported, "team/open", "--public", server=server).returncode == 0
        assert server.repos["team/open"]["private"] is False
        server.forbidden.add("me/mine")
        refused = push(exported, "me/mine", "--public", server=server)
        assert refused.returncode == 2 and "no permission to write there (Your token is for another" in refused.stderr


def test_what_stops_a_push_is_explained(exported):
    with hub() as server:
        for repo, token, message in (
            ("me/mine", "", f"{REFUSED}no token for {server.url}; expected one that may write. Log in with"),
            ("me/mine", "hf_" + "x" * 20, f"{REFUSED}{server.url} refuses the token; nothing was pushed. Log in"),
            ("me/mine", READER, f"{REFUSED}the token of me may only read"),
            ("other/mine", WRITER, "other/mine: no permission to write there (me may write to me/…, team/…)"),
            ("a/b/c", WRITER, "--push is 'a/b/c'; expected NAME or OWNER/NAME"),
        ):
            done = push(exported, repo, server=server, token=token)
            assert done.returncode == 2 and message in done.stderr, done.stderr
            assert token not in done.stderr or not token
        assert server.changes == []
    done = push(exported, "me/mine", "--dry-run", server=server.url)  # it is closed now
    assert done.returncode == 2 and f"{REFUSED}{server.url} cannot be reached (" in done.stderr


def test_secrets_and_changed_files_are_not_pushed(exported, tmp_path):
    for name, text, message in (
        ("README.md", f"\ntoken: {WRITER}\n", "README.md holds what looks like a credential"),
        ("config.json", " ", "config.json is not what was exported"),
    ):
        folder = tmp_path / name
        shutil.copytree(exported, folder)
        with (folder / name).open("a") as file:
            file.write(text)
        with pytest.raises(ModelError, match=message):
            files_to_push(folder)
    (folder / "export.json").unlink()
    with pytest.raises(ModelError, match=r"has no export.json; expected an export"):
        files_to_push(folder)
    with pytest.raises(ModelError, match=r"has no export.json; expected an export"):
        files_to_push(tmp_path)
