"""Commands of typer that accept the field's names of options, and whose help has examples, exit codes and a page."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from rankllm_composer.recipe.names import LETTERS, synonyms


class Help(NamedTuple):
    """The end of a command's help: lines that can be typed, the page of docs/, and exit codes besides 0 and 2."""

    examples: tuple[str, ...]
    page: str
    exits: tuple[str, ...] = ()


HELP: Mapping[str, Help] = {
    "sources look": Help(("sources look bm25.trec qrels.trec beir/scifact",), "what-it-reads.md"),
    "shards build": Help(
        (
            "shards build --input records.jsonl --output shards --hold-out 0.02",
            "shards build --run bm25.trec --qrels qrels.trec --queries queries.jsonl --docs docs.jsonl -o lists",
            "shards build --run irds:beir/scifact/train --qrels irds:beir/scifact/train -o lists",
        ),
        "own-data.md",
    ),
    "shards merge": Help(("shards merge s3://bucket/lists",), "own-data.md"),
    "shards verify": Help(("shards verify shards --records", "shards verify s3://bucket/lists --json"), "own-data.md"),
    "shards info": Help(("shards info shards",), "own-data.md"),
    "recipes list": Help(("recipes list",), "recipe.md"),
    "recipes show": Help(("recipes show first_mistral",), "recipe.md"),
    "recipes copy": Help(("recipes copy first_mistral mine.yaml",), "recipe.md"),
    "recipes check": Help(
        ("recipes check mine.yaml -n 8 optimizer.lr=1e-5", "recipes check first_mistral --json"), "recipe.md"
    ),
    "recipes keys": Help(("recipes keys", "recipes keys --markdown"), "recipe.md"),
    "recipes schema": Help(("recipes schema",), "recipe.md"),
    "inspect": Help(
        ("inspect first_mistral --record 3", "inspect --model runs/first_mistral/hf/epoch_2"), "troubleshooting.md"
    ),
    "plan": Help(
        (
            "plan first_mistral -n 8 --gpu h100-80gb",
            "plan mine.yaml -n 1 --gpu rtx4090-24gb --lists 20000 model.activation_checkpointing=1.0",
            "plan first_mistral --json",
        ),
        "planning.md",
        ("3 the run does not fit the GPU",),
    ),
    "train": Help(
        ("train first_mistral -n 8", "train mine.yaml -n 8 optimizer.lr=1e-5 run.name=hotter"),
        "cluster.md",
        ("1 a rank failed with an error of its own", "130 stopped by Ctrl-C"),
    ),
    "rerank": Help(
        (
            "rerank --model runs/x/hf/epoch_2 --run bm25.trec --queries queries.jsonl --docs docs.jsonl -o out.trec",
            "rerank --model runs/x/hf/epoch_2 --run irds:beir/scifact/test --qrels irds:beir/scifact/test -o out.trec",
            "rerank --model runs/x/hf/epoch_2 --beir nfcorpus,scifact --run bm25_runs -o reranked",
        ),
        "serving.md",
    ),
    "compare": Help(
        (
            "compare bm25.trec reranked.trec --qrels qrels.trec --per-query values.tsv",
            "compare epoch_0.trec.figures.json epoch_2.trec.figures.json --json",
        ),
        "serving.md",
    ),
    "requests": Help(
        ("requests --run bm25.trec --queries queries.jsonl --docs docs.jsonl -o requests.jsonl",), "serving.md"
    ),
    "export": Help(
        ("export runs/x --output exported --checkpoint ep1-ba200", "export runs/x --push me/reranker --dry-run"),
        "serving.md",
    ),
    "report": Help(("report runs/a", "report runs/a runs/b --output report.html"), "own-data.md"),
    "demo": Help(("demo --folder runs/demo",), "own-data.md"),
}
"""Words of a command → the end of its help."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON (docs/commands.md); messages are on standard error.")]

DOES_NOT_FIT = 3
"""Exit code of a plan whose run does not fit the GPU."""

EXITS = ("0 done", "2 something given is wrong; stderr says what, where and what to do")


class Command(TyperCommand):
    """A command that also takes the names that other programs of the field give its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, with the names of others replaced by ours and underscores by hyphens."""
        return super().parse_args(ctx, list(self._in_our_names(args)))

    def other_names(self) -> dict[str, str]:
        """Option of others → our option, for those that this command has."""
        names = {flag[2:].replace("-", "_"): flag for flag in self._flags() if flag.startswith("--")}
        found = {f"--{other.replace('_', '-')}": names[ours] for other, ours in synonyms(names).items()}
        letters = {
            letter: names[meant]
            for letter, ours in LETTERS.items()
            for meant in ours
            if meant in names and letter not in self._flags()
        }
        return found | letters

    def _flags(self) -> list[str]:
        options = (parameter for parameter in self.params if parameter.param_type_name == "option")
        return [flag for option in options for flag in (*option.opts, *option.secondary_opts)]

    def _in_our_names(self, args: Sequence[str]) -> Iterator[str]:
        flags, others = set(self._flags()), self.other_names()
        for number, argument in enumerate(args):
            if argument == "--":
                yield from args[number:]
                return
            name, equals, value = argument.partition("=")
            plain = name if name in flags or not name.startswith("--") else name.replace("_", "-")
            plain = others.get(plain, plain)
            yield f"{plain}{equals}{value}" if plain in flags else argument

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the end of the help."""
        program, *words = ctx.command_path.split()
        found = HELP.get(" ".join(words))
        one_each = {ours: other for other, ours in reversed(self.other_names().items()) if len(other) > 2}
        others = [*reversed(one_each.values()), *(name for name in self.other_names() if len(name) == 2)]
        if found is not None:
            with formatter.section("Examples"):
                for example in found.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{program} {example}\n")
        if others:
            with formatter.section("Other names of these options are accepted, too"):
                indent = " " * formatter.current_indent
                how: Any = {"initial_indent": indent, "subsequent_indent": indent, "break_on_hyphens": False}
                formatter.write(f"{textwrap.fill(', '.join(others), formatter.width, **how)}\n")
        if found is not None:
            with formatter.section("Exit codes"):
                formatter.write_text("; ".join((*EXITS, *found.exits)))
            with formatter.section("More"):
                formatter.write_text(f"docs/{found.page}")


class Group(TyperGroup):
    """A group of commands that suggests a command of another group for one that it lacks."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or raise a usage error that names those of the same name elsewhere."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            groups = ((name, getattr(inner, "commands", {})) for name, inner in self.commands.items())
            elsewhere = [f"{name} {args[0]}" for name, inner in groups if args[0] in inner]
            if elsewhere:
                ctx.fail(f"No such command {args[0]!r}. Did you mean {' or '.join(map(repr, elsewhere))}?")
        return super().resolve_command(ctx, args)


class Commands(typer.Typer):
    """An app or a group whose commands are of the class `Command`."""

    def __init__(self, **settings: Any) -> None:
        defaults: dict[str, Any] = {"cls": Group, "no_args_is_help": True, "rich_markup_mode": None}
        super().__init__(**(defaults | settings))

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Register a command, see `typer.Typer.command`."""
        return super().command(name, **({"cls": Command} | settings))
