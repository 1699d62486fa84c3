"""The card of an exported model: base model, training, results and serving."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rankllm_composer import __version__
from rankllm_composer.errors import ModelError, shell_line
from rankllm_composer.escaping import for_markdown, for_screen, from_markdown
from rankllm_composer.prompts.client_names import client_names
from rankllm_composer.prompts.clients import CLIENT_TOP_K
from rankllm_composer.prompts.contract import DEFAULT_WORDS, DecodingContract
from rankllm_composer.prompts.prompt_template import TEMPLATE_FILE
from rankllm_composer.redaction import redact
from rankllm_composer.storage.atomic import write_atomic

TOLERANCE = 0.025  # share of a published figure that a run may differ by
MEASURE = "nDCG@10"
_RANK_ZEPHYR = {"dl19-splade": 0.7781, "dl20-splade": 0.8147, "dl19-bm25": 0.7365, "dl20-bm25": 0.7080}
_FIRST_MISTRAL = {"dl20-splade": 0.7851, "dl19-bm25": 0.7294, "dl20-bm25": 0.7043, "beir-11": 0.5564}
_FIRST_QWEN3_06B = {"dl19-splade": 0.7764, "dl20-splade": 0.7720, "dl21-splade": 0.7263}
_BY_RECIPE = {
    "rank_zephyr": _RANK_ZEPHYR,
    "rank_zephyr_stage2": _RANK_ZEPHYR,
    "first_mistral": _FIRST_MISTRAL,
    "first_qwen3_0.6b": _FIRST_QWEN3_06B,
}


def published_figures(run_name: str) -> Mapping[str, float]:
    """nDCG@10 published for the models of some recipes, by set and measure (dl20-bm25/nDCG@10); empty for others.

    The sets are TREC Deep Learning 2019, 2020 and 2021, the top 100 of SPLADE++ or of BM25
    reranked, and the mean of 11 sets of BEIR. The header of each recipe has the same figures.
    """
    return {f"{name}/{MEASURE}": value for name, value in _BY_RECIPE.get(run_name, {}).items()}


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Content of a model card."""

    name: str
    base_model: str | None  # hub id or path of the fine-tuned model; None = trained from scratch
    contract: DecodingContract
    base_licence: str | None = None  # SPDX name, where known
    data: tuple[str, ...] = ()  # sources of the training lists
    num_lists: int | None = None  # in the training data, per epoch; None = not counted
    trained_lists: Mapping[str, int] = field(default_factory=dict)  # "trained", "too_long": in the last epoch, if known
    losses: Mapping[str, float] = field(default_factory=dict)  # part of the objective → weight
    hyperparameters: Mapping[str, object] = field(default_factory=dict)  # in the order of the table
    changes: tuple[str, ...] = ()  # of the recipe while the run was stopped
    is_adapter: bool = False  # the folder holds a LoRA adapter alone
    progress: str = ""  # point in training that the weights are from
    figures: Mapping[str, float] = field(default_factory=dict)  # measured
    published: Mapping[str, float] = field(default_factory=dict)  # for this recipe, by the names of `figures`


def render_card(facts: CardFacts) -> str:
    """Markdown text of a card, without secrets and without paths of this machine."""
    base = None if facts.base_model is None else _public(facts.base_model)
    parts = [
        _front_matter(facts, base),
        f"# {for_markdown(facts.name)}",
        _introduction(facts, base),
        _training(facts),
        _results_section(facts.figures, facts.published),
        _serving_of_adapter() if facts.is_adapter else _serving(facts.contract),
        _licence(facts, base),
    ]
    return redact("\n\n".join(parts) + "\n")


def add_figures(card: str | Path, figures: Mapping[str, float]) -> None:
    """Add or replace measured figures in the results of a card; raise ModelError if it has no such section."""
    path = Path(card)
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    found = re.search(r"^## Results\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ModelError(f"{path} has no section '## Results'; expected the card of an export. Export the model again.")
    rows = [_cells(line) for line in found[1].split("\n") if line.startswith("|")]
    measured: dict[str, float] = {}
    published: dict[str, float] = {}
    for name, *cells in rows[2:]:
        for place, values in enumerate((measured, published)):
            if place < len(cells) and re.fullmatch(r"-?\d+\.\d+|nan|-?inf", cells[place]):
                values[name] = float(cells[place])
    ours = {redact(" ".join(for_screen(name).split())): value for name, value in figures.items()}  # as a card has them
    section = redact(_results_section(measured | ours, published))
    whole = text[: found.start()] + section + "\n\n" + text[found.end() :]
    write_atomic(path, whole.encode("utf-8", "surrogateescape"))


def _cells(line: str) -> list[str]:
    """Texts of a line of a table that `_table` wrote."""
    return [from_markdown(cell.strip()) for cell in re.findall(r"(?:\\.|[^|\\])+", line)]


def verdict(measured: float | None, published: float) -> str:
    """Compare a measured figure with a published one: within tolerance, below, above, or not measured."""
    if measured is None:
        return "not measured"
    if abs(measured - published) <= TOLERANCE * abs(published):
        return "within tolerance"
    return "below" if measured < published else "above"


def _public(name: str) -> str:
    """A hub id unchanged; of a path, the last part."""
    is_path = name.startswith(("/", "./", "../", "~")) or "\\" in name or name.count("/") > 1
    return Path(name).name if is_path else name


def _front_matter(facts: CardFacts, base: str | None) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-ranking"]
    lines += ["tags:", "  - reranking", "  - listwise-reranking", "  - rank_llm"]
    if base is not None and "/" in base:
        lines.append(f"base_model: {_quoted(base)}")
    if facts.base_licence is not None:
        lines.append(f"license: {_quoted(facts.base_licence)}")
    return "\n".join([*lines, "---"])


def _quoted(text: str) -> str:
    """A text of the front matter, which is YAML."""
    return json.dumps(for_screen(text, one_line=True), ensure_ascii=False)


def _introduction(facts: CardFacts, base: str | None) -> str:
    origin = "trained from random weights" if base is None else f"fine-tuned from {for_markdown(base, code=True)}"
    text = (
        f"A listwise reranker, {origin} with rankllm-composer {__version__}. Given a query and up to "
        f"{facts.contract.window_size} passages, it orders the passages by relevance."
    )
    return f"{text}\n\nWeights: {for_markdown(facts.progress)}." if facts.progress else text


def _training(facts: CardFacts) -> str:
    contract = facts.contract
    names = f"{contract.identifiers[0]} to {contract.identifiers[-1]}"
    rows = [("objective", contract.objective), ("identifiers", f"{contract.identifier_style}, {names}")]
    rows.append(("prompt", f"rank_llm's {contract.prompt_template}" if contract.template is None else TEMPLATE_FILE))
    rows += [(f"weight of {part}", f"{weight:g}") for part, weight in facts.losses.items()]
    lists = "not counted" if facts.num_lists is None else f"{facts.num_lists:,}"
    if facts.trained_lists:
        left_out = f"{facts.trained_lists['too_long']:,} left out as too long"
        of_all = "" if facts.num_lists is None else f" of {lists}"
        lists = f"{facts.trained_lists['trained']:,}{of_all} in the last epoch, {left_out}"
    rows.append(("training lists", lists))
    rows += [("data", _public(source)) for source in facts.data]
    rows += [(key, str(value)) for key, value in facts.hyperparameters.items()]
    rows += [("changed", change) for change in facts.changes]
    return "## Training\n\n" + _table(("setting", "value"), rows)


def _results_section(figures: Mapping[str, float], published: Mapping[str, float]) -> str:
    names = list({**published, **figures})
    if not names:
        return "## Results\n\nNot measured."
    if not published:
        return "## Results\n\n" + _table(("figure", "measured"), [(name, f"{figures[name]:.4f}") for name in names])
    rows = []
    for name in names:
        ours, theirs = figures.get(name), published.get(name)
        measured = "not measured" if ours is None else f"{ours:.4f}"
        compared = ("–", "–") if theirs is None else (f"{theirs:.4f}", verdict(ours, theirs))
        rows.append((name, measured, *compared))
    note = f"Tolerance: {TOLERANCE:.1%} of the published figure."
    return "## Results\n\n" + _table(("figure", "measured", "published", "verdict"), rows) + f"\n\n{note}"


def _serving_of_adapter() -> str:
    return (
        "## Serving\n\nThis folder holds a LoRA adapter without the model that it changes, and cannot be served as it "
        "is. Merge the two, and serve the result:\n\n"
        "    rankllm-composer export RUN --output FOLDER --merge-lora"
    )


def _serving(contract: DecodingContract) -> str:
    text = "## Serving\n\n`reranker.json` says how the model is prompted and how its answer is read.\n\n"
    text += "    rankllm-composer rerank --model PATH --queries queries.jsonl --docs docs.jsonl \\\n"
    text += "        --run bm25.trec --output out.trec"
    decoding, reasons = contract.served_decoding(), contract.unserved()
    version = contract.client_version
    if decoding is None:
        return f"{text}\n\nrank_llm {version} cannot serve it: {'; '.join(reasons.values())}."
    arguments = "".join(f", {name}=True" for name in _client_switches(contract))
    if contract.template is not None:
        arguments += f', prompt_template_path="PATH/{contract.prompt_template}"'
    if (words := _given_words(contract)) is not None:
        arguments += f", max_passage_words={words}"
    text += (
        f"\n\nWith rank_llm ({version}, vLLM), from a path without the names that it picks other rerankers by "
        f"({', '.join(client_names(version))}):\n\n"
        f"{textwrap.indent(serving_command(contract), '    ')}\n\n"
        "or\n\n"
        "    from rank_llm.rerank.listwise import RankListwiseOSLLM\n\n"
        f'    reranker = RankListwiseOSLLM(model="PATH", context_size={contract.context_size_tokens}, '
        f"window_size={contract.window_size},\n"
        f"                                 stride={contract.stride}{arguments})\n"
        "    results = reranker.rerank_batch(requests)"
    )
    if decoding == "first_token":
        text += "\n\n`use_logits` ranks by the logits of one token (FIRST decoding)"
        text += f"; {reasons['generation']}." if reasons else "; without it the whole permutation is generated."
    elif "first_token" in reasons and contract.objective != "generation":
        text += f"\n\nIt generates the whole permutation, as it cannot decode by first token: {reasons['first_token']}."
    if decoding == "first_token" and contract.window_size > CLIENT_TOP_K:
        text += f" It asks for the {CLIENT_TOP_K} likeliest tokens, so other candidates of a window keep their order."
    if (difference := contract.unserved_words()) is not None:
        text += f"\n\n{difference}. The rankings of the first command follow the training."
    if contract.num_bos > 1:
        text += (
            f"\n\nPrompts begin with {contract.num_bos} beginning-of-sequence tokens, from the chat template and from "
            "the tokenizer, in training as in serving."
        )
    return text


def serving_command(contract: DecodingContract, path: str = "PATH", requests: str | None = None) -> str:
    """The command by which the contract's version of rank_llm serves a folder, unless it cannot decode the model.

    Args:
        requests: file of the command `requests` to rerank; None = a data set that the client knows.
    """
    given: dict[str, object] = {"model_path": path}
    if contract.template is not None:
        given["prompt_template_path"] = f"{path}/{contract.prompt_template}"
    num_first = len(given) + 2
    if requests is None:
        given |= {"dataset": "dl20", "retrieval_method": "bm25"}
    else:
        given |= {"requests_file": requests, "output_trec_file": "reranked.trec"}
    given |= {"top_k_candidates": 100, "context_size": contract.context_size_tokens}
    if (contract.window_size, contract.stride) != (20, 10):  # the client's defaults
        given |= {"window_size": contract.window_size, "stride": contract.stride}
    if (words := _given_words(contract)) is not None:
        given["max_passage_words"] = words
    script, dash = ("python src/rank_llm/scripts/run_rank_llm.py", "_")
    if contract.client_version != "0.25.7":
        script, dash = ("rank-llm rerank", "-")
    flags = [shell_line(f"--{name.replace('_', dash)}={value}") for name, value in given.items()]
    flags += [f"--{name.replace('_', dash)}" for name in ("variable_passages", *_client_switches(contract))]
    return f"{script} {' '.join(flags[:num_first])} \\\n    {' '.join(flags[num_first:])}"


def _client_switches(contract: DecodingContract) -> list[str]:
    """Switches of the client: letters as identifiers, and first-token decoding."""
    switches = ["use_alpha"] if contract.identifier_style == "letters" else []
    return [*switches, "use_logits"] if contract.served_decoding() == "first_token" else switches


def _given_words(contract: DecodingContract) -> int | None:
    """Words of a passage to give to the client; None if they are its default, or it has no option for them."""
    default = contract.max_passage_words == DEFAULT_WORDS
    return None if default or not contract.client.has_word_option else contract.max_passage_words


def _licence(facts: CardFacts, base: str | None) -> str:
    if base is None:
        text = "The weights were trained from scratch; the terms of the training data apply."
    else:
        licence = "its licence" if facts.base_licence is None else f"its licence ({for_markdown(facts.base_licence)})"
        origin = for_markdown(base, code=True)
        text = f"The weights derive from {origin}: {licence} and the terms of the training data apply."
    return f"## Licence\n\n{text} rankllm-composer itself is under Apache-2.0, which says nothing about the weights."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(for_markdown(cell) for cell in cells) + " |"

    return "\n".join([line(head), "|" + " --- |" * len(head), *map(line, rows)])
