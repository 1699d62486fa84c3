"""Model paths, and the model kinds that the inference client derives from them."""

from __future__ import annotations

MISREAD_PATHS = {
    "runs/mygpt/epoch_2": ("gpt",),
    "gemini_student": ("gemini",),
    "x/monot5": ("monot5",),
    "x/duot5-3b": ("duot5",),
    "rank_vicuna": ("rank_vicuna",),
    "x/LiT5-Distill-base": ("lit5-distill",),
    "x/lit5-score": ("lit5-score",),
    "gpt/lit5-score": ("gpt", "lit5-score"),
    "x/monoELECTRA-base": ("monoelectra",),
    "Gaggle-Reranker": ("gaggle-reranker",),
    "x/jina-reranker-v3": ("jina-reranker",),
    "rank_zephyr": ("rank_zephyr",),
    "rank_random": ("rank_random",),
    "rank_identity": ("rank_identity",),
    "unspecified": ("unspecified",),
}
"""Path → the names in it that make the client treat the model as another kind."""

NEW_NAMES = {"monoelectra", "gaggle-reranker", "jina-reranker"}
"""Those that 0.25.7 takes for no other kind."""

WHOLE_PATHS = {"rank_zephyr", "rank_random", "rank_identity", "unspecified"}
"""Those that are names only as a whole path."""

PLAIN_PATHS = ("runs/first_mistral/hf/epoch_2", "GPT", "Gemini", "x/MonoT5", "lit5", "x/rank_zephyr", "electra")
