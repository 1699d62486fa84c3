"""The whole way at the smallest size: a collection made on the spot, a model trained from scratch, what it learned."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankllm_composer.collection import Collection
    from rankllm_composer.comparison import MeasureComparison
    from rankllm_composer.recipe import Recipe

MEASURE = "nDCG@10"
NUM_THREADS = 2


class DemoError(ValueError):
    """The demo could not finish."""


def run_demo(
    folder: Path,
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    num_train_queries: int = 20000,
    report: Callable[[str], None] = print,
) -> dict[str, float]:
    """Make the demo's collection, train its recipe, rank queries that were held out by the first token's scores.

    Args:
        folder: takes everything: `collection/`, `model/`, `shards/`, `untrained/`, and the run's own files.
        recipe_path: the demo's recipe.
        overrides: `key=value` laid over it.
        num_train_queries: lists to train on.
        report: told each step, and the table at the end.
    Returns:
        nDCG@10 on the held-out queries of "first stage", "untrained", "trained" and "oracle".
    Raises:
        DemoError: training failed.
        ValueError: a key of the recipe is wrong.
    """
    import torch

    from rankllm_composer.collection import build_collection, build_model_folder
    from rankllm_composer.recipe_merge import load_recipe

    torch.set_num_threads(NUM_THREADS)
    report(f"1. A collection of invented words, in {folder / 'collection'}.")
    files = build_collection(folder / "collection", num_train_queries=num_train_queries)
    build_model_folder(folder / "model", files.words)
    overrides = [*_places(folder, files), *overrides]
    recipe = load_recipe(recipe_path, overrides)

    report("2. Lists become shards, shards train a small Mistral from random weights, an HF folder comes out.")
    untrained = export_untrained(recipe, folder / "untrained")
    _train(recipe_path, overrides)
    trained = max(Path(str(recipe.export_folder)).iterdir(), key=lambda path: path.stat().st_mtime)

    report("3. Queries that were held out, ranked by the first token's scores, before and after.")
    before = _rerank(untrained, files, folder / "untrained.trec")
    after = _rerank(trained, files, folder / "trained.trec")
    figures = {
        "first stage": before.comparison.first_mean,
        "untrained": before.comparison.second_mean,
        "trained": after.comparison.second_mean,
        "oracle": 1.0,
    }
    report(_table(figures, after))
    return figures


def _train(recipe_path: Path, overrides: Sequence[str]) -> None:
    """The command that a cluster runs, with one process."""
    from rankllm_composer import train

    launcher = Path(sys.executable).with_name("composer")
    command = [sys.executable, str(launcher), "-n", "1", str(train.__file__), str(recipe_path), *overrides]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(NUM_THREADS)}, check=False)
    if done.returncode != 0:
        raise DemoError(f"training ended with exit code {done.returncode}; what it said is above")


def _places(folder: Path, files: Collection) -> list[str]:
    return [
        f"run.folder={folder}",
        f"model.name_or_path={folder / 'model'}",
        f"data.train.local={folder / 'shards'}",
        f"data.train.source.run={files.train_run}",
        f"data.train.source.judgments={files.judgments}",
        f"data.train.source.queries={files.train_queries}",
        f"data.train.source.docs={files.docs}",
    ]


def export_untrained(recipe: Recipe, folder: Path) -> Path:
    """Export the model as training starts from it, with letters; fresh weights are those that the seed draws."""
    from composer.utils import reproducibility

    from rankllm_composer.contract import decoding_contract
    from rankllm_composer.export import write_model_folder
    from rankllm_composer.model import load_causal_lm, load_tokenizer
    from rankllm_composer.permutations import identifiers
    from rankllm_composer.prompts import identifier_token_ids

    tokenizer = load_tokenizer(recipe.tokenizer)
    names = identifiers(20)
    contract = decoding_contract(
        tokenizer,
        objective=recipe.objective.name,
        identifier_style="letters",
        identifiers=names,
        identifier_token_ids=identifier_token_ids(tokenizer, len(names)),
        context_size_tokens=recipe.data.max_length_tokens,
    )
    reproducibility.seed_all(recipe.run.seed)
    model = load_causal_lm(recipe.model.name_or_path, random_weights=recipe.model.random_weights)
    return write_model_folder(
        folder,
        state_dict=model.state_dict(),
        config=model.config,
        tokenizer=tokenizer,
        contract=contract,
        card="The model before training.",
        dtype="float32",
    )


def _rerank(model: Path, files: Collection, output: Path) -> MeasureComparison:
    from rankllm_composer.rerank import rerank_files

    report = rerank_files(
        model,
        queries=files.test_queries,
        documents=files.docs,
        run=files.test_run,
        judgments=files.judgments,
        output=output,
        measures=[MEASURE],
        decoding="first_token",
        progress_bar=False,
    )
    return report.comparisons[0]


def _table(figures: dict[str, float], trained: MeasureComparison) -> str:
    told = {
        "first stage": "the order the candidates came in, by chance",
        "untrained": "the model before training",
        "trained": "the model after training",
        "oracle": "the best order there is",
    }
    lines = [f"\n{MEASURE} on {len(trained.reranked)} held-out queries, first-token decoding"]
    lines += [f"    {name:<12} {value:.3f}   {told[name]}" for name, value in figures.items()]
    won, same, lost = trained.comparison.wins, trained.comparison.ties, trained.comparison.losses
    lines.append(f"    trained against first stage: {won} queries better, {same} the same, {lost} worse")
    return "\n".join(lines)
