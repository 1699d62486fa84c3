"""Names in a model's path by which the inference client takes it for a model of another kind."""

from __future__ import annotations

from pathlib import Path

from rankllm_composer.prompts.clients import CURRENT_CLIENT, ClientVersion
from rankllm_composer.screen import warn

_NAMES = {
    "gpt": "a model of OpenAI's API",
    "gemini": "a model of Google's API",
    "monot5": "a monoT5 reranker",
    "duot5": "a duoT5 reranker",
    "rank_vicuna": "RankVicuna, and replaces the chat template",
    "lit5-distill": "a LiT5 reranker",
    "lit5-score": "a LiT5 reranker",
    "monoelectra": "a MonoELECTRA reranker",
    "gaggle-reranker": "a Gaggle reranker",
    "jina-reranker": "a Jina reranker",
}
"""Name → what the client makes of a model whose path contains it."""

_WHOLE_PATHS = {
    "rank_zephyr": "the published RankZephyr, which it downloads",
    "rank_random": "an order at random",
    "rank_identity": "the order of the first stage",
    "unspecified": "the order of the first stage",
}
"""Path → what the client makes of it, if it is exactly that."""

_ANY_CASE = ("lit5-distill", "lit5-score", "monoelectra", "gaggle-reranker", "jina-reranker")
_NEW = {"monoelectra", "gaggle-reranker", "jina-reranker"}  # since 0.26.0


class ServingNameWarning(UserWarning):
    """The inference client would take the model at a path for one of another kind."""


def client_names(client: ClientVersion = CURRENT_CLIENT) -> tuple[str, ...]:
    """Names that choose another kind of reranker wherever a path contains them."""
    return tuple(name for name in _NAMES if client != "0.25.7" or name not in _NEW)


def misread_names(path: str | Path, client: ClientVersion = CURRENT_CLIENT) -> tuple[str, ...]:
    """Names that the inference client finds in a path, compared with case as it does.

    Source:
        rank_llm 0.25.7 and 0.26.0: `Reranker.create_model_coordinator` and `VllmHandler`.
    """
    text = str(path)
    if text in _WHOLE_PATHS:
        return (text,)
    return tuple(name for name in client_names(client) if name in (text.lower() if name in _ANY_CASE else text))


def describe_misread(path: str | Path, client: ClientVersion = CURRENT_CLIENT) -> str | None:
    """A sentence on what the inference client would take the model at a path for; None if it reads it as it is."""
    names = misread_names(path, client)
    if not names:
        return None
    if names[0] in _WHOLE_PATHS:
        return f"{path} is a name of rank_llm's own, for {_WHOLE_PATHS[names[0]]}. Serve it from another path."
    return (
        f"{path} contains {' and '.join(map(repr, names))}, so rank_llm takes the model for {_NAMES[names[0]]}. "
        "Serve it from another path."
    )


def warn_misread(path: str | Path, client: ClientVersion = CURRENT_CLIENT) -> None:
    """Warn if the inference client would take a model at this path for one of another kind."""
    sentence = describe_misread(path, client)
    if sentence is not None:
        warn(sentence, ServingNameWarning, stacklevel=3)
