"""Complete and incomplete checkpoints, the newest one, pruning, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
from pathlib import Path, PosixPath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from rankllm_composer.checkpoints.folder import (
    MANIFEST,
    Manifest,
    batch_of,
    check_same_model,
    clear_stage,
    complete_checkpoints,
    damage_in,
    damaged_checkpoints,
    parse_manifest,
    prune,
    publish,
    read_manifest,
    stage_folder,
    weight_shapes,
)
from rankllm_composer.checkpoints.safe_loading import holds_only_data, read_index, safe_loading
from rankllm_composer.errors import CheckpointError

WEIGHTS = {"model.embed": [8, 4], "model.head": [4, 8]}


def write(folder: Path, epoch: int, batch: int, contents: tuple[bytes, ...] = (b"first", b"second")) -> Path:
    """Write a checkpoint of two files, as a run does."""
    files = {f"__{rank}_0.distcp": content for rank, content in enumerate(contents)}
    sizes = {name: len(content) for name, content in files.items()}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = Manifest(batch, epoch, 2, True, WEIGHTS, [], sizes, digests)
    clear_stage(folder)
    staged = stage_folder(folder) / manifest.name
    staged.mkdir()
    for name, content in files.items():
        (staged / name).write_bytes(content)
    return publish(folder, manifest)


def names(folder: Path) -> list[str]:
    return [path.name for path, _ in complete_checkpoints(folder)]


def test_the_newest_is_the_one_of_the_last_batch(tmp_path):
    assert complete_checkpoints(tmp_path / "absent") == []
    for epoch, batch in ((0, 9), (1, 100), (0, 20)):
        write(tmp_path, epoch, batch)
    assert names(tmp_path) == ["ep0-ba9", "ep0-ba20", "ep1-ba100"]
    assert complete_checkpoints(tmp_path)[-1][1].files == {"__0_0.distcp": 5, "__1_0.distcp": 6}


def unfinished(path: Path) -> None:
    (path / MANIFEST).unlink()


def torn(path: Path) -> None:
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text[: len(text) // 2])


def short(path: Path) -> None:
    (path / "__1_0.distcp").write_bytes(b"sec")


def missing(path: Path) -> None:
    (path / "__0_0.distcp").unlink()


def renamed(path: Path) -> None:
    path.rename(path.with_name("ep7-ba70"))


@pytest.mark.parametrize("damage", [unfinished, torn, short, missing, renamed], ids=lambda damage: damage.__name__)
def test_incomplete_checkpoints_are_ignored(tmp_path, damage):
    write(tmp_path, 0, 2)
    damage(write(tmp_path, 0, 4))
    (tmp_path / ".partial" / "ep0-ba6").mkdir()
    assert names(tmp_path) == ["ep0-ba2"]
    again = write(tmp_path, 0, 4, (b"whole", b"again!"))
    assert names(tmp_path) == ["ep0-ba2", "ep0-ba4"] and (again / "__0_0.distcp").read_bytes() == b"whole"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"batch": 1}',
        '{"batch": 1, "epoch": 0, "num_ranks": 1, "is_sharded": true, "weights": {}, "callbacks": [], "files": {}}',
        '{"batch": 1, "epoch": 0, "num_ranks": 1, "is_sharded": true, "weights": {}, "callbacks": [], '
        '"files": {"../../passwd": 3}}',
        '{"batch": 1, "epoch": 0, "num_ranks": 1, "is_sharded": true, "weights": {}, "callbacks": [], "files": 7}',
    ],
)
def test_invalid_manifests(text):
    assert parse_manifest(text) is None


def test_a_manifest_round_trips():
    manifest = Manifest(12, 2, 2, True, WEIGHTS, ["EpochGuard"], {"a": 3}, {"a": "ab"})
    assert parse_manifest(manifest.to_json()) == manifest
    assert parse_manifest(manifest.to_json().replace('"EpochGuard"', '"EpochGuarc"')) is None
    assert parse_manifest(dataclasses.replace(manifest, format=1).to_json()) is None


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a\\b", "/etc", "c:x", MANIFEST])
def test_a_manifest_cannot_name_files_outside_its_folder(name):
    assert parse_manifest(Manifest(1, 0, 1, False, WEIGHTS, [], {name: 3}, {name: "ab"}).to_json()) is None


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@given(changed=st.dictionaries(st.sampled_from([*Manifest.__dataclass_fields__, "other"]), ANYTHING, max_size=3))
def test_a_manifest_with_arbitrary_values_is_valid_or_none(changed):
    whole = dataclasses.asdict(Manifest(12, 2, 2, True, WEIGHTS, ["EpochGuard"], {"a": 3}, {"a": "ab"}))
    values = {**whole, **changed}
    checksum = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    manifest = parse_manifest(json.dumps({**values, "checksum": checksum}))
    if manifest is not None:
        assert batch_of(manifest.name) == manifest.batch >= 0 and manifest.num_ranks >= 0
        assert all(Path("folder", name).parent == Path("folder") for name in manifest.files)


@given(text=st.text() | st.binary())
def test_arbitrary_text_is_not_a_manifest(text):
    assert parse_manifest(text) is None


@pytest.mark.parametrize("name", ["ep1-ba²", "ep1-ba", "ep-ba1", "ba1", "ep1-ba1 ", "ep1-ba1.whole", "ep٣-ba٣", ""])
def test_other_names_are_not_checkpoints(name):
    assert batch_of(name) == -1 and batch_of("ep1-ba20") == 20


@pytest.mark.parametrize("keep, left", [(1, [8]), (2, [6, 8]), (9, [2, 4, 6, 8]), (-1, [2, 4, 6, 8])])
def test_the_newest_are_kept(tmp_path, keep, left):
    for batch in (2, 4, 6, 8):
        write(tmp_path, 0, batch)
    prune(tmp_path, keep)
    assert names(tmp_path) == [f"ep0-ba{batch}" for batch in left]


def test_only_complete_checkpoints_count_as_kept(tmp_path):
    for batch in (2, 4, 6):
        write(tmp_path, 0, batch)
    unfinished(tmp_path / "ep0-ba2")
    unfinished(tmp_path / "ep0-ba6")
    (tmp_path / "notes").mkdir()
    assert prune(tmp_path, 1) == ["ep0-ba2"]
    assert names(tmp_path) == ["ep0-ba4"] and (tmp_path / "notes").exists() and (tmp_path / "ep0-ba6").exists()
    assert prune(tmp_path, 2) == []


@given(place=st.integers(0, 10), bit=st.integers(0, 7))
def test_one_flipped_bit_is_found(tmp_path_factory, place, bit):
    path = write(tmp_path_factory.mktemp("c"), 0, 2)
    manifest = read_manifest(path)
    assert damage_in(path, manifest) is None
    name = "__0_0.distcp" if place < 5 else "__1_0.distcp"
    content = bytearray((path / name).read_bytes())
    content[place % 5] ^= 1 << bit
    (path / name).write_bytes(content)
    assert f"ep0-ba2 is damaged (the SHA-256 of {name} is not that in checkpoint.json)" in damage_in(path, manifest)
    assert damage_in(path, manifest, [other for other in manifest.files if other != name]) is None


def test_a_checkpoint_that_lost_a_file_or_has_a_damaged_manifest_is_listed_as_damaged(tmp_path):
    for epoch, damage in ((0, unfinished), (1, torn), (2, short), (3, missing)):
        damage(write(tmp_path, epoch, 2 + epoch))
    write(tmp_path, 9, 99)
    assert [path.name for path in damaged_checkpoints(tmp_path)] == ["ep1-ba3", "ep2-ba4", "ep3-ba5"]


def test_a_checkpoint_of_another_model(tmp_path):
    manifest = read_manifest(write(tmp_path, 0, 2))
    assert manifest is not None
    check_same_model(manifest, WEIGHTS, True, "here")
    for other, message in (
        ({**WEIGHTS, "model.head": [4, 9]}, r"model\.head is \[4, 8\]; expected \[4, 9\]"),
        ({"model.embed": [8, 4]}, r"model\.head is \[4, 8\]; expected absent"),
        ({**WEIGHTS, "lora": [2]}, r"lora is absent; expected \[2\]"),
    ):
        with pytest.raises(CheckpointError, match=rf"here is a checkpoint of another model \({message}"):
            check_same_model(manifest, other, True, "here")
    with pytest.raises(CheckpointError, match=r"here is sharded over ranks; expected a single file"):
        check_same_model(manifest, WEIGHTS, False, "here")


def test_names_of_weights_without_wrappers():
    inner = torch.nn.Linear(3, 2, bias=False)
    model = torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"_orig_mod": inner})})
    assert weight_shapes(model) == {"weight": [2, 3]}
    assert weight_shapes(torch.nn.ModuleDict({"submodule": inner})) == {"submodule.weight": [2, 3]}


# --- data only -------------------------------------------------------------------------------------------------------


class Payload:
    """Makes a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_index_is_read_as_data(tmp_path):
    index = tmp_path / ".metadata"
    index.write_bytes(pickle.dumps(Metadata(state_dict_metadata={})))
    assert holds_only_data(index) and holds_only_data(tmp_path / "__0_0.distcp")
    index.write_bytes(pickle.dumps(Payload(tmp_path / "was run")))
    with pytest.raises(CheckpointError, match=r"\.metadata contains a pickle that references posix\.mkdir"):
        holds_only_data(index)
    with pytest.raises(CheckpointError, match=r"x is damaged .*Use an earlier checkpoint"):
        read_index(io.BytesIO(b"\x80\x04garbage"), "x")
    assert not (tmp_path / "was run").exists()


class Attribute:
    """Is `getattr(owner, name)` when unpickled."""

    def __init__(self, owner: object, name: str) -> None:
        self.reduced = getattr, (owner, name)

    def __reduce__(self):
        return self.reduced


def test_members_of_enumerations_are_data_also_as_python_3_11_2_pickles_them():
    def read(owner: object, name: str) -> object:
        return read_index(io.BytesIO(pickle.dumps(Attribute(owner, name))), "x")

    member = next(iter(_MEM_FORMAT_ENCODING))
    assert read(_MEM_FORMAT_ENCODING, member.name) is member
    for owner, name in ((_MEM_FORMAT_ENCODING, "__class__"), (_MEM_FORMAT_ENCODING, "mro"), (PosixPath, "unlink")):
        with pytest.raises(CheckpointError, match=r"x contains a pickle that references builtins\.getattr"):
            read(owner, name)


def test_torch_runs_no_payload_though_composer_would_let_it(tmp_path):
    saved = io.BytesIO()
    torch.save({"state": Payload(tmp_path / "was run")}, saved)
    with safe_loading(), pytest.raises(pickle.UnpicklingError, match="mkdir"):
        torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
    assert not (tmp_path / "was run").exists()
    torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
    assert (tmp_path / "was run").exists()  # it would have been
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
