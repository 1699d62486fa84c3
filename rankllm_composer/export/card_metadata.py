"""The metadata of a model card, which the Hugging Face hub reads: base model, data sets and results."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from rankllm_composer.escaping import for_screen
from rankllm_composer.prompts.contract import CONTRACT_FILE
from rankllm_composer.redaction import redact

TAGS = ["reranking", "listwise-reranking", "rank_llm"]
HELD_OUT = "held-out windows"
_ID = r"[\w.-]+/[\w.-]+"
_FRONT = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)
_EVALUATED = re.compile(r"eval/(first_token|generation)/(ndcg|mrr)@(\d+)")
_NAMES = {"ndcg": "nDCG", "mrr": "RR"}


def base_model_id(name: str) -> str | None:
    """Hub id of a base model: the name itself, that of a folder in the hub's cache, or that of an export's base."""
    card = Path(name, "README.md")
    if Path(name, CONTRACT_FILE).is_file() and card.is_file():
        base = read_metadata(card.read_text(encoding="utf-8", errors="replace")).get("base_model")
        return base if isinstance(base, str) else None
    public = public_name(name)
    return public if re.fullmatch(_ID, public) else None


def public_name(name: str) -> str:
    """A hub id unchanged, also that of a folder in the hub's cache; of another path, the last part."""
    if (cached := re.search(r"(?:^|/)(?:models|datasets)--(\w[\w.-]*?)--([\w.-]+)/snapshots/", name)) is not None:
        return f"{cached[1]}/{cached[2]}"
    is_path = name.startswith(("/", "./", "../", "~")) or "\\" in name or name.count("/") > 1 or Path(name).exists()
    return Path(name).name if is_path else name


def data_set_ids(sources: Sequence[str]) -> list[str]:
    """Hub ids among sources of lists, which are written as `owner/name:configuration[split]`."""
    found = [re.fullmatch(rf"({_ID})(:[^\[]*)?\[.*\]", source) for source in sources]
    return list(dict.fromkeys(match[1] for match in found if match is not None))


def metadata_yaml(
    name: str, base_model: str | None, data: Sequence[str], license: str | None, figures: Mapping[str, float]
) -> str:
    """The metadata as YAML, without secrets.

    Args:
        base_model: hub id; None = none.
        data: sources of the lists.
        license: SPDX name of the base model's, where known.
        figures: measured, by set and measure.
    """
    card = ModelCardData(
        base_model=base_model,
        datasets=data_set_ids(data) or None,
        library_name="transformers",
        license=None if license is None else _clean(license),
        pipeline_tag="text-ranking",
        tags=TAGS,
        model_name=_clean(name) if (results := list(_results(figures))) else None,
        eval_results=results or None,
    )
    return str(card.to_yaml())


def with_results(card: str, name: str, figures: Mapping[str, float]) -> str:
    """A card with other results in its metadata; unchanged if its metadata are damaged or gone."""
    found, metadata, results = _FRONT.match(card), read_metadata(card), list(_results(figures))
    if found is None or not metadata or not results:
        return card
    data: Any = ModelCardData(model_name=_clean(name), eval_results=results)
    metadata["model-index"] = data.to_dict()["model-index"]
    text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n{card[found.end() :]}"


def read_metadata(card: str) -> dict[str, Any]:
    """Metadata of a card; empty if there are none that can be read."""
    found = _FRONT.match(card)
    try:
        metadata = None if found is None else yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _results(figures: Mapping[str, float]) -> Iterator[EvalResult]:
    """Measures of rankings among the figures, which are named SET/MEASURE or as an evaluation while training."""
    for name, value in sorted(figures.items()):
        if (evaluated := _EVALUATED.fullmatch(name)) is not None:
            decoding, measure, cutoff = evaluated.groups()
            data, measure = f"{HELD_OUT}, {decoding.replace('_', ' ')}", f"{_NAMES[measure]}@{cutoff}"
        elif name.startswith("eval/") or "/" not in name:
            continue
        else:
            data, _, measure = (_clean(part) for part in name.rpartition("/"))
        if math.isfinite(value):
            yield EvalResult(
                task_type="text-ranking",
                task_name="Reranking",
                dataset_name=data,
                dataset_type=re.sub(r"\W+", "-", data).strip("-").lower() or "unnamed",
                metric_type=measure.lower().replace("@", "_at_"),
                metric_name=measure,
                metric_value=round(float(value), 4),
            )


def _clean(text: str) -> str:
    """Text without secrets and control characters, in one line."""
    return redact(for_screen(" ".join(text.split())))
