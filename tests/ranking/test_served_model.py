"""What reranks: any HF folder that the options describe, no code and no files of strangers; what could not be read."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_rerankers import KnownReranker, new_contract, new_model, new_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from rankllm_composer.cli import main
from rankllm_composer.errors import ModelError, PromptError, RunError
from rankllm_composer.export.serving_check import inspect_folder
from rankllm_composer.options import RerankOptions
from rankllm_composer.prompts.contract import decoding_contract
from rankllm_composer.ranking.rerank import RerankFiles, rerank_files, write_run
from rankllm_composer.ranking.reranker import Reranker

QUERIES = {"one": "heat", "two": "flow"}
RUN = {qid: [f"{qid}-{i}" for i in range(5)] for qid in QUERIES}
DOCUMENTS = {docid: f"wing w{i * 7 % 10}" for docids in RUN.values() for i, docid in enumerate(docids)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A folder as others publish it: weights and a tokenizer, no reranker.json."""
    folder = tmp_path_factory.mktemp("plain")
    new_model(seed=4).save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def command(tmp_path, capsys):
    """Runs `rerank` on the files of the collection; returns exit code, output and error."""
    for name, key, texts in (("queries", "qid", QUERIES), ("docs", "docid", DOCUMENTS)):
        lines = [json.dumps({key: id, "text": text}) + "\n" for id, text in texts.items()]
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(lines))
    write_run(tmp_path / "run.trec", RUN)

    def rerank(model, *arguments, output=tmp_path / "out.trec"):
        files = [f"--queries={tmp_path}/queries.jsonl", f"--docs={tmp_path}/docs.jsonl", f"--run={tmp_path}/run.trec"]
        with pytest.raises(SystemExit) as ended:
            main(["rerank", "--model", str(model), *files, "--output", str(output), *arguments])
        return ended.value.code or 0, *capsys.readouterr()

    return rerank


@pytest.mark.parametrize(
    ("options", "objective"),
    [
        (RerankOptions(decoding="generation", identifiers="numbers", window_size=3, stride=1), "generation"),
        (RerankOptions(decoding="first_token", identifiers="letters", window_size=4), "combined"),
        (RerankOptions(objective="ranking", identifiers="letters", window_size=5, context_size_tokens=300), "ranking"),
    ],
    ids=["generation", "first token", "ranking"],
)
def test_any_folder_reranks_as_the_options_describe_it(plain, command, tmp_path, options, objective):
    tokenizer = new_tokenizer()
    contract = decoding_contract(
        tokenizer,
        objective,
        options.identifiers,
        num_identifiers=options.window_size,
        stride=options.stride,
        context_size_tokens=options.context_size_tokens or 4096,
    )
    expected = Reranker(new_model(seed=4), tokenizer, contract, options)
    loaded = Reranker.from_pretrained(plain, options)
    assert loaded.contract == expected.contract == contract
    assert loaded.decoding == ("generation" if objective == "generation" else "first_token")
    rankings = [list(reranker.rerank_queries(QUERIES, DOCUMENTS, RUN)) for reranker in (loaded, expected)]
    assert rankings[0] == rankings[1]

    given = {name: value for name, value in dataclasses.asdict(options).items() if value and name in vars(options)}
    flags = [
        f"--{name.replace('_size', '').replace('_', '-')}={given[name]}" for name in ("window_size", "identifiers")
    ]
    flags += [
        f"--{name.replace('_', '-')}={given[name]}" for name in ("decoding", "objective", "stride") if name in given
    ]
    code, _, err = command(plain, *flags, *(["--context-size-tokens=300"] if objective == "ranking" else []))
    assert code == 0, err
    lines = [line.split() for line in (tmp_path / "out.trec").read_text().splitlines()]
    assert [line[2] for line in lines] == [docid for query in rankings[0] for docid in query.docids]


def test_what_a_folder_without_contract_needs_is_named_and_works(plain, command):
    given: list[str] = []
    code, _, err = command(plain)
    assert code == 2 and "has no reranker.json" in err
    for part in err.partition("Add what it was trained with: ")[2].removesuffix(".\n").split(", --"):
        flag, value = shlex.split(part.removeprefix("--"))[:2]
        given.append(f"--{flag}={value}")
    assert [flag.partition("=")[0] for flag in given] == ["--decoding", "--identifiers", "--window"]
    code, _, err = command(plain, *given[:2])
    assert code == 2 and err.endswith("Add what it was trained with: --window 20.\n")
    code, _, err = command(plain, *given)
    assert code == 0, err


def test_options_that_contradict_the_contract_are_refused(plain, tmp_path):
    folder = tmp_path / "exported"
    shutil.copytree(plain, folder)
    contract = new_contract(new_tokenizer(), window_size=8, stride=6)
    (folder / "reranker.json").write_text(contract.to_json())
    for option, message in (
        (RerankOptions(identifiers="numbers"), r"identifiers is numbers, but .* trained with letters .* Leave it out"),
        (RerankOptions(objective="ranking"), r"objective is ranking, but .* trained with combined .* Leave it out"),
    ):
        with pytest.raises(RunError, match=message):
            Reranker.from_pretrained(folder, option)
    kept = Reranker.from_pretrained(folder, RerankOptions(identifiers="letters", context_size_tokens=999)).contract
    assert kept == dataclasses.replace(contract, context_size_tokens=999)
    narrow = Reranker.from_pretrained(folder, RerankOptions(window_size=4)).contract
    assert (narrow.window_size, narrow.stride) == (4, 2)  # the contract's stride would not fit


def test_what_is_neither_a_folder_nor_a_model_is_named(command, tmp_path):
    for name in ("nobody/no-such-model", str(tmp_path / "missing"), "./missing"):
        code, _, err = command(name, "--decoding=generation", "--identifiers=letters", "--window=4")
        assert code == 2 and name in err and "Traceback" not in err
    code, _, err = command(tmp_path, "--decoding=generation", "--identifiers=letters", "--window=4")
    assert code == 2 and "cannot load" in err


def test_a_short_model_gets_its_own_context_and_another_tokenizer_is_refused(plain, tmp_path):
    folder, options = tmp_path / "short", RerankOptions(decoding="generation", identifiers="letters", window_size=4)
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    assert Reranker.from_pretrained(folder, options).contract.context_size_tokens == 512
    assert Reranker.from_pretrained(plain, options).contract.context_size_tokens == 4096
    longer = new_tokenizer()
    longer.add_tokens(["<more>"])
    longer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"the tokenizer has .* tokens but the model only"):
        Reranker.from_pretrained(folder, options)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()

class StrangeConfig(LlamaConfig):
    model_type = "strange"

class StrangeModel(LlamaForCausalLM):
    config_class = StrangeConfig
"""


def test_code_of_a_model_runs_only_with_the_flag(plain, command, tmp_path, monkeypatch):
    """Nobody is asked, also on a terminal: the answer yes would be taken from standard input."""
    folder, mark = tmp_path / "strange", tmp_path / "mark"
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "architectures": ["StrangeModel"]}
    config["auto_map"] = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    described = ["--decoding=first_token", "--identifiers=letters", "--window=4"]
    code, _, err = command(folder, *described)
    assert code == 2 and "trust_remote_code" in err and not mark.exists()
    (folder / "reranker.json").write_text(new_contract(new_tokenizer()).to_json())
    with pytest.raises(ModelError, match="trust_remote_code"):
        inspect_folder(folder)
    assert not mark.exists()
    with pytest.warns(UserWarning, match="Python code shipped with"):
        code, _, err = command(folder, "--trust-remote-code")
    assert code == 0 and mark.exists(), err
    with pytest.warns(UserWarning, match="Python code shipped with"):
        assert inspect_folder(folder, trust_remote_code=True).contract.window_size == 20


@pytest.mark.parametrize("named", ["../plain/model.safetensors", "/etc/passwd", 7])
def test_an_index_of_weights_stays_in_its_folder(plain, tmp_path, named):
    shutil.copytree(plain, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": named}}))
    with pytest.raises(ModelError, match=r"names the file .* which is not in its folder"):
        Reranker.from_pretrained(tmp_path / "model")


def test_what_the_end_needs_is_tried_first(plain, command, tmp_path):
    """No model is loaded for a run that could not be written, measured or added to a card."""
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "out.trec"):
        code, _, err = command("no/model", output=output)
        assert code == 2 and "the run cannot be written" in err
    (tmp_path / "qrels").write_text("one 0 one-0 1\n")
    code, _, err = command("no/model", f"--qrels={tmp_path}/qrels", "--measure=RBP(p=2,rel=1)")
    assert code == 2 and "measure is 'RBP(p=2,rel=1)', which ir-measures cannot compute" in err
    code, _, err = command("no/model", "--measure=AP")
    assert code == 2 and "--measure need --qrels" in err
    code, _, err = command("no/model", f"--qrels={tmp_path}/qrels", "--card")
    assert code == 2 and "no model card that can be written" in err
    described = RerankOptions(decoding="generation", identifiers="letters", window_size=4)
    files = RerankFiles(
        queries=tmp_path / "queries.jsonl",
        documents=tmp_path / "docs.jsonl",
        first_stage=tmp_path / "run.trec",
        output=tmp_path / "new" / "out.trec",
    )
    for change, message in (
        ({"device": "cuda:99"}, "device is 'cuda:99'"),
        ({"context_size_tokens": 90}, "window one"),
    ):
        with pytest.raises((RunError, PromptError), match=message):
            rerank_files(plain, files, dataclasses.replace(described, **change), progress_bar=False)
    assert len(rerank_files(plain, files, described, progress_bar=False).queries) == 2


class MuteReranker(KnownReranker):
    """Never writes an identifier, nor has one among its likeliest tokens."""

    def next_token_logits(self, tokens: list[int]) -> torch.Tensor:
        logits = torch.full_like(super().next_token_logits(tokens), -20.0)
        logits[-40:] = 1.0
        return logits


@pytest.mark.parametrize("decoding", ["first_token", "generation"])
def test_windows_that_could_not_be_read_are_counted(decoding, tmp_path):
    tokenizer = new_tokenizer()
    contract = new_contract(tokenizer, window_size=3, stride=2)
    for model, num_unread in ((MuteReranker(), 2), (KnownReranker(), 0)):
        reranker = Reranker(model, tokenizer, contract, RerankOptions(decoding=decoding))
        ranked = list(reranker.rerank_queries(QUERIES, DOCUMENTS, RUN))
        assert [query.num_unread for query in ranked] == [num_unread] * 2
        assert all((list(query.docids) == RUN[query.qid]) == bool(num_unread) for query in ranked)


CHINESE = "检索模型按照与查询的相关性对段落排序、" * 13


def test_passages_that_the_client_would_empty_are_counted_and_said(mistral_v3_tokenizer, command, tmp_path):
    sizes = {"vocab_size": len(mistral_v3_tokenizer), "hidden_size": 8, "intermediate_size": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    mistral_v3_tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"docid": docid, "text": f"{i}{CHINESE}"}) for i, docid in enumerate(DOCUMENTS)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    described = ["--decoding=first_token", "--identifiers=letters", "--window=5", "--top-k=5"]
    code, out, err = command(tmp_path / "model", *described, "--context-size-tokens=800")
    assert code == 0, err
    assert "2 of 2 windows hold passages without spaces" in out and "rank_llm would show every passage" in out
    assert "shown empty, as" not in out
    code, out, err = command(tmp_path / "model", *described, "--context-size-tokens=4096")
    assert code == 0 and "without spaces" not in out
