"""Names of metrics, as a reader of the report knows them."""

from __future__ import annotations

from rankllm_composer.training.run_files import LOSS_PREFIX

_SUBJECTS = {
    "first_token": "first-token decoding",
    "generation": "generated answers",
    "presented": "order of the first stage",
    "oracle": "best possible order",
    "chance": "random order",
    "teacher": "order of the teacher",
    "agreement": "both decodings",
}
_MEASURES = {
    "ndcg@10": "nDCG@10",
    "mrr@10": "RR@10",
    "tau": "Kendall's τ",
    "opens_with_bracket": "answers that open with a bracket",
    "malformed": "answers that deviate from the format",
    "repeated": "answers that repeat a candidate",
    "out_of_range": "answers that name an unknown candidate",
    "incomplete": "answers that leave out a candidate",
    "same_first": "same candidate at the top",
    "shuffled/ndcg@10": "nDCG@10 of shuffled windows",
    "shuffled/ndcg@10_deviation": "deviation of nDCG@10 over shuffles",
    "shuffled/tau": "Kendall's τ over shuffles",
    "reversed/ndcg@10": "nDCG@10 of reversed windows",
    "reversed/tau": "Kendall's τ to the reversed window",
}
_WHOLE = {
    "windows": "windows",
    "judged_windows": "windows with a relevant candidate",
    "data/lists_trained": "lists trained in the last epoch",
    "data/lists_too_long": "lists left out as too long in the last epoch",
}
_LOSSES = {"total": "Total loss", "language_modelling": "Language-modeling loss", "ranking": "Ranking loss"}


def decoding_name(decoding: str) -> str:
    """ "first_token" → "first-token decoding"."""
    return _SUBJECTS.get(decoding, decoding.replace("_", " "))


def metric_name(name: str) -> str:
    """ "first_token/ndcg@10" → "nDCG@10, first-token decoding"; a metric of someone else unchanged."""
    if name.startswith(LOSS_PREFIX):
        return loss_name(name)
    subject, _, measure = name.partition("/")
    if name not in _WHOLE and subject in _SUBJECTS and measure in _MEASURES:
        return f"{_MEASURES[measure]}, {_SUBJECTS[subject]}"
    return _WHOLE.get(name, name)


def loss_name(name: str) -> str:
    """ "loss/train/total" → "Total loss"."""
    part = name.removeprefix(LOSS_PREFIX)
    return _LOSSES.get(part) or f"{part.replace('_', ' ')} loss".strip().capitalize()


def duration(seconds: float) -> str:
    """4000 → "1 h 7 min"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours / 24:.1f} days"


def amount(number: float) -> str:
    """135000000 → "135 M"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
