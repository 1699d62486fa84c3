"""Options from Python: what is wrong with them is worded as in a recipe, and nothing else is raised."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from rankllm_composer import options
from rankllm_composer.errors import RankLLMComposerError, RecipeError
from rankllm_composer.recipe import sections

CLASSES = [
    value
    for module in (options, sections)
    for value in vars(module).values()
    if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
]


@pytest.mark.parametrize(
    ("build", "problems"),
    [
        (
            lambda: options.RerankOptions(passes=0, stride="x"),
            [
                "stride is 'x'; expected a whole number of at least 1, or null.",
                "passes is 0; expected a whole number of at least",
            ],
        ),
        (lambda: options.RerankOptions(pases=1), ["pases is an unknown key; expected one of", "Did you mean passes?"]),
        (lambda: options.ModelOptions(), ["name_or_path is missing; expected text. Set it"]),
        (lambda: options.SourceOptions(identifiers="letter"), ["one of letters, numbers. Did you mean letters?"]),
        (lambda: options.BuildOptions(hashes=[1]), ["hashes is 1; expected a list, each text. Put it in quotes."]),
        (
            lambda: options.RerankOptions(*[None] * 40),
            ["options is given 40 without a name; expected each by its name. Write NAME=VALUE."],
        ),
        (
            lambda: dataclasses.replace(options.RerankOptions(), top_k=1),
            ["top_k is 1; expected a whole number of at least 2."],
        ),
    ],
)
def test_wrong_options_are_named_with_value_and_what_is_expected(build, problems):
    with pytest.raises(RecipeError) as caught:
        build()
    assert isinstance(caught.value, RankLLMComposerError)
    for problem in problems:
        assert problem in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_no_class_of_options_raises_errors_of_its_library(kind):
    with pytest.raises(RecipeError, match=rf"^{kind.__name__}: .*problem"):
        kind(no_such_option=1)


def test_options_are_still_plain_objects():
    given = options.RerankOptions(top_k=7)
    assert (
        pickle.loads(pickle.dumps(given)) == given and dataclasses.replace(given, top_k=100) == options.RerankOptions()
    )
