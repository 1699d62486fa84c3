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
}
"""Path → the names in it that make the client treat the model as another kind."""

PLAIN_PATHS = ("runs/first_mistral/hf/epoch_2", "GPT", "Gemini", "x/MonoT5", "lit5", "rank_zephyr")
