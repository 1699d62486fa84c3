"""One SGD update of learning rate 1 through Composer's Trainer for several splits of the same global batch.

Launched with 1 or 2 ranks; argument: a folder with models in `<family>/`; rank 0 writes each case's updated weights.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from composer import DataSpec, Trainer
from composer.core import Timestamp
from composer.devices import DeviceCPU
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, IterableDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.packed_models import random_sequences

from rankllm_composer.data.packing import num_samples_in_batch, num_tokens_in_batch, split_batch
from rankllm_composer.distributed import average_sharded_gradients
from rankllm_composer.errors import RunError
from rankllm_composer.model.loading import load_causal_lm
from rankllm_composer.model.neftune import NEFTune
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker, checkpoint_activations
from rankllm_composer.options import ModelOptions
from rankllm_composer.training.guards import LossGuard

LIMITS = {"by_1": {"max_lists": 1}, "by_3": {"max_lists": 3}, "by_60_tokens": {"max_tokens": 60}}


class Rows(IterableDataset):
    """Rows of this rank; ranks may have different numbers of rows."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)


FAMILIES = ("mistral", "mistral_windowed", "llama", "qwen2", "qwen2_windowed", "mixtral", "qwen3_moe")


def run_case(
    folder: Path,
    objective: str,
    limit: dict[str, int],
    sharded: bool,
    noise: bool,
    checkpointed: bool,
    family: str = "mistral_tied",
):
    sequences = random_sequences(objective, num=7, seed=5)
    rank, world = dist.get_global_rank(), dist.get_world_size()
    mine = sequences[rank::world]
    loader = DataLoader(Rows(mine), batch_size=len(mine), collate_fn=lambda rows: {"sequences": rows})
    spec = DataSpec(
        loader,
        split_batch=lambda batch, _: partial(split_batch, **limit)(batch),
        get_num_samples_in_batch=num_samples_in_batch,
        get_num_tokens_in_batch=num_tokens_in_batch,
    )
    base = load_causal_lm(ModelOptions(name_or_path=folder / family), on_meta=sharded and rank > 0)
    checkpoint_activations(base, 0.5 if checkpointed else 0.0)
    model = ListwiseReranker(base, None, Objective(objective, ranking_weight=3.0))
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        max_duration="1ba",
        optimizers=torch.optim.SGD(model.parameters(), lr=1.0),
        algorithms=[NEFTune(alpha=5.0, seed=17)] if noise else [],
        device="cpu",
        device_train_microbatch_size=len(mine),
        accumulate_train_batch_on_tokens=True,
        parallelism_config={"fsdp": FSDP2Config()} if sharded else None,
        progress_bar=False,
        seed=1,
    )
    average_sharded_gradients(model)
    trainer.fit()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    losses = {name: float(value) for name, value in trainer.state.total_loss_dict.items()}
    trainer.close()
    return {"weights": {name: value.clone() for name, value in weights.items()}, "losses": losses}


def refused_gradients() -> str:
    """Give each rank the gradient of another layer, and return what LossGuard says."""
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)])
    layers[dist.get_global_rank()](torch.ones(2)).sum().backward()
    state = SimpleNamespace(model=layers, device=DeviceCPU(), timestamp=Timestamp())
    try:
        LossGuard().after_train_batch(state, None)
    except RunError as error:
        return str(error)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.initialize_dist("cpu")
    results = {}
    for objective in ("generation", "ranking", "combined"):
        for limit_name, limit in LIMITS.items():
            results[objective, limit_name, "ddp"] = run_case(folder, objective, limit, False, False, False)
    results["combined", "by_3", "fsdp2"] = run_case(folder, "combined", LIMITS["by_3"], True, False, False)
    by_tokens = LIMITS["by_60_tokens"]
    results["combined", "by_60_tokens", "fsdp2"] = run_case(folder, "combined", by_tokens, True, False, True)
    results["ranking", "by_1", "fsdp2"] = run_case(folder, "ranking", LIMITS["by_1"], True, False, True)
    for name, sharded in (("ddp", False), ("fsdp2", True)):
        for limit_name in ("by_1", "by_60_tokens"):
            case = run_case(folder, "combined", LIMITS[limit_name], sharded, True, sharded)
            results["combined with noise", limit_name, name] = case
    if dist.get_world_size() == 2:
        for family in FAMILIES:
            for checkpointed in (False, True):
                case = run_case(folder, "combined", by_tokens, True, False, checkpointed, family)
                results[family, "recomputed" if checkpointed else "kept", "fsdp2"] = case
        results["mixtral", "kept", "ddp"] = run_case(folder, "combined", by_tokens, False, False, False, "mixtral")
        case = run_case(folder, "ranking", by_tokens, True, False, False, "phi_biased_head")
        results["phi_biased_head", "kept", "fsdp2"] = case
        results["gradients of other weights"] = refused_gradients()
    if dist.get_global_rank() == 0:
        torch.save(results, folder / f"results_{dist.get_world_size()}.pt")


if __name__ == "__main__":
    main()
