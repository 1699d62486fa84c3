"""What a run prints about itself: before its first batch, and, once it is complete, the commands that come next."""

from __future__ import annotations

import json
import textwrap
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from rankllm_composer.environment import as_written
from rankllm_composer.errors import RankLLMComposerError, counted, counted_as, shell_line
from rankllm_composer.export.model_card import serving_command
from rankllm_composer.export.weights import hf_module
from rankllm_composer.model.attention import slower_because
from rankllm_composer.model.lora import is_adapter
from rankllm_composer.prompts.client_names import describe_misread
from rankllm_composer.prompts.clients import CURRENT_CLIENT
from rankllm_composer.prompts.contract import read_contract
from rankllm_composer.recipe.sections import Recipe, Split
from rankllm_composer.screen import report
from rankllm_composer.shards.contents import SetContents
from rankllm_composer.shards.read import SplitRecords
from rankllm_composer.storage.atomic import write_atomic
from rankllm_composer.training.assembly import sets_of
from rankllm_composer.training.checkpoint_callback import CheckpointFolder

NUM_REQUESTS = 100
REQUESTS_FILE = "requests.jsonl"
JUDGMENTS_FILE = "requests.qrels"


class Banner(Callback):
    """Print on rank 0, before the first batch, what is trained, on what, and how. Place it last among the callbacks.

    Args:
        contents: of `data.train`.
        epoch_size: lists per epoch.
    """

    def __init__(self, recipe: Recipe, contents: SetContents, epoch_size: int) -> None:
        self.recipe = recipe
        self.contents = contents
        self.epoch_size = epoch_size

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            report("\n".join(f"{name:<9} {value}" for name, value in self.lines(state).items()))

    def lines(self, state: State) -> dict[str, str]:
        """Each fact with its name."""
        recipe = self.recipe
        checkpoints = next((found for found in state.callbacks if isinstance(found, CheckpointFolder)), None)
        resumed = None if checkpoints is None else checkpoints.resumed_from
        begins = "new" if resumed is None else f"resumed from {resumed.name}, after batch {state.timestamp.batch.value}"
        return {
            "run": f"{recipe.run.name}: {begins}, until {recipe.run.max_duration}, in {recipe.run_folder}",
            "device": self._device(state),
            "precision": "float32" if recipe.parallelism.precision == "fp32" else "bfloat16, weights in float32",
            "attention": self._attention(state),
            "weights": self._weights(state),
            "lists": self._lists(),
        }

    def _device(self, state: State) -> str:
        on_gpu = state.device.name == "gpu"
        num_ranks, here = dist.get_world_size(), dist.get_local_world_size()
        name = torch.cuda.get_device_name() if on_gpu else f"CPU, {counted(torch.get_num_threads(), 'thread')} per rank"
        where = f" on {num_ranks // here} machines" if num_ranks > here else ""
        sharing = "sharded (FSDP2)" if state.fsdp_enabled else "with copies of the weights (DDP)"
        return f"{name}; {counted(num_ranks, 'rank')}{where}" + (f", {sharing}" if num_ranks > 1 else "")

    def _attention(self, state: State) -> str:
        model: Any = hf_module(state.model)
        chosen, keys = model.config._attn_implementation, self.recipe.parallelism
        reason = slower_because(chosen, state.device.name, precision=keys.precision, packing=self.recipe.batch.packing)
        return chosen if reason is None else f"{chosen}, list by list, as {reason}"

    def _weights(self, state: State) -> str:
        keys = self.recipe.model
        source = as_written(keys.name_or_path) + (f" at {keys.revision}" if keys.revision else "")
        sizes = [(weight.numel(), weight.requires_grad) for weight in state.model.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
        origin = f"{source}, random" if keys.random_weights else source
        adapter = "" if keys.lora is None else f" (LoRA of rank {keys.lora.rank})"
        return f"{origin}; {trained:,} of {total:,} trained{adapter}"

    def _lists(self) -> str:
        keys = self.recipe
        fate = "stop the run" if keys.data.too_long == "refuse" else "are left out and counted"
        left_out = ", ".join(counted_as(number, what) for what, number in self.contents.left_out.items() if number)
        return (
            f"{self.epoch_size:,} per epoch, {keys.batch.global_lists:,} per update; those over "
            f"{keys.data.max_length_tokens:,} tokens {fate}"
            + (f"; left out when the shards were built: {left_out}" if left_out else "")
        )


def describe_outputs(recipe: Recipe, exports: tuple[Path, ...], best: Path | None) -> str:
    """List the exports of a run, and the commands that come next, to be pasted into a shell.

    Args:
        exports: exported folders, the newest last.
        best: the best of them, or the newest; None if there is none.
    """
    folder = recipe.run_folder
    steps = [("draw its curves", shell_line("rankllm-composer", "report", folder))]
    if best is None:
        steps.append(("export it", shell_line("rankllm-composer", "export", folder, "--output", f"{folder}/exported")))
        return _as_text([], steps)
    listed = ["exported:", *(f"    {path}" for path in exports)]
    if best.is_symlink():
        listed.append(f"    {best} is {best.readlink()}")
    if is_adapter(best):
        merged = f"{folder}/merged"
        command = shell_line("rankllm-composer", "export", folder, "--output", merged, "--merge-lora")
        return _as_text(listed, [*steps, ("merge the adapter to serve it", command), _ranking_steps(recipe, merged)[0]])
    reranking, requests = _ranking_steps(recipe, str(best))
    contract = read_contract(best)
    steps.append(reranking)
    if contract.served_decoding() is not None and contract.client_version != CURRENT_CLIENT:
        steps.append(("serve it with rank_llm", serving_command(contract, str(best))))
    elif contract.served_decoding() is not None:
        command = serving_command(contract, str(best), f"{folder}/{REQUESTS_FILE}")
        steps.append(("serve it with rank_llm", f"{requests}\n{command}".strip()))
    misread = describe_misread(best, contract.client_version)
    return _as_text(listed, steps) + (f"\n{misread}" if misread is not None else "")


def _as_text(listed: list[str], steps: list[tuple[str, str]]) -> str:
    return "\n".join([*listed, *(f"{what}:\n{textwrap.indent(command, '    ')}" for what, command in steps)])


def _ranking_steps(recipe: Recipe, model: str) -> tuple[tuple[str, str], str]:
    """What can be reranked with the recipe's files, with the command, and the one that writes them as requests.

    Without a first-stage run, these are the first lists, written as requests; the second command is then empty.
    """
    split, what = recipe.data.train, "queries that it was trained on"
    if recipe.data.eval is not None and recipe.evaluation is not None:
        split, what = recipe.data.eval, "held-out queries"
    source, path = split.source, f"{recipe.run_folder}/{REQUESTS_FILE}"
    given, judged, writing = {"run": path}, {}, ""
    if source is None or source.run is None:
        judgments = f"{recipe.run_folder}/{JUDGMENTS_FILE}"
        judged = {"qrels": judgments} if write_lists(split, Path(path), Path(judgments)) else {}
    else:
        named = {"run": source.run, "queries": source.queries, "docs": source.docs}
        given = {name: value for name, value in named.items() if value is not None}
        given |= {"duplicates": source.duplicates} if source.duplicates != "stop" else {}
        judged = {} if source.judgments is None else {"qrels": source.judgments}
        writing = _command("requests", {**given, "output": path})
    files = {"model": model, **given, **judged, "output": f"{recipe.run_folder}/reranked.trec"}
    return (f"rank with it, here {what}", _command("rerank", files)), writing


def _command(name: str, options: dict[str, str]) -> str:
    words = [word for option, value in options.items() for word in (f"--{option}", value)]
    return shell_line("rankllm-composer", name, *words)


def write_lists(split: Split, path: Path, judgments: Path) -> bool:
    """Write the first lists of a split as requests that `rerank` and rank_llm read, if the split can be read here.

    Returns:
        Whether a list has a relevant passage, so that judgments were written, too.
    """
    lines, judged, is_relevant = [], [], False
    try:
        for number, record in enumerate(islice(SplitRecords(sets_of(split)), NUM_REQUESTS), start=1):
            texts = record.turn.passages  # numbered, as ids of records may repeat or hold white space
            candidates = [
                {"docid": f"{number}-{place}", "score": len(texts) - place, "doc": {"text": text}}
                for place, text in enumerate(texts)
            ]
            query = {"text": record.turn.query, "qid": str(number)}
            lines.append(json.dumps({"query": query, "candidates": candidates}))
            grades = [(place, grade) for place, grade in enumerate(record.grades or ()) if grade is not None]
            judged += [f"{number} 0 {number}-{place} {grade}" for place, grade in grades]
            is_relevant = is_relevant or any(grade > 0 for _, grade in grades)
        write_atomic(path, "\n".join(lines) + "\n")
        if is_relevant:
            write_atomic(judgments, "\n".join(judged) + "\n")
    except (RankLLMComposerError, OSError) as error:
        report(f"warning: {path} is not written: {error}")
    return is_relevant
