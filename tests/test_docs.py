"""The documentation: every command and snippet is executed, or checked where this machine cannot execute it."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import pytest
import tomllib
from support.launching import ON_CPU, REPOSITORY, succeeded, train
from support.synthetic_records import WORDS, write_jsonl
from support.toy_recipe import TOY
from transformers import MistralConfig

from rankllm_composer.cli import main
from rankllm_composer.export.hub import files_to_push
from rankllm_composer.export.model_card import serving_command
from rankllm_composer.options import SourceOptions
from rankllm_composer.prompts.contract import read_contract
from rankllm_composer.prompts.prompt_template import read_prompt_template
from rankllm_composer.recipe.bundled import recipe_path
from rankllm_composer.recipe.checks import check_world
from rankllm_composer.recipe.keys import describe_keys
from rankllm_composer.recipe.load import load_recipe, merge_recipe, recipe_to_yaml
from rankllm_composer.sources.records import open_source, read_records
from rankllm_composer.training.export_run import finished_export

PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Commands, with continued lines joined."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


BLOCKS = [Block(page.name, *found) for page in PAGES for found in FENCE.findall(page.read_text())]


def words(command: str) -> list[str]:
    """Split a command as the shell does, on machine 1, without the variable assignments in front of it."""
    script = f"set -- {command}; printf '%s\\0' \"$@\""
    output = subprocess.run(["bash", "-c", f"K=1; {script}"], capture_output=True, text=True, check=True).stdout
    found = output.split("\0")[:-1]
    while re.fullmatch(r"[A-Z_]+=.*", found[0]):
        found = found[1:]
    return found


# Commands that this machine can execute


@pytest.fixture(scope="module")
def docs_folder(tmp_path_factory, golden, mistral_v3_folder) -> Path:
    """Return a folder with small versions of what the pages need: retrieval files, base models, the repository."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("rankllm_composer", "yamls", "docs"):
        (folder / name).symlink_to(REPOSITORY / name)
    shutil.copytree(mistral_v3_folder, folder / "base")
    for path in (golden / "tiny_mistral").iterdir():
        shutil.copy(path, folder / "base")
    for name in ("mistral-7b", "zephyr-7b"):
        MistralConfig(**TOY).save_pretrained(folder / name)
    docs = [{"docid": f"d{n}", "text": f"a text about {word} and {WORDS[n // 2]}"} for n, word in enumerate(WORDS * 2)]
    write_jsonl(folder / "docs.jsonl", docs)
    queries = [{"qid": f"q{n}", "text": f"what is a {word}"} for n, word in enumerate(WORDS[:12])]  # q3 is held out
    write_jsonl(folder / "queries.jsonl", queries)
    run = [f"q{q} Q0 d{d} {d + 1} {30 - d} bm25\n" for q in range(12) for d in range(len(docs))]
    (folder / "bm25.trec").write_text("".join(run))
    teacher = [f"q{q} Q0 d{d} {28 - d} {1 / (28 - d)} teacher\n" for q in range(12) for d in range(len(docs))]
    (folder / "teacher.trec").write_text("".join(teacher))
    judged = [f"q{q} 0 d{d} {1 + (d == q)}\n" for q in range(12) for d in (q, q + 1, q + 14, q + 15)]
    (folder / "qrels.trec").write_text("".join(judged))
    return folder


SMALL = [
    *ON_CPU,
    "model.name_or_path=base",
    "model.activation_checkpointing=0",
    "data.max_length_tokens=1024",
    "batch.global_lists=4",
    "batch.microbatch_tokens=1024",
    "optimizer.lr=1e-3",
    "schedule.warmup=1ba",
    "parallelism.fsdp=false",
]


def make_small(path: Path) -> None:
    """Change the recipe at `path` so that this machine can train it."""
    path.write_text(recipe_to_yaml(load_recipe(path, SMALL)))


def run_cli(arguments: list[str], folder: Path) -> str:
    """Run `rankllm-composer …` in a folder and return its output; an error fails the test."""
    output = io.StringIO()
    shown = contextlib.redirect_stdout(output), contextlib.redirect_stderr(output)
    with contextlib.chdir(folder), shown[0], shown[1], pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code, (arguments, output.getvalue())
    return output.getvalue()


def run_here(command: list[str], folder: Path) -> str:
    """Run a command as the page shows it and return its output."""
    program, *arguments = command
    if program == "composer":
        return succeeded(train(*arguments[3:], folder=folder, ranks=int(arguments[1])))
    if arguments[0] == "train":
        return succeeded(train(arguments[1], *arguments[4:], folder=folder, ranks=1))
    names_no_model = not any(word.startswith(("model.name_or_path=", "--model")) for word in arguments)
    is_shipped = arguments[0] in ("inspect", "plan") and arguments[1] != "mine.yaml"
    if is_shipped and names_no_model:  # without published weights and data
        arguments += ["model.name_or_path=base", "data.train.source.input=records.jsonl"]
        arguments += ["data.train.local=absent", "data.max_length_tokens=1024"]
    if arguments[:3] == ["recipes", "check", "first_mistral"]:  # a small run stands in for its own
        arguments += ["run.folder=absent"]
    return run_cli(arguments, folder)


# Commands that it cannot execute


def check_recipe(file: str, overrides: list[str], num_ranks: int | None, folder: Path) -> None:
    """Check a recipe with these overrides on this many ranks."""
    path = next((path for path in (folder / file, REPOSITORY / file) if path.exists()), None) or recipe_path(file)
    merged = merge_recipe(path, overrides)
    assert merged.problems == [] and merged.warnings == []
    if num_ranks is not None:
        check_world(merged.recipe, num_ranks)


def check_composer(command: list[str], folder: Path) -> None:
    from composer.cli.launcher import _get_parser

    options, rest = _get_parser().parse_known_args(command[1:])
    script, file, *overrides = [options.training_script, *options.training_script_args]
    assert rest == [] and (REPOSITORY / script).samefile(REPOSITORY / "rankllm_composer" / "train.py")
    num_ranks = options.world_size if options.world_size not in (None, -1) else options.nproc
    assert options.base_rank is None or options.base_rank == options.node_rank * options.nproc
    check_recipe(file, overrides, num_ranks, folder)


def check_torchrun(command: list[str], folder: Path) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(command[1:])
    assert (REPOSITORY / options.training_script).exists()
    file, *overrides = options.training_script_args
    check_recipe(file, overrides, int(options.nnodes) * int(options.nproc_per_node), folder)


def check_sbatch(command: list[str], folder: Path) -> None:
    nodes, script, file, *overrides = command[1:]
    assert nodes == "--nodes=2" and (REPOSITORY / script).exists()
    check_recipe(file, overrides, 16, folder)


def check_make(command: list[str], folder: Path) -> None:
    """Check that the target exists and that the launcher accepts the command it runs."""
    del folder
    output = subprocess.run(["make", "-n", *command[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in output.stdout.replace("\\\n", " ").splitlines() if "train.py" in line]
    assert len(lines) == (2 if "STAGES=2" in command else "reproduce" in command[1])
    for line in lines:
        begin = next(place for place, word in enumerate(line) if "composer" in word)
        arguments = [word for word in line[begin + 1 :] if word not in ("-m", "rankllm_composer.launch")]
        check_composer(["composer", *arguments], REPOSITORY)


def check_docker(command: list[str], folder: Path) -> None:
    del folder
    parser = argparse.ArgumentParser()
    parser.add_argument("-f", type=Path)
    parser.add_argument("-t")
    parser.add_argument("context")
    options = parser.parse_args(command[2:])
    assert command[1] == "build" and (REPOSITORY / options.f).exists() and options.context == "."


def check_export(command: list[str], folder: Path) -> None:
    """Check that the variables are those that the Makefile sets and the benchmark measures, or the hub's."""
    del folder
    if all(word.startswith("HF_") for word in command[1:]):
        assert {word.partition("=")[0] for word in command[1:]} <= set(vars(huggingface_hub.constants))
        return
    (line,) = re.findall(r"^ONE_HEAP := (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    tree = ast.parse((REPOSITORY / "benchmarks" / "report.py").read_text())
    measured = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ONE_HEAP"
    )
    assert command[1:] == line.split() == [f"{name}={value}" for name, value in measured.items()]


def check_source(command: list[str], folder: Path) -> None:
    """Check that the environment is the one that `make setup` creates."""
    del folder
    (default, *_) = re.findall(r"^VENV := (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert command[1:] == [f"{default}/bin/activate"]


def check_python(command: list[str], folder: Path) -> None:
    """Check the paths of a pytest command."""
    del folder
    assert command[1:3] == ["-m", "pytest"] and all((REPOSITORY / path).exists() for path in command[3:])


TEACHER = "castorini/rank_zephyr_7b_v1_full"


def check_example(command: list[str], folder: Path) -> None:
    """Check the path; tests/test_examples.py runs it."""
    del folder
    assert command[1].startswith("examples/") and (REPOSITORY / command[1]).exists()


def check_rank_llm(command: list[str], folder: Path) -> None:
    """Check the arguments of the inference client."""
    path = next(word.partition("=")[2] for word in command if word.startswith("--model-path="))
    if path == TEACHER:
        return  # the client's own parser reads it in tests/client/test_inference_client.py
    limit = load_recipe(REPOSITORY / "yamls" / "first_mistral.yaml").data.max_length_tokens  # of the full-size run
    contract = dataclasses.replace(read_contract(folder / path), context_size_tokens=limit)
    requests = next((word.partition("=")[2] for word in command if word.startswith("--requests-file=")), None)
    expected = shlex.split(serving_command(contract, path, requests).replace("\\\n", " "))
    assert "--window-size=4" in expected  # of the small run, where 20 and 10 are the client's defaults
    assert command == [word for word in expected if not word.startswith(("--window-size=", "--stride="))]


def check_install(command: list[str], folder: Path) -> None:
    """Check that the files exist that a command of pip or uv reads."""
    del folder
    files = [word for word in command if word.endswith(".txt")]
    assert "install" in command and files and all((REPOSITORY / file).exists() for file in files)


def check_train(command: list[str], folder: Path) -> None:
    if "--push" in command:  # what needs no hub: the export that is pushed, and its files
        assert command[1] == "export" and set(command[5:]) <= {"--dry-run"}
        assert "README.md" in files_to_push(finished_export(folder / command[2]))
        return
    assert command[1] == "train" and command[3] == "-n"
    overrides = [word for word in command[5:] if word != "--dry-run"]
    check_recipe(command[2], overrides, int(command[4]), folder)


def check_hub(command: list[str], folder: Path) -> None:
    """Check that what is downloaded is what a recipe names."""
    del folder
    assert command[1] == "download" and command[3] == "--exclude"
    assert command[2] == load_recipe(REPOSITORY / "yamls" / "first_mistral.yaml").model.name_or_path


CHECKS: dict[str, Callable[[list[str], Path], None]] = {
    "composer": check_composer,
    "rankllm-composer": check_train,
    "torchrun": check_torchrun,
    "sbatch": check_sbatch,
    "make": check_make,
    "pip": check_install,
    "uv": check_install,
    "docker": check_docker,
    "hf": check_hub,
    "export": check_export,
    "rank-llm": check_rank_llm,
    "source": check_source,
    ".venv/bin/python": check_python,
    "python": check_example,
}


def runs_here(command: list[str]) -> bool:
    is_long = command[1] == "train" and command[3:5] != ["-n", "1"]
    is_here = not is_long and "--push" not in command
    return (command[0] == "rankllm-composer" and is_here) or command[:3] == ["composer", "-n", "1"]


@pytest.mark.parametrize("page", ["README.md", "installation.md"])
def test_the_environment_is_activated_before_its_commands_are_used(page):
    lines = [line for block in BLOCKS if block.page == page and block.language == "bash" for line in block.lines]
    programs = [words(line)[0] for line in lines]
    assert "source" in programs
    assert not {"rankllm-composer", "composer", "python"} & set(programs[: programs.index("source")])


@pytest.mark.slow
def test_every_command(docs_folder):
    """Run all pages in one folder, own-data.md first because other pages read its run."""
    printed: set[str] = set()
    (docs_folder / "runs").mkdir()
    (docs_folder / "runs" / "first_mistral").symlink_to(docs_folder / "run")
    pages = ["own-data.md", *(page.name for page in PAGES if page.name != "own-data.md")]
    for block in sorted(BLOCKS, key=lambda block: pages.index(block.page)):
        if block.language == "json":
            assert block.page == "own-data.md"
            rows = itertools.cycle(map(json.loads, block.text.splitlines()))
            write_jsonl(docs_folder / "records.jsonl", [next(rows) | {"id": f"q{n}"} for n in range(6)])
            source = open_source(SourceOptions(input=str(docs_folder / "records.jsonl")))
            assert len([*read_records(source)]) == 6
        if block.page in ("README.md", "training.md"):
            for name in ("shards", "lists", "mine.yaml"):  # left by own-data.md
                if (docs_folder / name).is_dir() and f"--output {name}/" in block.text:
                    shutil.rmtree(docs_folder / name)
                elif name in block.text.partition("recipes copy")[2].split():
                    (docs_folder / name).unlink(missing_ok=True)
        if block.language == "bash":
            for line in block.lines:
                command = words(line)
                if runs_here(command):
                    printed = set(map(shape, run_here(command, docs_folder).splitlines()))
                    if command[1:4] == ["recipes", "copy", "small_data"]:
                        make_small(docs_folder / command[4])
                else:
                    CHECKS[command[0]](command, docs_folder)
        if block.page == "planning.md" and block.language == "text":
            assert set(map(shape, block.text.splitlines())) <= printed
    assert (docs_folder / "run" / "reranked.trec").exists() and (docs_folder / "run" / "report.html").exists()


@pytest.mark.filterwarnings("error::rankllm_composer.recipe.load.RecipeWarning")
def test_every_python_snippet_runs(tmp_path, monkeypatch, capsys):
    """The snippets of losses.md are executed by tests/model/test_losses_page.py."""
    monkeypatch.chdir(tmp_path)
    snippets = [block for block in BLOCKS if block.language == "python" and block.page != "losses.md"]
    for block in snippets:
        exec(compile(block.text, block.page, "exec"), {})
    (readme,) = (block for block in snippets if block.page == "README.md")
    assert len(list(filter(None, readme.text.splitlines()))) <= 15
    assert "\n[RankedPassage(index=1, text='plum', score=2" in capsys.readouterr().out


# Blocks that show output or a listing


def check_map(text: str) -> None:
    """Check the map: one line per file and folder of the package, then the folders beside it."""
    package = REPOSITORY / "rankllm_composer"
    paths = [path for path in package.iterdir() if path.name[0] not in "_." and path.name != "py.typed"]
    found = {path.name + "/" * path.is_dir() for path in paths}
    listed = re.findall(r"^ {2}([\w.]+/?) ", text, re.MULTILINE)
    assert len(listed) == len(set(listed)) and set(listed) == found
    for name in re.findall(r"^([\w.]+/?) ", text, re.MULTILINE):
        assert (REPOSITORY / name).exists()


def check_demo(text: str) -> None:
    """Check the demo's output except for the numbers."""
    source = (REPOSITORY / "rankllm_composer" / "demo.py").read_text()
    head, *rows = text.splitlines()
    assert head == "nDCG@10 on 200 held-out queries, first-token decoding"
    for row in rows:
        name, value, meaning = re.split(r" {2,}", row.strip())
        assert name in source and meaning in source and 0 < float(value) <= 1


def shape(line: str) -> str:
    """Replace the numbers of a line by #, and units that depend on their size by the smallest."""
    units = {"[TPEZ]FLOP": "GFLOP", "[KG]iB": "MiB", "less than a minute": "# minutes", "less than #": "#"}
    units |= {"# hours(?=, # GPU)": "# minutes"}
    text = re.sub(r"\d[\d,.]*(e[+-]\d+)?|[▁-█]+", "#", line)
    for larger, smallest in units.items():
        text = re.sub(larger, smallest, text)
    return " ".join(text.split())


# (page, index of the block) → its check; None: the output of the command before it, which test_every_command compares.
SHOWN: dict[tuple[str, int], Callable[[str], None] | None] = {
    ("architecture.md", 0): check_map,
    ("README.md", 0): check_demo,
    **{("planning.md", place): None for place in range(4)},
}


def shown() -> dict[tuple[str, int], Block]:
    found: dict[tuple[str, int], Block] = {}
    for page in PAGES:
        texts = [block for block in BLOCKS if block.page == page.name and block.language == "text"]
        found.update({(page.name, place): block for place, block in enumerate(texts)})
    return found


def test_every_block_has_a_check():
    assert {block.language for block in BLOCKS if block.page != "losses.md"} <= {
        "bash",
        "python",
        "json",
        "text",
        "yaml",
    }
    assert set(shown()) == set(SHOWN)
    for page in PAGES:
        rest = FENCE.sub("", page.read_text())
        assert "```" not in rest, page
        assert not re.search(r"^\n {4}\S", rest, re.MULTILINE), f"{page}: fence indented blocks"
    for block in BLOCKS:
        if block.language == "bash":
            for line in block.lines:
                command = words(line)
                assert runs_here(command) or command[0] in CHECKS, line


@pytest.mark.parametrize("place", [place for place, check in SHOWN.items() if check is not None], ids=str)
def test_shown_blocks_are_true(place):
    check = SHOWN[place]
    assert check is not None
    check(shown()[place].text)


def test_the_shown_prompt_template_can_be_used(tmp_path):
    (block,) = (block for block in BLOCKS if block.language == "yaml")
    (tmp_path / "prompt.yaml").write_text(block.text)
    assert read_prompt_template(tmp_path / "prompt.yaml").unread(26, "letters") is None


# Links, paths, keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for code in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"(yamls|tests|benchmarks|docs|rankllm_composer)/[\w./-]+", code):
            assert (REPOSITORY / code).exists() or code == "benchmarks/RESULTS.md", code
        if code.startswith("make "):
            target = code.split()[1]
            assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE), code


KEYS = [row.name for row in describe_keys()]
SECTIONS = {key.partition(".")[0] for key in KEYS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipe_keys_in_pages_exist(page):
    known = set(KEYS) | {key.rpartition(".")[0] for key in KEYS}
    for code in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:[=:][^`]*)?`", page.read_text()):
        if code.partition(".")[0] in SECTIONS and not code.endswith((".py", ".md", ".yaml", ".json", ".jsonl")):
            within = code.rpartition(".")[0]  # arguments in a mapping have any name
            assert code in known or within in ("logging.loggers", "objective.ranking_loss_options"), code


def test_the_table_of_recipes_is_complete():
    rows = re.findall(r"^\| `yamls/([\w.]+)\.yaml` \|.*\|$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(path.stem for path in (REPOSITORY / "yamls").glob("*.yaml"))


def tables(text: str) -> dict[str, list[list[str]]]:
    """Map the first header cell of each table in a page to the rows of the table."""
    found: dict[str, list[list[str]]] = {}
    for head, _, *rows in (block.splitlines() for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)):
        found[head.split("|")[1].strip()] = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    return found


def paths_in(cell: str) -> list[Path]:
    return [REPOSITORY / path for path in re.findall(r"`((?:rankllm_composer|tests|yamls|docs)/[\w./-]*)`", cell)]


def test_the_tour_lists_every_folder():
    rows = tables((REPOSITORY / "CONTRIBUTING.md").read_text())["folder"]
    package = REPOSITORY / "rankllm_composer"
    assert sorted(path for row in rows for path in paths_in(row[0])) == sorted(
        path for path in package.iterdir() if (path / "__init__.py").exists()
    )
    for folder, first, _ in rows:
        files = re.findall(r"`([\w.]+)`", first)
        assert files and all((REPOSITORY / folder.strip("`") / name).is_file() for name in files), folder


def test_files_in_the_table_of_additions_exist():
    rows = {row[0]: row[1:] for row in tables((REPOSITORY / "CONTRIBUTING.md").read_text())["to add"]}
    assert {"a ranking loss", "a data source", "a callback of your own", "a chat template"} <= set(rows)
    for thing, cells in rows.items():
        for cell in cells:
            assert paths_in(cell) and all(path.exists() for path in paths_in(cell)), thing
        assert all("tests" in path.parts for path in paths_in(cells[1])), thing
        for name in re.findall(r"`([A-Za-z_]+)`", cells[0]):  # a function or table of one of these files
            files = [path for path in paths_in(cells[0]) if path.suffix == ".py"]
            assert any(re.search(rf"^(def )?{name}\b", path.read_text(), re.MULTILINE) for path in files), name


def test_new_locations_in_the_changelog_exist():
    package = REPOSITORY / "rankllm_composer"
    for old, new in tables((REPOSITORY / "CHANGELOG.md").read_text())["old module"]:
        targets = re.findall(r"`([\w/]+(?:\.py|/))`", new)
        assert targets and all((package / target).exists() or target == "benchmarks/" for target in targets), new
        if "under the same name" in new:
            assert all((package / targets[0] / f"{name}.py").exists() for name in re.findall(r"`(\w+)`", old)), old


def test_the_page_of_recipe_keys_is_up_to_date(tmp_path):
    assert run_cli(["recipes", "keys", "--markdown"], tmp_path) == (REPOSITORY / "docs" / "recipe.md").read_text()


def test_the_citation_names_this_version():
    import yaml

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert (citation["title"], citation["version"], citation["license"]) == (
        "rankllm-composer",
        project["version"],
        "Apache-2.0",
    )
    assert f"## {project['version']}" in (REPOSITORY / "CHANGELOG.md").read_text()
    for reference in citation["references"]:
        assert reference["authors"] and reference["url"].startswith("https://arxiv.org/abs/")


def test_extras_in_pages_exist():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for page in PAGES for name in re.findall(r"'\.\[(\w+)\]'", page.read_text())}
    assert named and named <= set(extras)
