"""Train listwise LLM rerankers with MosaicML Composer: teacher-ranked lists in, a served reranker out.

The public names are imported on first use, so that `import rankllm_composer` loads no library.
"""

from __future__ import annotations

import signal
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankllm_composer.errors import (
        CheckpointError,
        ModelError,
        PromptError,
        RankLLMComposerError,
        RecipeError,
        RecordError,
        RunError,
        ShardError,
        SourceError,
        StoreError,
    )
    from rankllm_composer.model.losses import (
        LOSSES,
        adr_mse_loss,
        lambdarank_loss,
        listmle_loss,
        listnet_loss,
        ranknet_loss,
    )
    from rankllm_composer.model.neftune import NEFTune
    from rankllm_composer.model.reranker import ListwiseReranker
    from rankllm_composer.model.teacher_losses import (
        approx_ndcg_loss,
        info_nce_loss,
        kl_divergence_loss,
        margin_mse_loss,
        ndcg_loss2pp_loss,
        p_listmle_loss,
    )
    from rankllm_composer.options import BuildOptions, ModelOptions, RerankOptions, SourceOptions, StreamOptions
    from rankllm_composer.ranking.compare_files import FileComparison, compare_files
    from rankllm_composer.ranking.reranker import RankedPassage, RerankedQuery, Reranker
    from rankllm_composer.recipe.load import load_recipe
    from rankllm_composer.recipe.sections import Recipe
    from rankllm_composer.shards.build import build_shards
    from rankllm_composer.shards.manifest import BuildReport
    from rankllm_composer.training.run import TrainedRun, train

__version__ = "0.1.0"
__all__ = [
    "LOSSES",
    "BuildOptions",
    "BuildReport",
    "CheckpointError",
    "FileComparison",
    "ListwiseReranker",
    "ModelError",
    "ModelOptions",
    "NEFTune",
    "PromptError",
    "RankLLMComposerError",
    "RankedPassage",
    "Recipe",
    "RecipeError",
    "RecordError",
    "RerankOptions",
    "RerankedQuery",
    "Reranker",
    "RunError",
    "ShardError",
    "SourceError",
    "SourceOptions",
    "StoreError",
    "StreamOptions",
    "TrainedRun",
    "adr_mse_loss",
    "approx_ndcg_loss",
    "build_shards",
    "compare_files",
    "info_nce_loss",
    "kl_divergence_loss",
    "lambdarank_loss",
    "listmle_loss",
    "listnet_loss",
    "load_recipe",
    "margin_mse_loss",
    "ndcg_loss2pp_loss",
    "p_listmle_loss",
    "ranknet_loss",
    "train",
]
_MODULES = {
    "errors": "RankLLMComposerError CheckpointError ModelError PromptError RecipeError RecordError RunError ShardError "
    "SourceError StoreError",
    "model.losses": "LOSSES adr_mse_loss lambdarank_loss listmle_loss listnet_loss ranknet_loss",
    "model.neftune": "NEFTune",
    "model.reranker": "ListwiseReranker",
    "model.teacher_losses": "approx_ndcg_loss info_nce_loss kl_divergence_loss margin_mse_loss ndcg_loss2pp_loss "
    "p_listmle_loss",
    "options": "BuildOptions ModelOptions RerankOptions SourceOptions StreamOptions",
    "ranking.compare_files": "FileComparison compare_files",
    "ranking.reranker": "RankedPassage RerankedQuery Reranker",
    "recipe.load": "load_recipe",
    "recipe.sections": "Recipe",
    "shards.build": "build_shards",
    "shards.manifest": "BuildReport",
    "training.run": "TrainedRun train",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    module = import_module(f"{__name__}.{_MODULE_OF[name]}")
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Composer replaces them when it is imported
            signal.signal(number, handler)
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
