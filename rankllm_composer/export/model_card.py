"""The card of an exported model: base model, training, results and serving."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rankllm_composer import __version__
from rankllm_composer.errors import ModelError, shell_line
from rankllm_composer.escaping import for_markdown, for_screen, from_markdown
from rankllm_composer.export.card_metadata import metadata_yaml, public_name, with_results
from rankllm_composer.export.published import TOLERANCE, verdict
from rankllm_composer.prompts.client_names import client_names
from rankllm_composer.prompts.clients import CLIENT_TOP_K
from rankllm_composer.prompts.contract import DEFAULT_WORDS, DecodingContract
from rankllm_composer.prompts.prompt_template import TEMPLATE_FILE
from rankllm_composer.redaction import redact
from rankllm_composer.storage.atomic import write_atomic

_FIRST_STAGE, _MEASURED, _PUBLISHED = "first stage", "measured", "published"


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Content of a model card."""

    name: str
    base_model: str | None  # hub id or path of the fine-tuned model; None = trained from scratch
    contract: DecodingContract
    base_id: str | None = None  # hub id of that model, or of the one that it was itself made from
    base_license: str | None = None  # SPDX name, where known
    data: tuple[str, ...] = ()  # sources of the training lists
    num_lists: int | None = None  # of an epoch; None = not counted
    trained_lists: Mapping[str, int] = field(default_factory=dict)
    """ "total": lists trained in all epochs; "too_long": left out in the last one; empty if not counted."""
    losses: Mapping[str, float] = field(default_factory=dict)  # part of the objective → weight
    hyperparameters: Mapping[str, object] = field(default_factory=dict)  # in the order of the table
    changes: tuple[str, ...] = ()  # of the recipe while the run was stopped
    is_adapter: bool = False  # the folder holds a LoRA adapter alone
    progress: str = ""  # point in training that the weights are from
    figures: Mapping[str, float] = field(default_factory=dict)  # measured
    first_stage: Mapping[str, float] = field(default_factory=dict)  # of the first stage, by the names of `figures`
    published: Mapping[str, float] = field(default_factory=dict)  # of such a model, by the names of `figures`


def render_card(facts: CardFacts) -> str:
    """Markdown text of a card, without secrets and without paths of this machine."""
    base = None if facts.base_model is None else public_name(facts.base_model)
    parts = [
        f"---\n{metadata_yaml(facts.name, facts.base_id, facts.data, facts.base_license, facts.figures)}\n---",
        f"# {for_markdown(facts.name)}",
        _introduction(facts, base),
        _training(facts),
        _results_section(facts.figures, facts.first_stage, facts.published),
        _serving_of_adapter() if facts.is_adapter else _serving(facts.contract),
        _license(facts, base),
    ]
    return redact("\n\n".join(parts) + "\n")


def add_figures(card: str | Path, figures: Mapping[str, float], first_stage: Mapping[str, float] | None = None) -> None:
    """Add or replace measured figures in the results and the metadata of a card.

    Args:
        figures: by set and measure, such as dl20-bm25/nDCG@10.
        first_stage: those of the first stage by the same names, where known.
    Raises:
        ModelError: the card has no section for results.
    """
    path = Path(card)
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    found = re.search(r"^## Results\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ModelError(f"{path} has no section '## Results'; expected the card of an export. Export the model again.")
    head, _, *rows = [_cells(line) for line in found[1].split("\n") if line.startswith("|")] or [[], []]
    columns: dict[str, dict[str, float]] = {_FIRST_STAGE: {}, _MEASURED: {}, _PUBLISHED: {}}
    for name, *cells in rows:
        for column, cell in zip(head[1:], cells):
            if column in columns and re.fullmatch(r"-?\d+\.\d+|nan|-?inf", cell):
                columns[column][name] = float(cell)
    for column, values in ((_MEASURED, figures), (_FIRST_STAGE, first_stage or {})):  # named as a card has them
        columns[column] |= {redact(" ".join(for_screen(name).split())): value for name, value in values.items()}
    section = redact(_results_section(columns[_MEASURED], columns[_FIRST_STAGE], columns[_PUBLISHED]))
    whole = text[: found.start()] + section + "\n\n" + text[found.end() :]
    title = re.search(r"^# (.*)$", text, re.MULTILINE)
    whole = with_results(whole, from_markdown(title[1]) if title else "", columns[_MEASURED])
    write_atomic(path, whole.encode("utf-8", "surrogateescape"))


def _cells(line: str) -> list[str]:
    """Texts of a line of a table that `_table` wrote."""
    return [from_markdown(cell.strip()) for cell in re.findall(r"(?:\\.|[^|\\])+", line)]


def _introduction(facts: CardFacts, base: str | None) -> str:
    origin = "trained from random weights" if base is None else f"fine-tuned from {for_markdown(base, code=True)}"
    if base is not None and facts.base_id not in (None, base):
        origin += f", which was made from {for_markdown(facts.base_id, code=True)},"
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
    if facts.trained_lists:
        lists = f"{facts.trained_lists['total']:,}"
        lists += "" if facts.num_lists is None else f" in epochs of {facts.num_lists:,}"
        rows.append(("lists trained", f"{lists}; {facts.trained_lists['too_long']:,} too long in the last epoch"))
    else:
        rows.append(("lists trained", "not counted"))
    rows += [("data", public_name(source)) for source in facts.data]
    rows += [(key, "none" if value is None else str(value)) for key, value in facts.hyperparameters.items()]
    rows += [("changed", change) for change in facts.changes]
    return "## Training\n\n" + _table(("setting", "value"), rows)


def _results_section(
    figures: Mapping[str, float], first_stage: Mapping[str, float], published: Mapping[str, float]
) -> str:
    names = list({**published, **figures})
    if not names:
        return "## Results\n\nNot measured."
    rows = []
    for name in names:
        presented = re.sub(r"^eval/(first_token|generation)/(?=(ndcg|mrr)@)", "eval/presented/", name)
        before = first_stage.get(name, figures.get(presented) if presented != name else None)
        cells = [("–" if before is None else f"{before:.4f}")]
        cells.append("not measured" if name not in figures else f"{figures[name]:.4f}")
        theirs = published.get(name)
        if published:
            cells += ["–", "–"] if theirs is None else [f"{theirs:.4f}", verdict(figures.get(name), theirs)]
        rows.append((name, *cells))
    head = ("figure", _FIRST_STAGE, _MEASURED, *((_PUBLISHED, "verdict") if published else ()))
    note = f"\n\nTolerance: {TOLERANCE:.1%} of the published figure." if published else ""
    return "## Results\n\n" + _table(head, rows) + note


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
        text += f" It requests the {CLIENT_TOP_K} likeliest tokens, so other candidates of a window keep their order."
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


def _license(facts: CardFacts, base: str | None) -> str:
    if base is None:
        text = "The weights were trained from scratch; the terms of the training data apply."
    else:
        license = "its license" if facts.base_license is None else f"its license ({for_markdown(facts.base_license)})"
        origin = for_markdown(base, code=True)
        text = f"The weights derive from {origin}: {license} and the terms of the training data apply."
    return f"## License\n\n{text} rankllm-composer itself is under Apache-2.0, which says nothing about the weights."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(for_markdown(cell) for cell in cells) + " |"

    return "\n".join([line(head), "|" + " --- |" * len(head), *map(line, rows)])
