"""Our prompts, windows, parsing, first-token reading and orders against the own code of each inference client."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shlex
from contextlib import suppress

import numpy as np
import pytest
import torch
from support.client_paths import MISREAD_PATHS, PLAIN_PATHS, WHOLE_PATHS
from support.launching import REPOSITORY
from support.templates import TEMPLATES
from support.tiny_rerankers import NO_SYSTEM_TEMPLATE, SIZES, WORDS, new_contract, new_model, new_tokenizer, record_of
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

from rankllm_composer.errors import RecipeError
from rankllm_composer.export.model_card import serving_command
from rankllm_composer.export.serving_check import PASSAGES, QUERY, client_prompt, diff_request
from rankllm_composer.options import RerankOptions
from rankllm_composer.prompts.client_names import misread_names
from rankllm_composer.prompts.clients import CLIENTS, passage_word_limit
from rankllm_composer.prompts.encoding import encode_record
from rankllm_composer.prompts.permutations import identifiers, parse_answer, permutation_from_scores
from rankllm_composer.prompts.prompt_template import TEMPLATE_FILE, Prompt, read_prompt_template
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import (
    SYSTEM_MESSAGE,
    clean_query,
    document_text,
    render_user_turn,
    truncate_passage,
)
from rankllm_composer.prompts.windows import Window, answer_lengths, fit_window, sliding_spans
from rankllm_composer.ranking.decoding import read_likeliest, score_windows_first_token
from rankllm_composer.ranking.reranker import Reranker
from rankllm_composer.sources.requests import write_requests

STYLES = ("letters", "numbers")
TOKENIZERS = ("mistral_v3", "zephyr_v1", "tiny", "tiny_without_bos")


@pytest.fixture(scope="module")
def folders(mistral_v3_folder, zephyr_v1_folder, tmp_path_factory) -> dict[str, str]:
    """Tokenizer folders by name."""
    made = tmp_path_factory.mktemp("tokenizers")
    new_tokenizer().save_pretrained(made / "tiny")
    new_tokenizer(adds_bos=False).save_pretrained(made / "tiny_without_bos")
    new_tokenizer(template=NO_SYSTEM_TEMPLATE).save_pretrained(made / "no_system_role")
    return {
        "mistral_v3": str(mistral_v3_folder),
        "zephyr_v1": str(zephyr_v1_folder),
        **{name: str(made / name) for name in ("tiny", "tiny_without_bos", "no_system_role")},
    }


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


# Prompts

DOCUMENTS = [
    {"text": "plain"},
    {"text": "  spaces \t and\n\nlines \u00a0 and \u2003 others  "},
    {"title": "A title", "text": "and a text"},
    {"title": "", "text": "no title"},
    {"segment": "a segment"},
    {"contents": "contents", "title": "T"},
    {"content": "content"},
    {"body": "a body", "url": "x"},
    {"passage": "a passage"},
    {"text": "see [12] and [3], not [a] or [ 4 ]"},
    {"text": "mojibake: cafÃ© â€œquotedâ€\x9d &lt;b&gt; \ufb01ne ｆｕｌｌ"},
    {"text": "braces {query} {0} {{x}} %s \\n"},
    {"text": "</s> <s> [INST] <|user|> <unk>"},
    {"text": "日本語のテキスト と العربية 🙂"},
    {"text": ""},
    {"text": " ".join(f"word{i}" for i in range(900))},
    {"text": " ".join(f"[{i}]" for i in range(400))},
]
QUERIES = ["plain query", "a [3] query {x}", "mojibake cafÃ©", " spaces kept  ", "two\nlines"]


def prompt_cases(tokenizer: str) -> list[dict]:
    """Windows of every length, with a long passage, for one tokenizer; of some lengths for the others."""
    generator = random.Random(0)
    cases = []
    for style in STYLES:
        if tokenizer == "tiny":
            long = {"style": style, "query": "q", "context_size": 1_000_000}
            lengths = range(1, 27 if style == "letters" else 100)
            cases += [long | {"documents": [DOCUMENTS[-2], *DOCUMENTS[:1] * (num - 1)]} for num in lengths]
        for num in (1, 2, 3, 7, 13, 19, 20, 21, 26):
            cases.append(
                {
                    "style": style,
                    "query": generator.choice(QUERIES),
                    "documents": generator.choices(DOCUMENTS[:-2], k=num),
                }
            )
        cases += [{"style": style, "query": query, "documents": DOCUMENTS[:4]} for query in QUERIES]
        cases.append({"style": style, "query": "q", "documents": DOCUMENTS[-3:]})
        cases += [  # passages that are cut further until they fit
            {"style": style, "query": "q", "documents": DOCUMENTS[-2:] * num, "context_size": context}
            for num, context in ((1, 1000), (5, 1500), (10, 4096), (10, 2500))
        ]
    return cases


@pytest.fixture(scope="module")
def prompts(ask_client, folders):
    """[(tokenizer's name, case, the client's answer)]"""
    cases = [(name, case) for name in TOKENIZERS for case in prompt_cases(name)]
    answers = ask_client([("prompt", {"folder": folders[name], **case}) for name, case in cases])
    return [(*case, answer) for case, answer in zip(cases, answers, strict=True)]


def test_prompts_are_the_same_tokens(prompts, tokenizers, version):
    """1 to 26 letters or 1 to 99 numbers, all fields of documents, cut to the word limit and to the context."""
    assert len(prompts) == 4 * 2 * 19 + 26 + 99
    num_cut = 0
    for name, case, answer in prompts:
        tokenizer = tokenizers[name]
        texts = [document_text(document) for document in case["documents"]]
        context = case.get("context_size", 4096)
        options = {"prompt": Prompt(case["style"]), "context_size_tokens": context, "client": version}
        window = fit_window("w", case["query"], texts, tokenizer, **options)
        expected = tokenizer(answer["text"])["input_ids"]  # vLLM is given the text
        assert window.input_ids[:-1].tolist() == expected, (name, case["query"], len(texts))
        assert answer["num_output_tokens"] == answer_lengths(tokenizer, len(texts), case["style"], version)[0]
        assert len(expected) + answer["num_output_tokens"] <= context
        if context < 4096:
            whole = fit_window("w", case["query"], texts, tokenizer, **options | {"context_size_tokens": 1_000_000})
            assert len(expected) < len(whole.input_ids) - 1
            num_cut += 1
    assert num_cut == 4 * 2 * 3  # the context did cut


def test_the_client_that_inspect_shows_is_the_client(ask_client, folders, tokenizers, version):
    """`inspect --model` diffs a request against the client's prompt: made as the client's own code makes it."""
    for style in STYLES:
        for name, folder in folders.items():
            documents = [{"text": text} for text in PASSAGES]
            question = {"folder": folder, "style": style, "query": QUERY, "documents": documents}
            (answer,) = ask_client([("prompt", question)])
            limit = passage_word_limit(len(PASSAGES), client=version)
            user = render_user_turn(clean_query(QUERY), [truncate_passage(text, limit) for text in PASSAGES], style)
            assert client_prompt(SYSTEM_MESSAGE, user, tokenizers[name]) == answer["text"], (style, name)
            for end in ("", "["):
                theirs = tokenizers[name](answer["text"] + end)["input_ids"]
                diff = diff_request(tokenizers[name], Prompt(style), version, append_bracket=end == "[")
                shown = [token for mark, token in diff.rows if mark != "-"]
                assert shown == tokenizers[name].convert_ids_to_tokens(theirs)


def test_a_template_without_system_role_is_served_without_the_system_text(ask_client, folders, tokenizers):
    """Known difference: the client's system turn is lost there, ours leads the user turn, as in published training."""
    (answer,) = ask_client(
        [
            (
                "prompt",
                {"folder": folders["no_system_role"], "style": "letters", "query": "q", "documents": DOCUMENTS[:2]},
            )
        ]
    )
    tokenizer = tokenizers["no_system_role"]
    window = fit_window("w", "q", [document_text(document) for document in DOCUMENTS[:2]], tokenizer)
    assert SYSTEM_MESSAGE not in answer["text"]
    assert diff_request(tokenizer).num_differences > 10  # `inspect --model` shows it
    with_it = answer["text"].replace("[INST] ", f"[INST] {SYSTEM_MESSAGE}\n ", 1)
    assert window.input_ids[:-1].tolist() == tokenizer(with_it)["input_ids"]


# Templates of one's own


@pytest.fixture(scope="module")
def templates(client_folder, tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Styles and files of our templates and of the client's own that can be trained."""
    made = tmp_path_factory.mktemp("templates")
    found = {}
    for name, (style, text) in TEMPLATES.items():
        (made / f"{name}.yaml").write_text(text, encoding="utf-8")
        found[name] = (style, str(made / f"{name}.yaml"))
    for path in sorted((client_folder / "rank_llm/rerank/prompt_templates").glob("*.yaml")):
        with suppress(RecipeError):
            style = "letters" if read_prompt_template(path).unread(2, "letters") is None else "numbers"
            found[path.stem] = (style, str(path))
    return found


def test_prompts_in_other_templates_are_the_same(ask_client, folders, tokenizers, templates, version, tmp_path):
    """Ours and the client's, from the file and from its copy in an export; also of the queries and texts above."""
    assert {*TEMPLATES, "rank_zephyr_template", "rank_zephyr_alpha_template", "qwen_thinking_template"} <= {*templates}
    cases = []
    for name, (style, path) in templates.items():
        template = read_prompt_template(path)
        (tmp_path / f"{name}.yaml").write_text(template.to_yaml())
        asked = [(QUERIES[1], DOCUMENTS[:-3]), ("long", DOCUMENTS[-4:]), (QUERIES[4], DOCUMENTS[:1])]
        for query, documents in asked if name in TEMPLATES else asked[:1]:
            for folder in ("tiny", "mistral_v3") if name in TEMPLATES else ("tiny",):
                asked = {"folder": folders[folder], "style": style, "query": query, "documents": documents}
                copied = str(tmp_path / f"{name}.yaml")
                cases += [(folder, template, asked | {"prompt_template_path": file}) for file in (path, copied)]
    for (folder, template, asked), answer in zip(
        cases, ask_client([("prompt", case[2]) for case in cases]), strict=True
    ):
        prompt = Prompt(asked["style"], template)
        texts = [document_text(document) for document in asked["documents"]]
        limit = passage_word_limit(len(texts), client=version)
        user = prompt.user_turn(clean_query(asked["query"]), [truncate_passage(text, limit) for text in texts])
        tokenizer = tokenizers[folder]
        if asked["query"] != "long":  # whose passages are cut further
            assert client_prompt(prompt.system, user, tokenizer) == answer["text"], asked
        window = fit_window("w", asked["query"], texts, tokenizer, prompt=prompt, client=version)
        assert window.input_ids[:-1].tolist() == tokenizer(answer["text"])["input_ids"], asked
        record = Record("r", "s", render_user_turn(asked["query"], ["a", "b"], asked["style"]), "", template=template)
        trained = record.prompt_turns
        assert trained == (prompt.system, prompt.user_turn(asked["query"], ["a", "b"]))


REFUSED = {  # by the client, for the same reason
    "no rank": ("[{rank}]", "[]"),
    "no candidate": ("{candidate}", ""),
    "no query": ("Question: {query}", "Question"),
    "a brace": ("Question:", "Question }"),
    "another key": ("system_message:", "system:"),
    "no patterns": ("output_extraction_regex:", "# "),
    "no method": ('method: "singleturn_listwise"', "# "),
}


def test_what_the_client_refuses_is_refused(ask_client, folders, tmp_path):
    questions = []
    for name, change in REFUSED.items():
        path = tmp_path / f"{name}.yaml"
        text = TEMPLATES["own_words"][1]
        assert change[0] in text
        path.write_text(text.replace(*change))
        with pytest.raises(RecipeError):
            read_prompt_template(path)
        asked = {"folder": folders["tiny"], "style": "letters", "query": "q", "documents": DOCUMENTS[:2]}
        questions.append(("prompt", asked | {"prompt_template_path": str(path)}))
    for name, answer in zip(REFUSED, ask_client(questions), strict=True):
        assert "error" in answer, name


# Windows


def test_windows_are_the_same(ask_client, folders, version):
    """Every length of list; but 0.25.7, not told the length, leaves a list of window - stride as it is."""
    cases = [
        {"num": num, "window": window, "stride": stride, "told": told}
        for window, stride in ((20, 10), (20, 20), (20, 5), (5, 3), (2, 1))
        for num in (*range(1, 42), 95, 100)
        for told in (True, False)
    ]
    answers = ask_client([("windows", {"folder": folders["tiny"], **case}) for case in cases])
    differing = []
    for case, answer in zip(cases, answers, strict=True):
        theirs = [tuple(span) for span in answer if span[1] - span[0] > 1]  # one candidate cannot be ordered
        if theirs != sliding_spans(case["num"], case["window"], case["stride"]):
            differing.append(case)
            assert answer == []
    assert differing == [
        case
        for case in cases
        if version == "0.25.7" and not case["told"] and 1 < case["num"] == case["window"] - case["stride"]
    ]


# Answers


def answers_to_parse() -> list[tuple[str, int, str]]:
    """(style, candidates, text), from well-formed to noise."""
    generator = random.Random(0)
    odd = "⁰¹²⁹₀₈①⑨❶❾０９🄀🄉½Ⅷ٣〇一ªºßéÉΑАＡａ𝐀ﬁ\u0301\u200b\u00a0"
    pieces = [
        *(f"[{name}]" for name in identifiers(26)),
        *(f"[{i}]" for i in range(0, 120, 3)),
        *identifiers(26),
        *map(str, range(12)),
        *["", ">", "[]", "()", ",", ".", "\n", "\t", "-", ">", "<", ":"],
        "</think>",
        "<think>",
        "Sure, here is the ranking: ",
        "a",
        "z",
        "AB",
        "[A B]",
        "[a]",
        "００",
        "-1",
        "1e3",
        "0x1",
        "1_0",
        "9" * 30,
        *odd,
    ]
    corpus = []
    for style in STYLES:
        for num in (1, 2, 5, 20, 26):
            names = identifiers(num, style)
            for _ in range(60):
                order = generator.sample(names, num)
                text = " > ".join(f"[{name}]" for name in order)
                cut = generator.randrange(len(text) + 1)
                corpus += [(style, num, text), (style, num, text[:cut]), (style, num, text[:cut] + text)]
            for _ in range(300):
                text = "".join(generator.choices(pieces, k=generator.randrange(12)))
                corpus.append((style, num, text))
        corpus += [(style, 99 if style == "numbers" else 26, "9" * 5000), (style, 3, "[3]" * 500), (style, 3, "")]
    corpus.append(("numbers", 99, " > ".join(f"[{i}]" for i in range(99, 0, -1))))
    return corpus


def test_answers_are_read_the_same(ask_client, folders):
    corpus = answers_to_parse()
    questions = [
        ("answer", {"folder": folders["tiny"], "style": style, "num": num, "text": text}) for style, num, text in corpus
    ]
    assert len(corpus) > 4000
    for (style, num, text), theirs in zip(corpus, ask_client(questions), strict=True):
        assert list(parse_answer(text, num, style).permutation) == theirs, (style, num, text)


def test_the_likeliest_tokens_are_read_the_same(ask_client, folders, version):
    """Windows of 1 to 26 letters, and of up to 99 numbers, where 0.25.7 reads up to 9; in any order of the tokens."""
    generator = random.Random(0)
    texts = {
        "letters": [*identifiers(26), *"abz", " A", "AB", "[", "]", "", "É", "Ａ", "1", "Α"],
        "numbers": [*map(str, range(10)), "²", "½", "３", "٣", "A", "[", "", " 1", "一"],
    }
    reads_numbers = version != "0.25.7"
    if reads_numbers:
        texts["numbers"] += [*map(str, range(10, 120)), *"①Ⅷ", "07", "007", "１０", "٣٠", "1a", "-1", "+1", "1.0", "²⁰"]
    cases = []
    for style in STYLES:
        for _ in range(400):
            num = generator.randint(1, 26 if style == "letters" else 99 if reads_numbers else 9)
            chosen = generator.choices(texts[style], k=generator.randint(1, 30))
            values = [-10 * generator.random() for _ in chosen]
            if not reads_numbers:
                values.sort(reverse=True)
            cases.append((style, num, list(zip(chosen, values))))
    questions = [
        ("likeliest", {"folder": folders["tiny"], "style": style, "num": num, "tokens": tokens})
        for style, num, tokens in cases
    ]
    for (style, num, tokens), theirs in zip(cases, ask_client(questions), strict=True):
        window = Window("w", np.zeros(1, np.int32), num, style)
        scores = read_likeliest([text for text, _ in tokens], [value for _, value in tokens], window, version)
        assert list(permutation_from_scores(scores)) == theirs, (style, num, tokens)


# Paths


def test_misread_paths_are_those_that_the_client_misreads(ask_client, version):
    """The client picks another class, or replaces the chat template, for exactly the paths that we warn about."""
    paths = [*MISREAD_PATHS, *PLAIN_PATHS]
    classes = ask_client([("reranker", {"path": path}) for path in paths])
    replaced = ask_client([("has_foreign_template", {"path": path}) for path in paths])
    for path, name, is_replaced in zip(paths, classes, replaced, strict=True):
        assert isinstance(name, str) and isinstance(is_replaced, bool), (path, name, is_replaced)
        assert (name != "RankListwiseOSLLM" or is_replaced) == bool(misread_names(path, version)), (path, name)
        is_own = path in WHOLE_PATHS or path == "rank_vicuna"  # which any path may contain, too
        assert (name in ("none", "RankListwiseOSLLM of another model")) == is_own, (path, name)


@pytest.mark.parametrize("version", ["0.26.0"], indirect=True, scope="session")  # 0.25.7 has its script in a checkout
def test_the_command_that_is_printed_is_understood(ask_client, folders, tokenizers, templates):
    template = read_prompt_template(templates["own_words"][1])
    contract = new_contract(tokenizers["tiny"], "ranking", window_size=9, stride=4, max_passage_words=45)
    contract = dataclasses.replace(contract, template=template, prompt_template=TEMPLATE_FILE)
    words = shlex.split(serving_command(contract, "my models/a").replace("\\\n", " "))
    (options,) = ask_client([("parsed", {"arguments": words[1:]})])
    assert words[0] == "rank-llm" and options["command"] == "rerank"
    expected = {
        "model_path": "my models/a",
        "prompt_template_path": "my models/a/prompt_template.yaml",
        "context_size": contract.context_size_tokens,
        "window_size": 9,
        "stride": 4,
        "max_passage_words": 45,
        "use_alpha": True,
        "use_logits": True,
        "variable_passages": True,
    }
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize("version", ["0.26.0"], indirect=True, scope="session")  # the first that reads JSON Lines
def test_written_requests_are_read_and_prompted_alike(ask_client, folders, tokenizers, tmp_path):
    docs = [{"docid": f"d{i}", **document} for i, document in enumerate(DOCUMENTS)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(document) + "\n" for document in docs))
    queries = [{"qid": f"q{i}", "text": query} for i, query in enumerate(QUERIES)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    run = [f"q{i} Q0 {docs[k]['docid']} 1 {k - 3} bm25\n" for i in range(4) for k in range(i, 14)]
    (tmp_path / "my_run.trec").write_text("".join(run))
    path = tmp_path / "my requests_1.jsonl"
    files = {"queries": tmp_path / "queries.jsonl", "docs": tmp_path / "docs.jsonl"}
    lines = write_requests(tmp_path / "my_run.trec", path, top_k=9, **files)
    assert lines[0] == f"{path}: 4 requests with 36 candidates"
    assert lines[-1] == "1 query without candidates in the run, such as q4"
    (answer,) = ask_client([("requests_of", {"path": str(path)})])
    assert answer["valid"] == {"valid": True, "record_count": 4, "errors": []}
    assert [request["query"]["qid"] for request in answer["read"]] == ["q0", "q1", "q2", "q3"]
    assert [found["docid"] for found in answer["read"][2]["candidates"]] == [f"d{k}" for k in range(13, 4, -1)]
    assert [found["score"] for found in answer["read"][0]["candidates"]][:2] == [10.0, 9.0]
    asked = {"folder": folders["tiny"], "style": "letters", "path": str(path)}
    prompts = ask_client([("prompt_of_request", asked | {"number": number}) for number in range(4)])
    for query, theirs in zip(QUERIES, prompts):
        texts = [document_text(DOCUMENTS[k]) for k in range(13, 4, -1)]
        window = fit_window("w", query.strip(), texts, tokenizers["tiny"])
        assert window.input_ids[:-1].tolist() == tokenizers["tiny"](theirs)["input_ids"]

    contract = new_contract(tokenizers["tiny"], "ranking")
    words = shlex.split(serving_command(contract, "my models/a", str(path)).replace("\\\n", " "))
    (options,) = ask_client([("parsed", {"arguments": words[1:]})])
    expected = {"requests_file": str(path), "output_trec_file": "reranked.trec", "model_path": "my models/a"}
    assert {name: options[name] for name in expected} == expected and "dataset" not in options


@pytest.mark.parametrize("version", ["0.26.0"], indirect=True, scope="session")
def test_the_teachers_command_on_the_page_is_understood(ask_client):
    page = (REPOSITORY / "docs" / "own-data.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^rank-llm (.*)$", page, re.MULTILINE)
    (options,) = ask_client([("parsed", {"arguments": shlex.split(command)})])
    files = ("requests_file", "output_trec_file", "output_jsonl_file", "invocations_history_file")
    assert [options[name] for name in files] == ["requests.jsonl", "teacher.trec", "teacher.jsonl", "history.json"]
    assert options["populate_invocations_history"] and not options["use_alpha"] and options["num_passes"] == 1


# The whole way


def taught_model(tokenizer, style: str):
    """Taught, within seconds, to write an answer, the last passages first.

    With Mistral's tokenizer the token of ` A` is made about as likely as that of `A`; alone both decode to `A`.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MistralConfig(**SIZES | {"vocab_size": len(tokenizer), "initializer_range": 0.06})
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = random.Random(0)
    for step in range(60):
        values = sorted(generator.sample(range(100), 5))
        item = encode_record(record_of(values, style, str(step)), tokenizer, "generation")
        tokens = torch.from_numpy(item.input_ids).long()[None]
        targets = tokens.clone()
        targets[:, : item.response_start] = -100
        model(input_ids=tokens, labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for name in identifiers(26):
            own, spaced = tokenizer.convert_tokens_to_ids([name, f"▁{name}"])
            if spaced != tokenizer.unk_token_id:
                noise = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(own))
                model.lm_head.weight[spaced] = model.lm_head.weight[own] + 0.3 * noise
    return model


@pytest.fixture(scope="module")
def models(tokenizers, tmp_path_factory) -> dict[str, str]:
    """Folders of a model and its tokenizer."""
    made = tmp_path_factory.mktemp("models")
    whole_numbers = new_tokenizer(whole_numbers=True)
    for name, tokenizer, model in (
        ("random", tokenizers["tiny"], new_model()),
        ("taught_letters", tokenizers["tiny"], taught_model(tokenizers["tiny"], "letters")),
        ("taught_numbers", tokenizers["tiny"], taught_model(tokenizers["tiny"], "numbers")),
        ("taught_whole_numbers", whole_numbers, taught_model(whole_numbers, "numbers")),
        ("taught_mistral_v3", tokenizers["mistral_v3"], taught_model(tokenizers["mistral_v3"], "letters")),
    ):
        model.save_pretrained(made / name)
        tokenizer.save_pretrained(made / name)
    return {folder.name: str(folder) for folder in made.iterdir()}


def requests(sizes: tuple[int, ...]) -> list[tuple[str, list[dict]]]:
    generator = random.Random(0)
    words = [word for word in WORDS if word.isalpha() and len(word) > 1] + [f"w{i}" for i in range(100)]
    return [
        (
            " ".join(generator.choices(words, k=3)),
            [{"text": " ".join(generator.choices(words, k=generator.randint(1, 8)))} for _ in range(size)],
        )
        for size in sizes
    ]


RERANKINGS = [  # those of whole numbers are not for 0.25.7
    {"model": "random", "style": "letters", "use_logits": True, "window": 6, "stride": 3, "passes": 1},
    {"model": "random", "style": "numbers", "use_logits": True, "window": 9, "stride": 4, "passes": 1},
    {"model": "taught_letters", "style": "letters", "use_logits": True, "window": 20, "stride": 10, "passes": 2},
    {"model": "taught_letters", "style": "letters", "use_logits": False, "window": 5, "stride": 2, "passes": 2},
    {"model": "taught_numbers", "style": "numbers", "use_logits": False, "window": 11, "stride": 5, "passes": 1},
    {"model": "taught_whole_numbers", "style": "numbers", "use_logits": True, "window": 30, "stride": 15, "passes": 1},
    {"model": "taught_whole_numbers", "style": "numbers", "use_logits": True, "window": 99, "stride": 9, "passes": 1},
    {"model": "taught_mistral_v3", "style": "letters", "use_logits": True, "window": 6, "stride": 3, "passes": 1},
    {"model": "taught_mistral_v3", "style": "letters", "use_logits": False, "window": 4, "stride": 2, "passes": 1},
]


@pytest.mark.slow
def test_reranking_gives_the_same_orders(ask_server, models, version):
    """Same model, same requests, both decodings: tokenized, packed or cached, read and slid as the client does it."""
    short, long = requests((1, 2, 5, 11)), requests((2, 40))
    cases = [
        {**case, "requests": long if case["window"] > 20 else short}
        for case in RERANKINGS
        if version != "0.25.7" or case["model"] != "taught_whole_numbers"
    ]
    questions = [{"folder": models[case["model"]], **case} for case in cases]
    theirs = ask_server([("rerank", {k: v for k, v in case.items() if k != "model"}) for case in questions])
    for case, expected in zip(cases, theirs, strict=True):
        asked = case["requests"]
        tokenizer = AutoTokenizer.from_pretrained(models[case["model"]])
        model = AutoModelForCausalLM.from_pretrained(models[case["model"]])
        options = {"window_size": case["window"], "stride": case["stride"]}
        objective = "combined" if case["style"] == "letters" else "generation"
        reranker = Reranker(
            model,
            tokenizer,
            new_contract(tokenizer, objective, case["style"], **options).with_client(version),
            RerankOptions(decoding="first_token" if case["use_logits"] else "generation", passes=case["passes"]),
        )
        found = reranker.rerank_queries(
            {str(i): query for i, (query, _) in enumerate(asked)},
            {f"{i}-{k}": document["text"] for i, (_, docs) in enumerate(asked) for k, document in enumerate(docs)},
            {str(i): [f"{i}-{k}" for k in range(len(documents))] for i, (_, documents) in enumerate(asked)},
        )
        ranked = {query.qid: [int(docid.split("-")[1]) for docid in query.docids] for query in found}
        assert [ranked[str(i)] for i in range(len(asked))] == expected, case
        assert any(order != sorted(order) for order in expected), case


def test_a_letter_with_a_space_is_not_the_letter(models):
    """The taught model finds both about as likely; scores are those of the letter's own token."""
    tokenizer = AutoTokenizer.from_pretrained(models["taught_mistral_v3"])
    model = AutoModelForCausalLM.from_pretrained(models["taught_mistral_v3"])
    windows = [
        fit_window(query, query, [document["text"] for document in documents], tokenizer)
        for query, documents in requests((5,) * 4)
    ]
    contract = dataclasses.replace(new_contract(tokenizer), append_bracket=True)
    likeliest, own = (
        np.stack([answer.scores for answer in score_windows_first_token(model, tokenizer, windows, contract, top_k=k)])
        for k in (30, None)
    )
    seen = np.isfinite(likeliest)
    assert seen.sum() > 10 and (likeliest[seen] == own[seen]).all()


def test_what_the_client_cannot_read_is_known(ask_client, folders, version):
    """A token of two digits stops 0.25.7 where it reads numbers by first token."""
    (answer,) = ask_client(
        [("likeliest", {"folder": folders["tiny"], "style": "numbers", "num": 3, "tokens": [["10", -1.0]]})]
    )
    if version == "0.25.7":
        assert answer["error"].startswith("TypeError")
    else:
        assert answer == [0, 1, 2]
    assert CLIENTS[version].reads_numbers == (version != "0.25.7")
