"""Train a ranking loss of your own: any function of scores, ranks and mask that returns one value per list.

    python examples/custom_loss.py

A recipe names it as package.module:function; with the command, the module is found in PYTHONPATH:

    PYTHONPATH=examples rankllm-composer train demo objective.ranking_loss=custom_loss:hinge \
      objective.ranking_loss_options={margin: 2.0} objective.ranking_weight=1
"""

import sys
from pathlib import Path

import torch

import rankllm_composer as rc
from rankllm_composer.demo import CollectionOptions, build_collection, build_model_folder


def hinge(
    scores: torch.Tensor, ranks: torch.Tensor, *, mask: torch.Tensor, reduction: str = "none", margin: float = 1.0
) -> torch.Tensor:
    """Mean of max(0, margin - (s_i - s_j)) over the pairs with i before j; all arguments are (lists, candidates)."""
    better = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    lacking = (margin - scores[:, :, None] + scores[:, None, :]).clamp_min(0.0)
    return torch.where(better, lacking, 0.0).sum(dim=(1, 2)) / better.sum(dim=(1, 2)).clamp_min(1)


if __name__ == "__main__":
    folder = Path("runs/custom_loss")
    files = build_collection(folder / "collection", CollectionOptions(num_train_queries=32))
    build_model_folder(folder / "model", files.words)
    names = {"run": files.train_run, "queries": files.train_queries, "docs": files.docs, "judgments": files.judgments}
    rc.build_shards(folder / "lists", rc.SourceOptions(**names))
    loss = ["objective.ranking_loss=custom_loss:hinge", "objective.ranking_loss_options={margin: 2.0}"]
    overrides = [f"run.folder={folder}/run", f"model.name_or_path={folder}/model", f"data.train.local={folder}/lists"]
    overrides += ["data.train.source=null", "objective.ranking_weight=1", *loss]
    overrides += ["batch.global_lists=8", "run.max_duration=2ep", "schedule.warmup=1ba", *sys.argv[1:]]
    print(rc.train(rc.load_recipe("demo", overrides)).best)
