"""`inspect`: what it shows of a record, and which problems it reports."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.launching import REPOSITORY
from support.real_tokenizers import build_tokenizer
from support.small_tokenizers import QWEN_WORDS, byte_level_tokenizer
from support.synthetic_records import conversation, write_jsonl
from transformers import AutoModelForCausalLM

from rankllm_composer.cli import main
from rankllm_composer.errors import ShardError
from rankllm_composer.export.serving_check import diff_request, inspect_folder, serving_differences
from rankllm_composer.model.losses import ranknet_loss
from rankllm_composer.options import BuildOptions, SourceOptions
from rankllm_composer.preflight.inspection import inspect_recipe, inspect_record
from rankllm_composer.prompts.contract import decoding_contract
from rankllm_composer.prompts.encoding import encode_record
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.shards.build import build_shards
from rankllm_composer.shards.read import SplitRecords, find_split

FIRST_MISTRAL = REPOSITORY / "yamls" / "first_mistral.yaml"
ZEPHYR = REPOSITORY / "yamls" / "rank_zephyr.yaml"
RECORD = Record.from_conversations(conversation(3))


@pytest.fixture(scope="module")
def material(tmp_path_factory, golden, mistral_v3_folder):
    """A folder with a tiny model and its tokenizer (`base`), and 7 records (`records.jsonl`)."""
    folder = tmp_path_factory.mktemp("inspect")
    shutil.copytree(mistral_v3_folder, folder / "base")
    for path in (golden / "tiny_mistral").iterdir():
        shutil.copy(path, folder / "base")
    write_jsonl(folder / "records.jsonl", (conversation(index) for index in range(7)))
    return folder


def overlay(material, *more):
    return [
        f"model.name_or_path={material / 'base'}",
        f"data.train.local={material / 'shards'}",
        f"data.train.source.input={material / 'records.jsonl'}",
        *more,
    ]


@pytest.mark.parametrize("objective", ["generation", "ranking", "combined"])
def test_kinds_and_marks(mistral_v3_tokenizer, objective):
    found = inspect_record(RECORD, mistral_v3_tokenizer, objective, max_length_tokens=400)
    encoded = encode_record(RECORD, mistral_v3_tokenizer, objective)
    assert found.problems == [] and found.length == len(encoded.input_ids) == len(found.kinds)
    assert [place for place, kind in enumerate(found.kinds) if kind == "score"] == [encoded.score_position]
    assert found.tokens[encoded.score_position] == "["
    marked = [token for token, kind in zip(found.tokens, found.kinds) if kind == "identifier"]
    trained = found.length - found.kinds.count("prompt")
    if objective == "ranking":
        assert marked == [] and trained == 1
    else:
        assert marked == re.findall("[A-Z]", RECORD.response)
        assert trained == found.length - encoded.response_start
    plain, colored = ("\n".join(found.lines(color)) for color in (False, True))
    assert "⟪[⟫" in plain and "\033" not in plain
    assert "\033[1;7;33m[\033[0m" in colored and "⟪" not in colored
    assert plain.count("⟦") == len(marked) + 1  # and the legend's
    assert f"length          {found.length:,} tokens of at most 400: fits" in plain


def test_long_lists_are_not_truncated(mistral_v3_tokenizer):
    complete = inspect_record(RECORD, mistral_v3_tokenizer, "combined", max_length_tokens=400)
    for too_long, outcome in (("drop", "drops and counts it"), ("refuse", "stops with an error")):
        found = inspect_record(RECORD, mistral_v3_tokenizer, "combined", max_length_tokens=50, too_long=too_long)
        (problem,) = found.problems
        assert f"is 50 but the list has {complete.length} tokens" in problem and outcome in problem
        assert found.tokens == complete.tokens


def test_identifiers_of_several_tokens_are_a_problem_for_scores(mistral_v3_tokenizer):
    numbers = Record.from_conversations(conversation(3, num_candidates=12, style="numbers"))
    found = inspect_record(numbers, mistral_v3_tokenizer, "combined", max_length_tokens=900)
    assert found.encoded is None and "[10] is several tokens" in found.problems[0]
    generated = inspect_record(numbers, mistral_v3_tokenizer, "generation", max_length_tokens=900)
    assert generated.problems == [] and any("not scored by its first token" in note for note in generated.notes)


def test_a_boundary_behind_the_bracket_is_shown():
    tokenizer = byte_level_tokenizer(QWEN_WORDS)
    best = RECORD.response[1]
    for objective, has_boundary in (("combined", True), ("ranking", False), ("generation", False)):
        found = inspect_record(RECORD, tokenizer, objective, max_length_tokens=2000)
        text = "\n".join(found.lines(color=False))
        boundary = (
            f"boundary        after token {found.encoded.score_position:,}: the tokenizer alone would join '[{best}'"
        )
        assert (boundary in text) == has_boundary and (f"⟪[⟫ ⟦{best}⟧ ⟨]⟩" in text) == has_boundary
        unscored = [note for note in found.notes if "not scored by its first token" in note]
        assert len(unscored) == (objective == "generation") and found.problems == []
    assert "[A] merges with its bracket in the token '[A'" in unscored[0]


TEMPLATES = {
    "drops": (
        "{% for m in messages if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% endfor %}",
        "omits the system turn",
    ),
    "fails": (
        "{% if messages[0].role != 'user' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}[INST] {{ m.content }}[/INST]{% endfor %}",
        "fails on the system role (no system)",
    ),
    "merges": ("{% for m in messages %}<s>[INST] {{ m.content }}[/INST]{% endfor %}", None),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template_that_changes_the_served_prompt_is_a_problem(mistral_v3_tokenizer, name):
    template, expected = TEMPLATES[name]
    tokenizer = copy.deepcopy(mistral_v3_tokenizer)
    tokenizer.chat_template = template
    problems = serving_differences(RECORD, tokenizer)
    assert problems == [] if expected is None else expected in problems[0]


def test_number_of_bos_tokens_is_compared_with_the_clients(mistral_v3_tokenizer):
    doubled = Record("q", "<s>" + RECORD.system, RECORD.user, RECORD.response)
    tokenizer = copy.deepcopy(mistral_v3_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}[/INST]{% endfor %}"  # the tokenizer adds one <s>
    (problem,) = inspect_record(doubled, tokenizer, "combined", max_length_tokens=400).problems
    assert "writes 2 beginning-of-sequence tokens before this record, but 1 before the inference client's" in problem
    notes = inspect_record(RECORD, mistral_v3_tokenizer, "combined", max_length_tokens=400).notes
    assert any("2 beginning-of-sequence tokens" in note for note in notes)  # the template's and the tokenizer's
    alone = copy.deepcopy(mistral_v3_tokenizer)  # writes <s> only where a system turn is
    alone.chat_template = (
        "{% if messages[0].role == 'system' %}<s>{% endif %}{% for m in messages %}{{ m.content }}[/INST]{% endfor %}"
    )
    without = Record("q", "", RECORD.user, RECORD.response)
    assert "writes 1 beginning-of-sequence tokens before this record, but 2" in serving_differences(without, alone)[0]


def test_what_is_shown_of_a_record_cannot_act_on_the_terminal(zephyr_v1_tokenizer):
    word = RECORD.user.split("[A] ")[1].split()[0]
    user = RECORD.user.replace(word, "\x1b[2J\x07\u202e")
    num = RECORD.response.count("[")
    record = replace(RECORD, id="\x1b]0;x\x07\nproblem: none", user=user, docids=tuple(["\x9bd\r\n"] * num))
    found = inspect_record(record, zephyr_v1_tokenizer, "generation", max_length_tokens=9000)
    lines = list(found.lines(color=False))
    assert lines[0] == "record \\x1b]0;x\\x07\\nproblem: none"
    assert all(line.isprintable() for line in lines) and any("\\x9bd\\r\\n" in line for line in lines)
    colors = re.compile(r"\x1b\[[0-9;]*m")
    assert all(colors.sub("", line).isprintable() for line in found.lines(color=True))


def test_notes(zephyr_v1_tokenizer):
    word = RECORD.user.split("[A] ")[1].split()[0]
    record = Record("q", "other", RECORD.user.replace(word, "</s>"), RECORD.response)
    notes = "\n".join(inspect_record(record, zephyr_v1_tokenizer, "generation", max_length_tokens=900).notes)
    assert "the system message differs from the inference client's" in notes
    assert "the padding token is the end-of-sequence token" in notes
    assert "contains </s>, which becomes a special token" in notes


def test_shards_and_their_source_have_the_same_records(material, tmp_path):
    lines = (material / "records.jsonl").read_text().splitlines()
    source = SourceOptions(input=material / "records.jsonl")
    before = SplitRecords([(str(tmp_path / "shards"), None)], source)
    for compression in ("zstd", None):
        place = tmp_path / f"shards-{compression}"
        build_shards(place, source, BuildOptions(shard_bytes=3000, compression=compression), lambda line: None)
        records = SplitRecords([(str(place), None)])
        assert len(records) == len(before) == 7 and list(records) == list(before)
        for number, line in enumerate(lines):
            assert records[number] == before[number] == Record.from_conversations(json.loads(line))
        with pytest.raises(ShardError, match=r"record is 7; expected 0 to 6"):
            records[7]
    with pytest.raises(ShardError, match="expected 0 to 6"):
        before[7]
    with pytest.raises(ShardError, match=r"no shards in .*absent and no source"):
        SplitRecords([("absent", None)])
    with pytest.raises(ShardError, match="owner/name is not on this machine"):
        SplitRecords([("absent", None)], SourceOptions(input="owner/name"))


def test_only_absent_shards_count_as_absent(tmp_path):
    assert find_split([("absent", None)]) is None
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ShardError, match="damaged"):
        find_split([(str(tmp_path), None)])


def test_losses_equal_those_of_the_plain_model(material):
    """Against a plain Hugging Face forward of the same record, with the loaded and with random weights."""
    recipe = load_recipe(FIRST_MISTRAL, overlay(material))
    found = inspect_recipe(recipe, 2, loss=True)
    model = AutoModelForCausalLM.from_pretrained(material / "base").eval()
    encoded = found.encoded
    ids = torch.from_numpy(encoded.input_ids.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    rows = range(encoded.response_start - 1, len(ids) - 1)
    nats = [-torch.log_softmax(logits[row], -1)[ids[row + 1]] for row in rows]
    scores = logits[encoded.score_position][torch.from_numpy(encoded.identifier_token_ids.astype(np.int64))]
    ranking = ranknet_loss(scores[None], torch.from_numpy(encoded.ranks)[None], weighted=True)
    assert found.losses["language_modelling"] == pytest.approx(float(torch.stack(nats).mean()), rel=1e-4)
    assert found.losses["ranking"] == pytest.approx(float(ranking), rel=1e-4)
    parts = found.losses["language_modelling"] + 10 * found.losses["ranking"]
    assert found.losses["total"] == pytest.approx(parts, rel=1e-6)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-3, atol=1e-5)
    fresh = inspect_recipe(load_recipe(FIRST_MISTRAL, overlay(material, "model.random_weights=true")), 2, loss=True)
    assert np.isfinite(fresh.losses["total"]) and fresh.losses != found.losses


def test_command(material, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["inspect", *map(str, arguments)])
        return stop.value.code or 0, *capsys.readouterr()

    code, out, err = run(FIRST_MISTRAL, *overlay(material), "--record", "4")
    assert code == 0 and "error" not in err and out.startswith("record q4\n") and "score position  token" in out
    code, out, err = run(ZEPHYR, *overlay(material, "data.train.identifiers=numbers"))
    assert code == 0 and "⟦1⟧" in out
    code, out, err = run(FIRST_MISTRAL, *overlay(material, "data.max_length_tokens=64"))
    assert code == 2 and "problem: data.max_length_tokens" in out and "1 problem, see above" in err
    assert run()[0] == run(FIRST_MISTRAL, "--model", material)[0] == 2
    code, _, err = run("--model", material / "base")
    assert code == 2 and "no contract" in err


def test_passages_without_spaces_and_several_readings_are_noted(mistral_v3_tokenizer):
    """Lists that the client would show empty, hold an empty passage, or can be read in several ways."""
    chinese = "检索模型按照与查询的相关性对段落排序、" * 13

    def notes(passages, limit=4096):
        record = Record("r", SYSTEM_MESSAGE, render_user_turn("heat", passages), "[B] > [A]")
        return "\n".join(inspect_record(record, mistral_v3_tokenizer, "generation", max_length_tokens=limit).notes)

    assert "rank_llm would show every passage of this list empty" in notes([chinese, chinese], 500)
    assert "rank_llm would" not in notes([chinese, chinese])
    assert "1 of 2 passages are empty" in notes(["", "heat"])
    several = notes(["one\n[B] two", "three"])
    assert "has several readings" in several and "differs from the inference client's" not in several


def test_an_exported_folder_against_its_contract(material, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(material / "base", folder)
    tokenizer = build_tokenizer("mistral_v3")
    tokenizer.save_pretrained(folder)
    contract = decoding_contract(tokenizer, "combined")
    (folder / "reranker.json").write_text(contract.to_json())
    found = inspect_folder(folder)
    assert (found.contract, found.problems, found.request.num_differences) == (contract, (), 0)
    assert found.warnings == () and found.request.rows[-1] == (" ", "[")  # appended, as the client does

    older = json.loads(decoding_contract(tokenizer, "combined", num_identifiers=10, client_version="0.25.7").to_json())
    del older["client_version"], older["bracket_merges"]
    (folder / "reranker.json").write_text(json.dumps(older))
    found = inspect_folder(folder)
    assert found.problems == () and found.request.rows[-1] != (" ", "[")
    (note,) = found.warnings
    assert "made for rank_llm 0.25.7; 0.26.0 shows the same prompts in full windows by: rank-llm rerank" in note
    assert "--max-passage-words=600 " in note
    older |= {"objective": "ranking", "max_passage_words": 150}
    (folder / "reranker.json").write_text(json.dumps(older))
    notes = inspect_folder(folder).warnings
    assert "rank_llm 0.25.7 cannot serve it: a model trained by ranking alone never learned to write an ans" in notes[0]
    assert "0.25.7 shows up to 600 words of a passage in windows of 10, where the model was trained with up" in notes[1]
    assert "--use-logits" in notes[2] and "--max-passage-words" not in notes[2]

    changed = json.loads(contract.to_json())
    changed["identifier_token_ids"][0] = 5
    changed["context_size_tokens"] = 9000
    changed["num_bos"] = 1
    (folder / "reranker.json").write_text(json.dumps(changed))
    problems = "\n".join(inspect_folder(folder).problems)
    for told in (
        "identifier_token_ids is (5, ",
        "context_size_tokens is 9000, but the folder has 4096",
        "num_bos is 1",
    ):
        assert told in problems

    (folder / "reranker.json").write_text(contract.to_json())
    tokenizer.chat_template = TEMPLATES["drops"][0]
    tokenizer.save_pretrained(folder)
    problems = "\n".join(inspect_folder(folder).problems)
    assert "chat_template_sha256 is" in problems and "omits the system turn" in problems


def test_request_is_diffed_token_by_token(mistral_v3_tokenizer, zephyr_v1_tokenizer):
    """What one side alone has is marked in its place, and nothing else: two <s>, a system text that is lost."""
    for tokenizer, num_bos in ((mistral_v3_tokenizer, 2), (zephyr_v1_tokenizer, 0)):
        found = diff_request(tokenizer)
        assert found.num_differences == 0
        tokens = [token for _, token in found.rows]
        assert tokens[: num_bos + 1].count("<s>") == num_bos or tokens[0] == "<s>"
        text = tokenizer.convert_tokens_to_string(tokens)
        assert "café" in text and "[A]" in text and "see (12) and [a]" in text  # mended, and as the client shows it
        (head, *_) = found.lines(False)
        assert head == f"sample request: {len(tokens)} tokens here, {len(tokens)} on the client's server, identical"

    drops = copy.deepcopy(mistral_v3_tokenizer)
    drops.chat_template = TEMPLATES["drops"][0]
    found = diff_request(drops)
    alone = [token for mark, token in found.rows if mark == "-"]
    assert [mark for mark, _ in found.rows if mark == "+"] == []
    assert "RankLLM" in drops.convert_tokens_to_string(alone) and "identifier" not in "".join(alone)
    plain, colored = ("\n".join(found.lines(color)) for color in (False, True))
    assert f"{len(alone)} differ" in plain
    assert plain.count("⟨-") == len(alone) + 1  # and the legend's
    assert colored.count("\033[31m") == len(alone) and "⟨+" in plain.splitlines()[1]
