"""What a run says about itself: a banner, its progress, and the commands that come next, each of which works."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.fruit_lists import fruit_run
from support.killing import Run
from support.launching import REPOSITORY, run_python
from support.tiny_rerankers import new_contract, new_tokenizer
from support.tiny_training import new_hf_model

from rankllm_composer.cli import main
from rankllm_composer.model.attention import PACKED_SDPA, PACKED_VARLEN, slower_because
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.shards.contents import SetContents
from rankllm_composer.training.announcements import Banner, describe_outputs
from rankllm_composer.training.run import train

DEMO = REPOSITORY / "yamls" / "demo.yaml"


def pasted(text: str) -> list[list[str]]:
    """The commands of this package in a text, as words."""
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("rankllm-composer ")]


def options(words: list[str], command: str) -> dict[str, str]:
    """The options of a command line of this package."""
    assert words[:2] == ["rankllm-composer", command]
    return {flag.removeprefix("--"): value for flag, value in zip(words[2::2], words[3::2], strict=True)}


def succeed(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def test_a_run_announces_itself_and_the_commands_that_come_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(DEMO, [*fruit_run(tmp_path), "run.folder=run", "run.max_duration=1ba"])
    train(recipe)
    output = capsys.readouterr()
    before, first_batch, after = output.err.partition("reading and training the first batch")
    facts = dict(re.findall(r"^(run|device|precision|attention|weights|lists) +(.+)$", before, re.MULTILINE))
    assert first_batch and len(facts) == 6
    assert facts["run"] == "demo: new, until 1ba, in run"
    assert facts["device"].startswith("CPU, ") and facts["device"].endswith(" per rank; 1 rank")
    assert facts["precision"] == "float32"
    assert facts["attention"] == ("packed_sdpa, list by list, as the device is cpu, and the kernel needs CUDA")
    assert re.fullmatch(r".*/model, random; ([\d,]+) of \1 trained", facts["weights"])
    assert facts["lists"] == "12 per epoch, 4 per update; those over 256 tokens stop the run"
    for what in ("opening the shards", "loading the weights", "trying out a checkpoint and an export"):
        assert what in before
    assert "epoch 1  batch 1/1  ETA 0:00:00" in after and "writing the checkpoint ep0-ba1" in after
    assert "exporting run/hf/batch_1" in output.err
    assert "complete: checkpoint ep0-ba1 in run/checkpoints\n" in output.out
    commands = pasted(output.out)
    assert [words[1] for words in commands] == ["report", "rerank"]
    served = shlex.split(output.out.partition("serve it with rank_llm:")[2].replace("\\\n", " "))
    assert served[:2] == ["rank-llm", "rerank"] and "--requests-file=run/requests.jsonl" in served
    for _, *arguments in commands:
        succeed(*arguments)
    assert Path("run/report.html").exists() and len(Path("run/reranked.trec").read_text().splitlines()) == 24
    reranked = capsys.readouterr().out
    assert "requests: 12 queries" in reranked and "nDCG@10" in reranked
    command = reranked.partition("draw them with the run: ")[2].splitlines()[0]
    succeed(*shlex.split(command)[1:])
    assert capsys.readouterr().out.startswith("run/report.html: gains, ")
    train(recipe)
    output = capsys.readouterr()
    assert "nothing to train: run is complete, at batch 1, where run.max_duration=1ba is reached" in output.out
    assert pasted(output.out) == commands
    train(replace(recipe, run=replace(recipe.run, max_duration="2ba")))
    assert "demo: resumed from ep0-ba1, after batch 1, until 2ba, in run" in capsys.readouterr().err


def test_what_is_left_out_and_not_trained_is_in_the_banner(capsys):
    recipe = load_recipe(REPOSITORY / "yamls" / "first_mistral_lora.yaml", ["data.max_length_tokens=2048"])
    contents = SetContents(
        {("letters", 20): 90}, left_out={"records with errors": 1, "queries without relevant": 7, "none": 0}
    )
    model = new_hf_model()
    for weight in list(model.parameters())[1:]:
        weight.requires_grad_(False)
    model.config._attn_implementation = PACKED_SDPA
    state = SimpleNamespace(callbacks=[], device=SimpleNamespace(name="cpu"), model=model, fsdp_enabled=False)
    lines = Banner(recipe, contents, 88).lines(state)
    sizes = [weight.numel() for weight in model.parameters()]
    assert lines["weights"].endswith(
        f"; {sizes[0]:,} of {sum(sizes):,} trained (LoRA of rank {recipe.model.lora.rank})"
    )
    assert lines["lists"] == (
        "88 per epoch, 128 per update; those over 2,048 tokens are left out and counted; "
        "left out when the shards were built: 1 record with errors, 7 queries without relevant"
    )
    assert lines["precision"] == "bfloat16, weights in float32"


@pytest.mark.parametrize(
    "attention, device, precision, packing, reason",
    [
        (PACKED_VARLEN, "gpu", "amp_bf16", True, None),
        (PACKED_VARLEN, "gpu", "fp32", True, "attention is computed in float32"),
        (PACKED_SDPA, "cpu", "amp_bf16", True, "the device is cpu, and the kernel needs CUDA"),
        (PACKED_SDPA, "gpu", "amp_bf16", True, "model.attention is packed_sdpa"),
        ("sdpa", "gpu", "amp_bf16", False, "batch.packing is false"),
        ("flash_attention_2", "gpu", "amp_bf16", True, None),
    ],
)
def test_the_reason_for_a_slower_kernel(attention, device, precision, packing, reason):
    found = slower_because(attention, device, precision=precision, packing=packing)
    assert found == reason if reason is None else found.startswith(reason)


def test_an_older_gpu_is_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert slower_because(PACKED_SDPA, "gpu", precision="amp_bf16", packing=True).startswith("the GPU has compute")


@pytest.mark.parametrize("split", ["train", "eval"])
def test_reranking_is_proposed_with_the_first_stage_of_the_recipe(split, tmp_path):
    files = "{run: a b.trec, judgments: q.trec, queries: q.jsonl, docs: d.jsonl, duplicates: first}"
    overrides = [f"run.folder={tmp_path}", "checkpoint.export=null", f"data.{split}.source={files}"]
    if split == "eval":
        overrides += [f"data.eval={{local: held-out, source: {files}}}", "evaluation={}"]
        overrides.remove(f"data.eval.source={files}")
    recipe = load_recipe(DEMO, overrides)
    assert [words[1] for words in pasted(describe_outputs(recipe, (), None))] == ["report", "export"]
    adapter = tmp_path / "hf" / "epoch_0"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    text = describe_outputs(recipe, (adapter,), adapter)
    files = {"run": "a b.trec", "queries": "q.jsonl", "docs": "d.jsonl", "duplicates": "first"}
    ranked = {"qrels": "q.trec", "output": f"{tmp_path}/reranked.trec"}
    assert options(pasted(text)[-1], "rerank") == {"model": f"{tmp_path}/merged", **files, **ranked}
    assert ("held-out queries" in text) == (split == "eval")
    whole = tmp_path / "hf" / "epoch_1"
    whole.mkdir()
    (whole / "reranker.json").write_text(new_contract(new_tokenizer(), window_size=6, stride=3).to_json())
    text = describe_outputs(recipe, (whole,), whole)
    assert options(pasted(text)[-2], "rerank") == {"model": str(whole), **files, **ranked}
    assert options(pasted(text)[-1], "requests") == {**files, "output": f"{tmp_path}/requests.jsonl"}
    assert f"--requests-file={tmp_path}/requests.jsonl" in text


@pytest.mark.slow
def test_a_dry_run_does_everything_up_to_the_first_update_and_a_terminal_has_80_columns(tmp_path):
    overrides = fruit_run(tmp_path)
    command = ["-m", "rankllm_composer", "train", DEMO, "-n", "1", "--dry-run", *overrides]
    done = run_python(command, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert re.search(
        r"dry run: everything up to the first update worked \(losses of a microbatch: .*total [\d.]+", done.stdout
    )
    assert "lists     12 per epoch" in done.stdout and "epoch 1" not in done.stdout
    assert not list(tmp_path.glob("run/checkpoints/ep*")) and not list(tmp_path.glob("run/hf/*"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and (tmp_path / "shards" / "index.json").exists()
    assert "Waiting up to" not in done.stdout and "\x1b" not in done.stdout

    run = Run(DEMO, overrides[1:], tmp_path, ranks=1, is_patient=True, on_terminal=True)
    assert run.finish() == 0
    output = (tmp_path / "output-0.txt").read_bytes().decode().replace("\r\n", "\n")
    drawn = re.findall(r"\r\x1b\[K([^\r\n]+)(?=\r)", output)
    assert drawn and max(map(len, drawn)) < 80, output
    assert any(re.match(r"epoch 1/1  batch 3/3  ETA 0:00:00  .* tokens/s  loss ", line) for line in drawn)
    assert any(line.startswith("loading torch, Composer and transformers") for line in drawn)
    kept = [line.rpartition("\r\x1b[K")[2] for line in output.split("\n")]
    assert not [line for line in kept if line.startswith(("loading", "trying out", "writing"))]
    assert any(line.startswith("complete: checkpoint ep1-ba3 in ") for line in kept)
