"""Names in a model's path by which the inference client takes it for a model of another kind."""

from __future__ import annotations

from pathlib import Path

from rankllm_composer.screen import warn

CLIENT_NAMES = {
    "gpt": "a model of OpenAI's API",
    "gemini": "a model of Google's API",
    "monot5": "a monoT5 reranker",
    "duot5": "a duoT5 reranker",
    "rank_vicuna": "RankVicuna, and replaces the chat template",
    "lit5-distill": "a LiT5 reranker",
    "lit5-score": "a LiT5 reranker",
}
"""Name → what the client makes of a model whose path contains it."""

_ANY_CASE = ("lit5-distill", "lit5-score")


class ServingNameWarning(UserWarning):
    """The inference client would take the model at a path for one of another kind."""


def misread_names(path: str | Path) -> tuple[str, ...]:
    """Keys of `CLIENT_NAMES` that the inference client finds in a path, compared with case as it does.

    Source:
        rank_llm 0.25.7: `Reranker.create_model_coordinator` and `VllmHandler`.
    """
    text = str(path)
    return tuple(name for name in CLIENT_NAMES if name in (text.lower() if name in _ANY_CASE else text))


def describe_misread(path: str | Path) -> str | None:
    """A sentence on what the inference client would take the model at a path for; None if it reads it as it is."""
    names = misread_names(path)
    if not names:
        return None
    return (
        f"{path} contains {' and '.join(map(repr, names))}, so rank_llm takes the model for {CLIENT_NAMES[names[0]]}. "
        "Serve it from another path."
    )


def warn_misread(path: str | Path) -> None:
    """Warn if the inference client would take a model at this path for one of another kind."""
    sentence = describe_misread(path)
    if sentence is not None:
        warn(sentence, ServingNameWarning, stacklevel=3)
