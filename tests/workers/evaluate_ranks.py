"""Evaluate windows on two ranks with a sharded model; argument: a folder for the results of each rank."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.tiny_rerankers import new_contract, new_model, new_tokenizer, record_of

from rankllm_composer.ranking.evaluation import EvaluationOptions, evaluate_windows

RECORDS = [record_of(values, record_id=str(values)) for values in ([1, 2, 3], [9, 4], [6, 2])]
SHARES = {"uneven": [RECORDS[:2], RECORDS[2:]], "one rank has no records": [[], RECORDS]}


def evaluate(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    tokenizer, model = new_tokenizer(), new_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    results = {
        (name, constrained): evaluate_windows(
            model,
            tokenizer,
            share[rank],
            new_contract(tokenizer),
            EvaluationOptions(constrained=constrained, batch_tokens=250),
            lockstep=True,
        )
        for name, share in SHARES.items()
        for constrained in (False, True)
    }
    Path(folder, f"rank{rank}.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(evaluate, args=(sys.argv[1],), nprocs=2, start_method="fork")
