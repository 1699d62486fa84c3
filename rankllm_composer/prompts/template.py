"""Render chat templates: with a clock that is given, and within limits, because a template is a program of a stranger.

Prompts are those of `tokenizer.apply_chat_template`. A template that takes too many steps or makes too long a text is
stopped, and nothing in it is random.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from datetime import date, datetime
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rankllm_composer.errors import PromptError

if TYPE_CHECKING:
    from jinja2.runtime import Context
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

MAX_STEPS = 200_000
"""Iterations, calls and filters of one prompt; 100 characters or 10 items of their results count as one more."""

MAX_CHARS = 1 << 22
"""Longest text or list that a template may make, and longest template."""

MAX_DEPTH = 100
"""Calls inside calls. Libraries raise the limit of Python, and then the stack of the process would overflow."""

MAX_NUMBER = 100_000  # as an argument of a function or filter, such as a width
CLOCK = "strftime_now"
_DIRECTIVES = [f"%{letter}" for letter in "aAwdbBmyYHIpMSfzZjUWcxXGuVeDFTRh"]
_DIRECTIVES += [f"%-{letter}" for letter in "dmyHIMSje"]
_FIXED_CLOCK = re.compile(r"\A\{% macro strftime_now\(format\) %\}.*\{% endmacro %\}\n")
_GROWING = {"replace", "join", "indent", "expandtabs", "translate", "wordwrap", "format", "xmlattr"}


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of transformers, which counts steps and has a clock of its own."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        model = _compile_jinja_template("").environment
        super().__init__(
            trim_blocks=model.trim_blocks,
            lstrip_blocks=model.lstrip_blocks,
            extensions=[type(extension) for extension in model.extensions.values()],
            finalize=self.output,
            optimized=False,  # or constant expressions are computed without these limits
        )
        self.globals = {name: value for name, value in model.globals.items() if name != "lipsum"}
        self.globals[CLOCK] = lambda format: self.now().strftime(format)
        filters = {**model.filters}
        del filters["random"]
        self.filters = {name: self._limited(name, function) for name, function in filters.items()}
        self.now: Callable[[], datetime] = datetime.now
        self._left = MAX_STEPS
        self._depth = 0
        self._lock = threading.Lock()

    def render(self, source: str, now: Callable[[], datetime], variables: dict[str, Any]) -> str:
        """Render a template; every exception that it raises is passed on."""
        with self._lock:
            self._left, self.now = MAX_STEPS, now
            parts: list[str] = []
            num_chars = 0
            for part in _compiled(source).generate(**variables):
                parts.append(part)
                num_chars += len(part)
                self.step(num_chars, 0)
            return "".join(parts)

    def step(self, size: int = 0, num_steps: int = 1) -> bool:
        """Count steps on the way to a text or list of `size`; raise SecurityError beyond the limits."""
        self._left -= num_steps
        if self._left < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")
        if size > MAX_CHARS:
            raise SecurityError(f"it makes a text of more than {MAX_CHARS:,} characters")
        return True

    def output(self, value: Any) -> Any:
        """Count what a template prints."""
        self.step(_size(value), 1 + _size(value) // (100 if isinstance(value, str) else 10))
        return value

    def concatenate(self, *values: Any) -> str:
        """The operator `~`."""
        return str(self.output("".join(map(str, values))))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # str.format is wrapped by the sandbox
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        self._check_growth(name, [owner if isinstance(owner, str) else None, *args, *kwargs.values()])
        if self._depth == MAX_DEPTH:
            raise SecurityError(f"its recursion is deeper than {MAX_DEPTH} calls")
        self._depth += 1
        try:
            return self.output(super().call(context, function, *args, **kwargs))
        finally:
            self._depth -= 1

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            pairs = ((left, right), (right, left))
            self.step(max((_size(one) * other for one, other in pairs if isinstance(other, int)), default=0))
        is_long = isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 256
        if is_long or (operator == "**" and not -64 < right < 64) or (operator == "%" and _is_wide(left)):
            raise SecurityError("it computes with too large numbers")
        return self.output(super().call_binop(context, operator, left, right))

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._check_growth(name, [*args, *kwargs.values()])
            return self.output(function(*args, **kwargs))

        return limited

    def _check_growth(self, name: str, values: Sequence[Any]) -> None:
        numbers = [abs(value) for value in values if isinstance(value, int)]
        sizes = [size for value in values if (size := _size(value))]
        if any(number > MAX_NUMBER for number in numbers) or (name == "format" and any(map(_is_wide, values))):
            raise SecurityError("it computes with too large numbers")
        if name in _GROWING and sizes:
            self.step(sizes[0] * max([1, *sizes[1:], *numbers]) // 16)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The tree of a template, with a step in every loop and macro."""
        if len(source) > MAX_CHARS:
            raise SecurityError(f"it has more than {MAX_CHARS:,} characters")
        tree = super()._parse(source, name, filename)
        loops: list[Any] = list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)))
        for node in loops:
            printed = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
            step = _call("step", [nodes.Const(0), nodes.Const(1 + printed // 100)])
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(step, node.test)
            node.body.insert(0, nodes.ExprStmt(step))
        _replace_concatenations(tree)
        tree.set_environment(self)
        for added in tree.find_all(nodes.Node):
            added.lineno = added.lineno or 1
        return tree


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _replace_concatenations(tree: nodes.Node) -> None:
    for name, value in tree.iter_fields():
        values = value if isinstance(value, list) else [value]
        for index, inner in enumerate(values):
            if isinstance(inner, nodes.Node):
                _replace_concatenations(inner)
            if isinstance(inner, nodes.Concat):
                values[index] = _call("concatenate", inner.nodes)
        setattr(tree, name, values if isinstance(value, list) else values[0])


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | range) else 0


def _is_wide(value: Any) -> bool:
    """Whether a format has a width of five digits, or one that is an argument."""
    return isinstance(value, str) and re.search(r"\d{5}|%[^%]?\*|\{[^}]?\{", value) is not None


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    return _Environment()


@lru_cache(maxsize=32)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


def render_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], now: Callable[[], datetime] = datetime.now
) -> str:
    """Render the chat template of a tokenizer with the generation prompt, as `apply_chat_template` does.

    Args:
        now: clock of a template that prints the date.
    Raises:
        Exception: a template can raise anything; SecurityError for one that exceeds the limits.
    """
    # The client sends enable_thinking=False; other templates ignore it.
    given: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False}
    variables = {**tokenizer.special_tokens_map, "messages": list(messages), "tools": None, "documents": None, **given}
    return _environment().render(tokenizer.get_chat_template(), now, variables)


def fix_date(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Write a date into the chat template of a tokenizer, in place of today's, for every program that renders it.

    Args:
        text: the date, as 2024-07-26; of its time, 0:00 is printed.
    Raises:
        PromptError: there is no such date, or the template prints none.
    """
    try:
        day = date.fromisoformat(text)
    except ValueError as error:
        raise PromptError(
            f"model.template_date is {text!r}; expected a date such as 2024-07-26 ({error}). Correct it."
        ) from error
    template: Any = tokenizer.chat_template or ""
    templates = template if isinstance(template, dict) else {"default": template}
    fixed = {name: _with_fixed_date(source, day) for name, source in templates.items()}
    if fixed == {name: _FIXED_CLOCK.sub("", source) for name, source in templates.items()}:
        raise PromptError(
            f"model.template_date is {text} but the chat template of {tokenizer.name_or_path} prints no date; expected "
            "null. Remove the key."
        )
    tokenizer.chat_template = fixed if isinstance(template, dict) else fixed["default"]


def _with_fixed_date(source: str, day: date) -> str:
    """A template with a macro in place of the clock; unchanged if it does not use the clock."""
    source = _FIXED_CLOCK.sub("", source)
    try:
        names = {node.name for node in _environment().parse(source).find_all(nodes.Name)}
    except Exception:  # a template that cannot be parsed is reported where it is rendered
        return source
    if CLOCK not in names:
        return source
    moment = datetime(day.year, day.month, day.day)
    pairs = [("%%", "\\x01"), *((directive, moment.strftime(directive)) for directive in _DIRECTIVES), ("\\x01", "%")]
    replaced = "".join(f".replace('{directive}', '{value}')" for directive, value in pairs)
    # Its line break is trimmed, and what follows still begins a line.
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{source}"
