"""The command line: start-up cost, options, and error messages."""

from __future__ import annotations

import inspect
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from support.synthetic_records import conversation, write_jsonl

from rankllm_composer import __version__
from rankllm_composer.cli import app, main, rerank
from rankllm_composer.cli_shards import shards_build
from rankllm_composer.options import BuildOptions, RerankOptions, SourceOptions
from rankllm_composer.recipe.bundled import find_recipe
from rankllm_composer.recipe.command_line import HELP
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.shards import build as shards

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).parent / "golden" / "records.json"
YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command line in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), captured.out, captured.err)

    return call


def assert_readable_error(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err


def commands(command: Any = None, name: str = "") -> list[Any]:
    command = command or typer.main.get_command(app)
    inner = getattr(command, "commands", None)
    if inner is None:
        return [pytest.param(command, id=name)]
    return [found for key in inner for found in commands(inner[key], f"{name} {key}".strip())]


# Starting


def test_help_and_recipes_load_no_heavy_library() -> None:
    code = """
import sys
from rankllm_composer.cli import main
for arguments in (["--help"], ["shards", "build", "--help"], ["recipes", "list"], ["recipes", "check", "rank_zephyr"]):
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code, arguments
    heavy = {"torch", "transformers", "composer", "streaming", "datasets", "numpy", "ftfy"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", commands())
def test_every_command_and_option_has_help(command: Any) -> None:
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), parameter.name


def test_version(run: Run) -> None:
    assert run("--version").out.strip() == __version__


def test_no_arguments_print_help(run: Run) -> None:
    for arguments in ((), ("shards",), ("recipes",)):
        outcome = run(*arguments)
        assert "Usage: rankllm-composer" in outcome.out + outcome.err


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["shard"], "No such command 'shard'"),
        (["shards", "build"], "--output"),
        (["shards", "build", "--output", "x", "--identifiers", "roman"], "'roman' is not one of"),
        (["shards", "build", "--output", "x", "--window", "many"], "--window"),
        (["shards", "build", "--output", "x", "--processes", "0"], "--processes"),
    ],
)
def test_wrong_usage(run: Run, arguments: list[str], part: str) -> None:
    assert_readable_error(run(*arguments), part, "Usage: rankllm-composer")


def test_other_names_of_options_are_accepted(run: Run) -> None:
    known: dict[str, Any] = {words: typer.main.get_command(app) for words in HELP}
    for words in known:
        for word in words.split():
            known[words] = known[words].commands[word]
    judging = {words: command for words, command in known.items() if {"--qrels", "--judgments"} & set(command._flags())}
    assert {"compare", "rerank", "shards build"} <= judging.keys()
    for words, command in judging.items():
        others = {"--topics", "--corpus", "-o"} if words != "compare" else {"-m"}
        assert {"--qrels", "--judgments", *others} <= {*command.other_names(), *command._flags()}, words
    for words, command in known.items():
        names = command.other_names()
        assert not names.keys() & set(command._flags()), words
        assert not names or next(iter(names)) in run(*words.split(), "--help").out.replace("\n  ", " ")


@pytest.mark.parametrize("words", HELP)
def test_help_ends_with_examples_that_parse_exit_codes_and_a_page(run: Run, words: str) -> None:
    text = run(*words.split(), "--help").out
    assert "Exit codes:\n  0 done; 2 " in text
    assert (ROOT / "docs" / HELP[words].page).is_file() and f"More:\n  docs/{HELP[words].page}\n" in text
    for example in HELP[words].examples:
        assert f"\n  rankllm-composer {example}\n" in text and example.startswith(words)
        command: Any = typer.main.get_command(app)
        arguments = shlex.split(example)
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context(words, arguments)
    assert sorted(HELP) == sorted(parameters.id for parameters in commands())


def test_other_names_reach_the_command(run: Run, tmp_path: Path) -> None:
    """An underscore is a hyphen, and what follows `--` is left alone."""
    given = ("--first_stage", tmp_path / "a", "--topics=b", "--corpus", "c", "--judgments", "d", "-o", tmp_path / "out")
    for what, text in (("b", '{"id": "q", "text": "t"}'), ("d", "q 0 x 1"), ("c", '{"id": "x", "text": "t"}')):
        (tmp_path / what).write_text(text)
    given = tuple(str(value).replace("=b", f"={tmp_path / 'b'}") for value in given)
    given = tuple(str(tmp_path / value) if value in ("c", "d") else value for value in given)
    assert_readable_error(run("rerank", "--checkpoint", "m", *given, "--topk", 10), f"{tmp_path / 'a'}")
    assert_readable_error(run("recipes", "check", "first_mistral", "--", "--nproc=1"), "--nproc=1 is not a valid")
    assert_readable_error(run("shards", "verify", "x", "--topk", "1"), "No such option: --topk")


def test_a_command_of_another_group_is_suggested(run: Run) -> None:
    assert_readable_error(run("check", "mine.yaml"), "No such command 'check'. Did you mean 'recipes check'?")
    assert_readable_error(run("verify"), "Did you mean 'shards verify'?")


def test_shells_complete_commands_and_recipes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, found in (("pl", "plan"), ("recipes ch", "check"), ("train first_m", "first_mistral_lora")):
        monkeypatch.setenv("_RANKLLM_COMPOSER_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", f"rankllm-composer {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        assert found in run().out.split(), words


# Shards


@pytest.mark.parametrize(
    "command, classes, renamed",
    [
        (shards_build, (SourceOptions, BuildOptions), {"processes": "num_processes", "hash": "hashes"}),
        (rerank, (RerankOptions,), {"window": "window_size"}),
    ],
)
def test_options_are_generated_with_their_defaults(command: Any, classes: Any, renamed: dict[str, str]) -> None:
    defaults = {name: value for kind in classes for name, value in asdict(kind()).items()}
    generated = {renamed.get(name, name): value for name, value in inspect.signature(command).parameters.items()}
    for name, value in defaults.items():
        assert generated[name].default == (list(value) if isinstance(value, tuple) else value), name


def test_a_share_of_the_queries_is_held_out(run: Run, tmp_path: Path) -> None:
    records = write_jsonl(tmp_path / "records.jsonl", (conversation(number) for number in range(12)))
    build = ("shards", "build", "--input", records, "--output", tmp_path / "set", "--processes", 1, "--hold-out")
    assert run(*build, 0.5).code == 0
    assert all((tmp_path / name / "index.json").exists() for name in ("set", "set-held-out"))
    assert_readable_error(run(*build, 1), "--hold-out is 1.0; expected a number of at least 0 and below 1")


def test_help_shows_meaning_default_and_bounds(run: Run) -> None:
    text = " ".join(run("shards", "build", "--help").out.split())
    assert "--window <int range> Candidates in a list made from --run. [default: 20; x>=2]" in text
    assert "default: one per CPU once a source proves large." in text and "none = not compressed." in text


def test_invalid_options_are_reported_by_flag_name(run: Run) -> None:
    outcome = run("shards", "build", "--output", "x", "--input", "a.json", "--part", "3", "--staging", "")
    assert_readable_error(
        outcome, "--part is '3'; expected text such as 3/8, or null.", "--staging is ''; expected text, or null."
    )
    assert len(outcome.err.splitlines()) == 2


@pytest.mark.parametrize(
    "arguments, passed",
    [
        (["--input", "a.jsonl"], {"input": "a.jsonl", "run": None, "hashes": ("xxh64",), "compression": "zstd"}),
        (["--input", "owner/name", "--split", "test"], {"split": "test"}),
        (["--run", "r", "--judgments", "j", "--teacher-run", "t"], {"run": "r", "judgments": "j", "teacher_run": "t"}),
        (["--run", "r", "--queries", "q", "--docs", "d"], {"queries": "q", "docs": "d"}),
        (["--run", "r", "--window", "5", "--stride", "4"], {"window": 5, "stride": 4}),
        (["--run", "r", "--lists-per-query", "0", "--depth", "50"], {"lists_per_query": 0, "depth": 50}),
        (["--run", "r", "--max-passage-words", "30"], {"max_passage_words": 30}),
        (["--run", "r", "--identifiers", "numbers", "--seed", "7"], {"identifiers": "numbers", "seed": 7}),
        (["--run", "r", "--no-require-relevant"], {"require_relevant": False}),
        (["--on-error", "quarantine", "--part", "2/3"], {"on_error": "quarantine", "part": "2/3"}),
        (["--processes", "3", "--shard-bytes", "99"], {"num_processes": 3, "shard_bytes": 99}),
        (["--compression", "none"], {"compression": None}),
        (["--hash", "sha1", "--hash", "xxh3_64"], {"hashes": ("sha1", "xxh3_64")}),
        (["--overwrite", "--staging", "s"], {"overwrite": True, "staging": "s"}),
    ],
)
def test_options_reach_the_shard_builder(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], passed: dict[str, Any]
) -> None:
    calls: list[dict[str, Any]] = []

    def build_shards(output: str, source: SourceOptions, options: BuildOptions, report: Any) -> None:
        calls.append({"output": output, **asdict(source), **asdict(options)})

    monkeypatch.setattr(shards, "build_shards", build_shards)
    outcome = run("shards", "build", "--output", "out", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    (call,) = calls
    assert {"output": "out", **passed}.items() <= call.items()


@pytest.mark.parametrize(
    "arguments, warned",
    [
        (["--input", RECORDS, "--window", "20"], "warning: --window has no effect with --input"),
        (["--input", RECORDS, "--no-require-relevant"], "warning: --require-relevant has no effect with --input"),
        (["--run", "r", "--split", "train"], "warning: --split has no effect with --run"),
    ],
)
def test_options_without_effect_warn(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], warned: str
) -> None:
    monkeypatch.setattr(shards, "build_shards", lambda output, source, options, report: None)
    assert run("shards", "build", "--output", "out", *arguments).err.strip() == warned


def test_sources_look(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1 Q0 d1 1 2 t\n")
    outcome = run("sources", "look", tmp_path / "a", RECORDS)
    assert outcome.code == 0
    assert "a: a TREC run (text), read for a first-stage run, a teacher's order" in outcome.out
    assert "records.json: conversations (array), read for training records" in outcome.out


def test_text_of_records_cannot_act_on_the_terminal(run: Run, tmp_path: Path) -> None:
    """Ids with escapes and line breaks, as `shards build`, `info` and `verify` print them."""
    records = json.loads(RECORDS.read_text())[:2]
    name = "\x1b]0;title\x07\x9b31m\nerror: not one of ours\r\u202e"
    for record in records:
        record["id"] = name
    source = tmp_path / "records\x1b[2J.json"
    source.write_text(json.dumps(records))
    target = tmp_path / "set"
    outcomes = [run("shards", "build", "--input", source, "--output", target, "--processes", 1)]
    outcomes += [run("shards", "info", target), run("shards", "verify", target, "--records")]
    records[0]["conversations"][-1]["value"] = name
    source.write_text(json.dumps(records))
    outcomes.append(run("shards", "build", "--input", source, "--output", tmp_path / "bad"))
    assert [outcome.code for outcome in outcomes] == [0, 0, 0, 2]
    assert "1 duplicate id (\\x1b]0;title\\x07\\x9b31m\\nerror: not one of ours\\r\\u202e)" in outcomes[2].out
    for shown in (part for outcome in outcomes for part in (outcome.out, outcome.err)):
        assert all(char.isprintable() or char == "\n" for char in shown)
        assert "\nerror: not one" not in shown


def test_build_info_verify(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "set"
    built = run("shards", "build", "--input", RECORDS, "--output", target, "--processes", 1)
    assert built.code == 0 and "6" in built.err
    check, train = built.out.splitlines()
    assert check == f"check it: rankllm-composer shards verify {target}" and f"data.train.local={target} " in train
    info = run("shards", "info", target)
    assert info.code == 0
    assert "6 in 1 shard\n" in info.out
    verified = run("shards", "verify", target, "--records")
    assert verified.code == 0 and verified.out == f"{target}: no problems, 6 records in 1 shard\n"
    assert verified.err.startswith("checking ") and verified.err.endswith("set  0/1 shards\n")

    (shard,) = target.glob("*.mds*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    assert_readable_error(run("shards", "verify", target), "error: ", "1 problem, see above")


def test_parts_are_merged(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "set"
    for part in ("1/2", "2/2"):
        build = ("shards", "build", "--input", RECORDS, "--output", target, "--part", part, "--processes", 1)
        assert run(*build, "--shard-bytes", 4096).code == 0
    assert run("shards", "merge", target).code == 0
    assert ": no problems, 6 records in " in run("shards", "verify", target).out


def test_lists_from_a_first_stage_run(run: Run, tmp_path: Path) -> None:
    """Three queries of four candidates with windows of two and stride two give two lists per query, six in total."""
    queries, docs, first, judged = (tmp_path / name for name in ("q.jsonl", "d.jsonl", "run.trec", "qrels"))
    queries.write_text("".join(json.dumps({"qid": f"q{q}", "text": f"what is {q}"}) + "\n" for q in range(3)))
    docs.write_text("".join(json.dumps({"docid": f"d{d}", "text": f"it is {d}"}) + "\n" for d in range(4)))
    first.write_text("".join(f"q{q} Q0 d{d} {d + 1} {9 - d} bm25\n" for q in range(3) for d in range(4)))
    judged.write_text("".join(f"q{q} 0 d{d} 1\n" for q in range(3) for d in (1, 3)))
    target = tmp_path / "set"
    files = ("--run", first, "--queries", queries, "--docs", docs, "--judgments", judged)
    sizes = ("--window", 2, "--stride", 2, "--lists-per-query", 0, "--processes", 1)
    assert run("shards", "build", "--output", target, *files, *sizes).code == 0
    assert "6 records" in run("shards", "verify", target, "--records").out


def test_errors_are_one_line(run: Run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{"id": "x", "conversations": []}]))
    for arguments in (
        ("shards", "build", "--input", bad, "--output", tmp_path / "set", "--processes", 1),
        ("shards", "build", "--input", tmp_path / "absent.json", "--output", tmp_path / "set"),
        ("shards", "build", "--output", tmp_path / "set"),
        ("shards", "merge", tmp_path / "absent"),
        ("shards", "verify", tmp_path / "absent"),
        ("shards", "info", tmp_path / "absent"),
        ("recipes", "show", "absent"),
        ("recipes", "copy", "absent", tmp_path),
        ("recipes", "copy", "rank_zephyr", tmp_path / "absent" / "x.yaml"),
    ):
        outcome = run(*arguments)
        *status, error = outcome.err.splitlines()
        assert_readable_error(Outcome(outcome.code, outcome.out, f"{error}\n"), "error: ")
        assert status in ([], ["building from bad.json  0 records"]), outcome.err


def test_traceback_on_request() -> None:
    with pytest.raises(ValueError, match="recipe is absent"):
        main(["--traceback", "recipes", "show", "absent"])


# Recipes


def test_recipes_list_and_show(run: Run) -> None:
    listed = run("recipes", "list").out.splitlines()
    assert [line.split()[0] for line in listed] == [path.stem for path in YAMLS]
    for path in YAMLS:
        title = path.read_text(encoding="utf-8").splitlines()[1]
        assert any(line.endswith(title.removeprefix("# ")) for line in listed)
        assert run("recipes", "show", path.stem).out == path.read_text(encoding="utf-8")


def test_recipes_copy(run: Run, tmp_path: Path) -> None:
    original = find_recipe("rank_zephyr").read_text(encoding="utf-8").splitlines()
    assert run("recipes", "copy", "rank_zephyr", tmp_path).out.strip() == str(tmp_path / "rank_zephyr.yaml")
    first, *rest = (tmp_path / "rank_zephyr.yaml").read_text(encoding="utf-8").splitlines()
    assert rest == original[1:]
    assert Path(first.removeprefix("# yaml-language-server: $schema=")).samefile(ROOT / "yamls" / "recipe.schema.json")
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    refused = run("recipes", "copy", "rank_zephyr", mine)
    assert_readable_error(refused, f"destination is {mine}; expected a file that does not exist", "--force")
    assert mine.read_text() == "mine"
    assert run("recipes", "copy", "rank_zephyr", mine, "--force").code == 0
    copied = mine.read_text(encoding="utf-8").splitlines()
    changed = {old: new for old, new in zip(original[1:], copied[1:], strict=True) if old != new}
    assert next(line.split("#")[0].split() for line in changed.values()) == ["name:", "mine"]
    assert changed == {old: new for old, new in changed.items() if "; null = runs/" in old or "name:" in new}
    assert all(old.index("#") == new.index("#") for old, new in changed.items())  # comments stay aligned
    assert load_recipe(mine).run_folder == "runs/mine" and load_recipe(mine).export_folder == "runs/mine/hf"
    odd = tmp_path / "-my run (2).yaml"  # becomes a name that `run.name` allows
    assert run("recipes", "copy", "demo", odd).code == 0 and load_recipe(odd).run.name == "my-run-2-"


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_recipes_check_prints_every_value_with_its_origin(run: Run, path: Path) -> None:
    outcome = run("recipes", "check", path, "run.seed=7")
    rows = [line.split(maxsplit=2) for line in outcome.out.splitlines()]
    assert ["override", "run.seed", "7"] in rows
    assert ["yaml", "run.name", path.stem] in rows
    assert run("recipes", "check", path.stem, "run.seed=7") == outcome


def test_recipes_check_of_a_valid_recipe(run: Run) -> None:
    outcome = run("recipes", "check", "rank_zephyr", "--num-ranks", 8)
    assert outcome.code == 0 and "warning" not in outcome.err
    assert outcome.out.endswith("rank_zephyr.yaml: no problems\n")


def test_recipes_check_reports_everything_at_once(run: Run) -> None:
    overrides = (
        "optimizer.lr=fast",
        "objective.nam=x",
        "batch.microbatch_lists=4",
        "data.train.source.input=gone.json",
    )
    outcome = run("recipes", "check", "first_mistral", *overrides)
    assert_readable_error(
        outcome,
        "4 problems",
        "optimizer.lr is 'fast'; expected a number above 0.",
        "objective.nam is an unknown key",
        "Did you mean objective.name?",
        "batch.microbatch_lists is set, and so is batch.microbatch_tokens",
        "data.train.source.input is 'gone.json', which does not exist",
    )
    assert ["override", "optimizer.lr", "fast"] in [line.split() for line in outcome.out.splitlines()]


def test_check_and_verify_as_json(run: Run, tmp_path: Path) -> None:
    """Standard output is one JSON value, whatever is wrong; messages are on standard error."""
    outcome = run("recipes", "check", "rank_zephyr", "--json", "objective.ranking_weight=3", "batch.global_lists=0")
    found = json.loads(outcome.out)
    assert (outcome.code, found["ok"]) == (2, False) and found["recipe"].endswith("rank_zephyr.yaml")
    problem = found["problems"][0]
    assert (problem["key"], problem["found"]) == ("batch.global_lists", "0") and problem["message"] in outcome.err
    assert found["values"]["optimizer.betas"] == [0.9, 0.999] and found["origins"]["batch.global_lists"] == "override"
    found = json.loads(run("recipes", "check", "rank_zephyr", "objective.ranking_weight=3", "--json").out)
    assert found["ok"] and not found["problems"] and "has no effect" in found["warnings"][0]
    secret = run("recipes", "check", "first_mistral", "--json", "logging.loggers={wandb: {api_key: hushhush}}")
    assert "hushhush" not in secret.out + secret.err and not json.loads(secret.out)["ok"]
    target = tmp_path / "set"
    assert run("shards", "build", "--input", RECORDS, "--output", target, "--processes", 1).code == 0
    outcome = run("shards", "verify", target, "--records", "--json")
    found = json.loads(outcome.out)
    assert (outcome.code, found["ok"], found["problems"], found["num_duplicates"]) == (0, True, [], 0)
    next(target.glob("*.mds*")).write_bytes(b"")
    outcome = run("shards", "verify", target, "--json")
    assert (
        outcome.code == 2
        and not json.loads(outcome.out)["ok"]
        and json.loads(outcome.out)["problems"][0] in outcome.err
    )
    outcome = run("shards", "verify", tmp_path / "absent", "--json")
    assert outcome.code == 2 and json.loads(outcome.out)["error"] in outcome.err


def test_recipes_check_shows_no_secret(run: Run) -> None:
    overrides = ["logging.loggers={wandb: {api_key: hushhush}}", "data.train.remote='s3://key:hushhush@host/set'"]
    outcome = run("recipes", "check", "first_mistral", *overrides)
    assert_readable_error(outcome, "logging.loggers.wandb.api_key", "data.train.remote")
    assert "hushhush" not in outcome.out + outcome.err and "[redacted]" in outcome.out


def test_recipes_check_checks_ranks_and_warns(run: Run) -> None:
    assert_readable_error(run("recipes", "check", "rank_zephyr", "-n", 7), "is 256; expected a multiple of 7 (7 ranks)")
    outcome = run("recipes", "check", "rank_zephyr", "objective.ranking_weight=3")
    assert outcome.code == 0
    assert outcome.err.count("warning") == 1
    assert outcome.err.endswith("warning: objective.ranking_weight = 3.0 has no effect: objective.name is generation\n")


def test_recipes_check_of_a_missing_recipe(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").touch()
    for file, remedy in (
        ("mien.yaml", f"Did you mean {tmp_path / 'mine.yaml'}?"),
        ("mine.yml", f"Did you mean {tmp_path / 'mine.yaml'}?"),
        ("first_mistral.yaml", "Did you mean first_mistral?"),
        ("absent.yaml", "`rankllm-composer recipes list` lists those of the package."),
    ):
        assert_readable_error(run("recipes", "check", tmp_path / file), "recipe is not a file", remedy)
    assert_readable_error(run("recipes", "check", "absent"), "recipe is absent; expected a path", "rank_zephyr")
    for name, meant in (("mistral", "first_mistral"), ("FirstMistral", "first_mistral"), ("zephyr", "rank_zephyr")):
        assert_readable_error(run("recipes", "check", name), f"Did you mean {meant}?")
    (tmp_path / "mine.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert_readable_error(run("recipes", "check", "mine"), "Did you mean mine.yaml?")


def test_recipes_keys(run: Run) -> None:
    assert "  optimizer.lr=required\n" in run("recipes", "keys").out
    assert "| `optimizer.betas` | `[0.9, 0.999]` |" in run("recipes", "keys", "--markdown").out


def test_recipes_schema_prints_the_committed_file(run: Run) -> None:
    assert run("recipes", "schema").out == (ROOT / "yamls" / "recipe.schema.json").read_text(encoding="utf-8")
