"""Chat templates as programs: rendered as transformers does, with a given clock, and stopped at limits."""

from __future__ import annotations

import copy
from datetime import datetime

import pytest
from support.tiny_training import new_tokenizer
from transformers import AutoTokenizer

from rankllm_composer.errors import ModelError, PromptError
from rankllm_composer.model.loading import load_tokenizer
from rankllm_composer.options import ModelOptions
from rankllm_composer.prompts import template
from rankllm_composer.prompts.chat import control_tokens_in, render_chat, template_notes
from rankllm_composer.prompts.contract import chat_template_sha256
from rankllm_composer.prompts.template import fix_date, render_template
from rankllm_composer.recipe.load import load_recipe, recipe_to_yaml

MESSAGES = [{"role": "system", "content": "Rank."}, {"role": "user", "content": "  one\n{{ two }} <think>x</think> "}]
TURNS = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content | trim }}\n  {% endfor %}{{ '<answer>\n' }}"
LLAMA = (  # as Llama 3.2 prints the date
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}Today Date: {{ date_string }}\n" + TURNS
)
GRANITE = (  # which prints it where there is no system message
    "{% if messages[0].role != 'system' %}{{ 'Today is ' + strftime_now('%B %d, %Y') + '.\n' }}{% endif %}" + TURNS
)
ODD = (
    "\n  {% if tools %}tools{% endif %}\n    {{- bos_token }} {% for m in messages %}{% generation %}{{ m | tojson }}"
    "{% endgeneration %}{% if loop.last %}{% break %}{% endif %}{% for c in m.content if c != 'n' %}{{ c }}{% endfor %}"
    "{% endfor %}{% macro twice(x) %}{{ x ~ x }}{% endmacro %}{{ twice('a') * 2 + '%s' % 'b' }}{{ '{:>4}'.format(7) }}"
    "{{ messages | map(attribute='role') | join(', ') | upper }}{{ [3, 1] | sort | list }}{{ namespace(x=2).x ** 2 }}\n"
)
THINKING = TURNS + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
DIRECTIVES = "%a %A %w %d %b %B %m %y %Y %H %I %p %M %S %f %z %Z %j %U %W %c %x %X %% %G %u %V %e %D %F %T %-d %-m %-H"


@pytest.fixture
def tokenizer():
    return copy.deepcopy(new_tokenizer())


def theirs(tokenizer, messages=MESSAGES) -> str:
    """What transformers renders, for the client and any other program."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def on(day: int, tokenizer, messages=MESSAGES) -> str:
    return render_template(tokenizer, messages, lambda: datetime(2025, 3, day, 12))


@pytest.mark.parametrize("source", [TURNS, LLAMA, GRANITE, ODD, THINKING, "golden/mistral_v3", "golden/zephyr_v1"])
def test_prompts_are_those_of_transformers(tokenizer, golden, source):
    is_file = source.startswith("golden/")
    tokenizer.chat_template = (golden / f"{source[7:]}.jinja").read_text() if is_file else source
    for messages in (MESSAGES, MESSAGES[1:]):
        assert render_template(tokenizer, messages) == theirs(tokenizer, messages)
    assert render_template(tokenizer, MESSAGES) == theirs(tokenizer)


@pytest.mark.parametrize(("source", "shown"), [(LLAMA, "Today Date: "), (GRANITE, "Today is ")])
def test_a_date_in_prompts_is_reported_and_fixed_for_every_program(tokenizer, tmp_path, source, shown):
    tokenizer.chat_template = source
    assert any(on(1, tokenizer, m) != on(2, tokenizer, m) for m in (MESSAGES, MESSAGES[1:]))
    (note,) = template_notes(tokenizer)
    assert shown in note and ("where a record has no system text" in note) == (source is GRANITE)
    date = note.partition("Set model.template_date=")[2][:10]  # the advice works
    before = chat_template_sha256(tokenizer)
    tokenizer.save_pretrained(tmp_path / "base")
    fixed = load_tokenizer(ModelOptions(name_or_path=tmp_path / "base", template_date=date))
    assert list(template_notes(fixed)) == [] and chat_template_sha256(fixed) != before
    for moment in ("2024-07-26", "2023-12-01"):  # a later stage may change it
        fix_date(fixed, moment)
        fixed.save_pretrained(tmp_path / moment)
        exported = AutoTokenizer.from_pretrained(tmp_path / moment)
        for messages in (MESSAGES, MESSAGES[1:]):
            printed = render_template(tokenizer, messages, lambda day=moment: datetime.fromisoformat(day))
            assert theirs(exported, messages) == printed == on(1, exported, messages) == on(2, fixed, messages)


def test_every_directive_of_a_date_is_fixed(tokenizer):
    tokenizer.chat_template = f"{{{{ strftime_now('{DIRECTIVES} 5%%d') }}}}"
    fix_date(tokenizer, "2024-07-06")
    assert theirs(tokenizer) == datetime(2024, 7, 6).strftime(f"{DIRECTIVES} 5%%d")


def test_a_date_without_effect_or_that_does_not_exist_is_refused(tokenizer, tmp_path):
    with pytest.raises(PromptError, match=r"template_date is 2024-07-26 but the chat template .* prints no date"):
        fix_date(tokenizer, "2024-07-26")
    tokenizer.chat_template = LLAMA
    with pytest.raises(PromptError, match=r"'2023-02-29'; expected a date such as 2024-07-26"):
        fix_date(tokenizer, "2023-02-29")
    recipe = load_recipe("demo", ["model.template_date=2024-07-26"])
    (tmp_path / "r.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(tmp_path / "r.yaml").model.template_date == recipe.model.template_date == "2024-07-26"


LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"
BIG = "{% set x = 'a' * 1000000 %}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (LOOP * 4 + "x" + END * 4, "steps"),
        (LOOP + "{% for j in range(99999) if false %}" + END * 2, "steps"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}", "steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion is deeper than 100 calls"),
        ("{% for x in messages recursive %}{{ loop([x]) }}{% endfor %}", "recursion is deeper than 100 calls"),
        (LOOP + "{{ range(99999) | sum }}" + END, "steps"),
        ("{% set n = namespace(x='ab') %}" + LOOP + "{% set n.x = n.x ~ n.x %}" + END, "steps|characters"),
        ("{% set n = namespace(x=[1]) %}" + LOOP + "{% set n.x = n.x + n.x %}" + END, "steps|characters"),
        ("{{ 'a' * 10000000000 }}", "characters"),
        ("{{ 10 ** 1000000000 }}", "numbers"),
        ("{% set n = namespace(x=3) %}" + LOOP + "{% set n.x = n.x * n.x %}" + END, "numbers"),
        *[
            (f"{{{{ {text} }}}}", "numbers")
            for text in (
                "'a' | center(10000000000)",
                "'a'.ljust(10000000000)",
                "'%10000000000d' % 1",
                "'{:10000000000}'.format(1)",
                "'{:{}}'.format(1, 10**10)",
                "'%10000000000d' | format(1)",
                "'%*d' % (10**10, 1)",
            )
        ],
        (BIG + "{{ x.replace('a', x) }}", "characters"),
        (BIG + "{{ x | replace('a', x) }}", "characters"),
        (BIG + "{{ range(99999) | join(x) }}", "characters"),
        (BIG + LOOP + "{{ x }}" + END, "characters"),
        (BIG + "{% set y %}" + LOOP + "{{ x }}" + END + "{% endset %}", "steps"),
        (LOOP + "x" * 100_000 + END, "characters|steps"),
        ("x" * (template.MAX_CHARS + 1), "characters"),
        ("{{ lipsum() }}", "undefined"),
        ("{{ [1, 2] | random }}", "No filter named 'random'"),
    ],
)
def test_templates_without_end_or_with_chance_are_stopped(tokenizer, source, reason):
    tokenizer.chat_template = source
    with pytest.raises(PromptError, match=rf"chat template failed on the roles system, user: .*({reason}).*Correct"):
        render_chat(MESSAGES, tokenizer)


def test_limits_leave_room_for_long_prompts(tokenizer):
    long = "word " * 200_000
    tokenizer.chat_template = "{% for m in messages %}{{ m.content.split('</think>')[-1].strip() | trim }}{% endfor %}"
    assert len(render_chat([{"role": "user", "content": long}], tokenizer)) == len(long) - 1


def test_thinking_is_closed_or_reported(tokenizer):
    tokenizer.chat_template = THINKING
    assert render_chat(MESSAGES, tokenizer).endswith("<answer>\n<think>\n\n</think>\n\n")
    assert list(template_notes(tokenizer)) == []
    tokenizer.chat_template = TURNS + "{{ '<think>\n' }}"
    (note,) = template_notes(tokenizer)
    assert "opens <think> and does not close it" in note


def test_tokens_that_the_repair_of_text_destroys_are_reported(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<｜User｜>", "<|Plain|>"]})
    tokenizer.chat_template = "{% for m in messages %}<｜User｜>{{ m.content }}<|Plain|>{% endfor %}"
    assert "<|User|>" in render_chat(MESSAGES, tokenizer) and "<｜User｜>" not in render_chat(MESSAGES, tokenizer)
    (note,) = template_notes(tokenizer)
    assert "changes <｜User｜> of the chat template" in note and "Plain" not in note


def test_control_tokens_in_passages(tokenizer):
    tokenizer.add_tokens(["<|turn|>", "  "])
    tokenizer.chat_template = "{% for m in messages %}{{ '<|turn|>' + m.content + '\n' }}{% endfor %}"
    assert control_tokens_in("a  <|turn|> b <s> c </think>", tokenizer) == ["<s>", "<|turn|>"]
    assert control_tokens_in("nothing  here", tokenizer) == []
    tokenizer.add_tokens(["</think>"])
    tokenizer.chat_template += " "
    assert "</think>" in control_tokens_in("</think>", tokenizer)


def test_a_base_without_a_chat_template_is_reported_as_before(tokenizer, tmp_path):
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises((PromptError, ModelError), match=r"prints no date|chat template"):
        load_tokenizer(ModelOptions(name_or_path=tmp_path, template_date="2024-07-26"))
