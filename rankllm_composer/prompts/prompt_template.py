"""Prompt templates: what a prompt says, in the YAML file that the inference client takes as `--prompt-template-path`.

Source:
    rank_llm 0.25.7 and 0.26.0: `RankLLM.__init__`, `SingleTurnListwiseInferenceHandler`, `ResponseAnalyzer`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from dataclasses import dataclass as plain_dataclass
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, get_args

from pydantic import Strict
from pydantic.dataclasses import dataclass

from rankllm_composer.errors import Problem, PromptError, RecipeError, first_line, worded
from rankllm_composer.options import CONFIG, option
from rankllm_composer.prompts.permutations import IdentifierStyle, format_permutation, identifiers
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn

TEMPLATE_FILE = "prompt_template.yaml"
"""Name of the template in an exported folder."""

Method = Literal["singleturn_listwise"]
Pattern = Annotated[str, Strict()]
_PLACEHOLDERS = {"prefix": ("query", "num"), "body": ("rank", "candidate"), "suffix": ("query", "num", "psg_ids")}
_REGEXES = ("output_validation_regex", "output_extraction_regex")
_OTHER_METHODS = {
    "multiturn_listwise": "several turns",
    "rankfid": "a T5 reranker",
    "pointwise": "one passage at a time",
    "pairwise": "two passages at a time",
}


@worded
@dataclass(frozen=True, kw_only=True, config=CONFIG)
class PromptTemplate:
    """The parts of a prompt. The user turn is the prefix, the body once per passage, and the suffix, end to end.

    Texts are Python format strings: `{{` is a brace. `problems` says what is wrong with them.
    """

    method: Method = option("Kind of the prompt: one user turn with all passages.", "singleturn_listwise")
    system_message: Pattern = option("System message; empty = none.", "", unit="text")
    prefix: Pattern = option("Before the passages, with {query} and {num}, their number.", "", unit="text")
    body: Pattern = option("A passage: {rank}, its identifier, and {candidate}, its text.", unit="text")
    suffix: Pattern = option("After the passages, with {query}, {num} and {psg_ids}.", "", unit="text")
    output_validation_regex: Pattern = option("What an answer matches as a whole.", unit="regular expression")
    output_extraction_regex: Pattern = option("An identifier in an answer.", unit="regular expression")

    def render(self, query: str, passages: Sequence[str], style: IdentifierStyle) -> str:
        """Write the user turn exactly as the client does; query and passages are not changed."""
        names = identifiers(len(passages), style)
        psg_ids = ", ".join(f"PASSAGE{place}" for place in range(1, len(names) + 1))
        around: dict[str, Any] = {"query": query, "num": len(names), "psg_ids": f"[{psg_ids}]"}
        body = "".join(self.body.format(rank=name, candidate=text) for name, text in zip(names, passages))
        return self.prefix.format(**around) + body + self.suffix.format(**around)

    def unread(self, num_candidates: int, style: IdentifierStyle) -> str | None:
        """Say why an answer over so many candidates is not read back by the template's patterns; None if it is.

        Answers are trained as `[B] > [A]`, which the client reads whatever a template says.
        """
        names = identifiers(num_candidates, style)
        for order in (range(num_candidates), range(num_candidates - 1, -1, -1)):
            answer = format_permutation(order, style)
            found: list[Any] = re.findall(_pattern(self.output_extraction_regex), answer)
            if not re.fullmatch(_pattern(self.output_validation_regex), answer):
                return f"output_validation_regex does not match the answer {_cut(answer)}"
            if found != [names[i] for i in order]:
                return f"output_extraction_regex reads {_cut(str(found))} from the answer {_cut(answer)}"
        return None

    def check_reads(self, num_candidates: int, style: IdentifierStyle) -> None:
        """Raise PromptError unless an answer over so many candidates is read back as it was written."""
        reason = self.unread(num_candidates, style)
        if reason is not None:
            other = "letters" if style == "numbers" else "numbers"
            raise PromptError(
                f"data.prompt_template: {reason}; the lists are of {num_candidates} candidates named by {style}. "
                f"Use a template whose patterns read {style}, or set data.train.identifiers={other} if it is for those."
            )

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong with the texts; each key is the name of a part."""
        texts = [(name, _text_problem(name, text)) for name, text in asdict(self).items()]
        yield from (Problem(name, *found) for name, found in texts if found is not None)
        if any(found for _, found in texts):
            return
        if all("query" not in _names_in(text) for text in (self.prefix, self.suffix)):
            yield Problem("prefix", "without {query}, as is suffix", "{query} in one of them", "Write it there.")
        reasons = {style: self.unread(2, style) for style in get_args(IdentifierStyle)}
        if all(reasons.values()):
            key, _, reason = str(reasons["letters"]).partition(" ")
            expected = "one that reads [B] > [A] or [2] > [1], as models are trained to answer"
            yield Problem(key, f"a pattern that {reason}", expected, "Use that of a template of rank_llm for them.")

    def to_yaml(self) -> str:
        """The template as a YAML file for the client, in ASCII, which every locale reads; empty parts are left out."""
        import yaml

        class Dumper(yaml.SafeDumper):  # type: ignore[misc]  # no stubs
            """Writes text of several lines as it is."""

        Dumper.add_representer(
            str,
            lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None),
        )
        parts = {name: text for name, text in asdict(self).items() if text}
        written: str = yaml.dump(parts, Dumper=Dumper, sort_keys=False, width=10_000)
        assert yaml.safe_load(written) == parts
        return written


@plain_dataclass(frozen=True, slots=True)
class Prompt:
    """How a list is written as a prompt: the identifiers, and the template; None = the published prompt."""

    style: IdentifierStyle = "letters"
    template: PromptTemplate | None = None

    @property
    def system(self) -> str:
        """The system message; empty = none."""
        return SYSTEM_MESSAGE if self.template is None else self.template.system_message

    def user_turn(self, query: str, passages: Sequence[str]) -> str:
        """The user turn."""
        if self.template is None:
            return render_user_turn(query, passages, self.style)
        return self.template.render(query, passages, self.style)


def read_prompt_template(path: str | Path) -> PromptTemplate:
    """Read and check a prompt template.

    Raises:
        RecipeError: the file cannot be read or used; each problem names the file, the line and the key.
    """
    values, lines = _read_yaml(str(path))

    def at(name: str) -> str:
        return f"{path}:{lines.get(name, 1)}: {name}"

    return template_of(values, str(path), at)


def template_of(
    values: Mapping[str, Any], source: str = "prompt template", at: Callable[[str], str] = str
) -> PromptTemplate:
    """A checked template of these keys; `at` makes a key's name in messages, `source` heads them (RecipeError)."""
    known = [field.name for field in fields(PromptTemplate)]
    method = values.get("method", get_args(Method)[0])
    if isinstance(method, str) and method not in get_args(Method):
        shown = f"{method!r}, {_OTHER_METHODS[method]}" if method in _OTHER_METHODS else repr(method)
        expected = f"{get_args(Method)[0]}: one user turn with all passages"
        raise RecipeError(source, [Problem(at("method"), shown, expected, "Use a template of this method.")])
    found = []
    for name, value in values.items():
        if name not in known:
            near = get_close_matches(str(name), known, 1)
            remedy = f"Did you mean {near[0]}?" if near else "Remove it."
            found.append(Problem(at(str(name)), "an unknown key", f"one of {', '.join(known)}", remedy))
        elif not isinstance(value, str):
            kind = "empty" if value is None else f"of type {type(value).__name__}"
            found.append(Problem(at(name), kind, "text", "Write text, in quotes where needed."))
    for name in ("method", "body", *_REGEXES):
        if name not in values:
            found.append(Problem(at(name), "missing", "text, as rank_llm requires", "Add it."))
    if not found:
        template = PromptTemplate(**values)
        found = [problem._replace(key=at(problem.key)) for problem in template.problems()]
    if found:
        raise RecipeError(source, found)
    return template


def _read_yaml(path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The keys of a template with their values and lines; RecipeError if it is not a YAML mapping."""
    import yaml

    def refuse(found: str, remedy: str, place: str = path) -> RecipeError:
        return RecipeError(path, [Problem(place, found, "a prompt template of rank_llm, a YAML mapping", remedy)])

    try:
        text = Path(path).read_text(encoding="utf-8")
        node, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except FileNotFoundError:
        raise refuse("not a file", "Correct the path.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}" if mark else path
        raise refuse(f"not valid YAML ({error.problem})", "Correct it.", place) from None
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise refuse(f"not readable ({first_line(error)})", "Correct the file.") from None
    if not isinstance(values, dict):
        raise refuse("empty" if values is None else f"a {type(values).__name__}", "Write keys such as body:.")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            found, remedy = f"there twice, first in line {lines[key.value]}", "Remove one of the two."
            raise RecipeError(path, [Problem(f"{path}:{line}: {key.value}", found, "each key once", remedy)])
        lines[str(key.value)] = line
    return values, lines


def _text_problem(name: str, text: str) -> tuple[str, str, str] | None:
    """What is wrong with one part: found, expected, remedy."""
    braces = "Write {{ and }} for braces that are to be seen."
    if name in _REGEXES or name in ("method", "system_message"):
        braces = r"Write \x7b in a pattern." if name in _REGEXES else "Close it, or leave it out."
    try:
        text.encode()
        used = [parsed for parsed in Formatter().parse(text) if parsed[1] is not None]
        if name in _REGEXES:
            re.compile(_pattern(text))
    except UnicodeEncodeError:
        return "not valid Unicode: half of a surrogate pair", "text", "Write the text again."
    except (re.error, SyntaxError) as error:
        return f"not a regular expression ({first_line(error)})", "one as in rank_llm", "Correct it."
    except ValueError as error:
        return f"not a format string ({first_line(error)}), which rank_llm refuses", "balanced braces", braces
    if name == "system_message":
        filled = sorted(_names_in(text) & {part for row in _PLACEHOLDERS.values() for part in row})
        if filled:
            found = f"with {{{filled[0]}}}, which rank_llm shows as it is"
            return found, "a text without placeholders", "Move it into prefix or suffix."
    if name not in _PLACEHOLDERS:
        return None
    allowed = [f"{{{field}}}" for field in _PLACEHOLDERS[name]]
    for _, field, spec, conversion in used:
        written = f"{{{field}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}}}"
        if name == "body" and field == "score":
            found = "with {score}, the first stage's score, which training lists do not have"
            return found, f"{' and '.join(allowed)} alone", "Remove it."
        if written not in allowed:
            return f"with {written}", f"of placeholders, only {', '.join(allowed)}", f"Correct it. {braces}"
    missing = [field for field in allowed if name == "body" and field not in {f"{{{part[1]}}}" for part in used}]
    if missing:
        return f"without {' and '.join(missing)}", " and ".join(allowed), "Add it."
    return None


def _names_in(text: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(text) if field is not None}


def _pattern(text: str) -> str:
    r"""A pattern, which rank_llm's files write as a Python literal in a plain YAML text: `r"\[(\d+)\]"`."""
    text = text.strip()
    if not re.match(r"""[rR]?["']""", text):
        return text
    value = ast.literal_eval(text)
    return value if isinstance(value, str) else text


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
