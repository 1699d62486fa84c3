"""Read epochs of several sets on two ranks, interrupted and resumed, and a set that loses a shard during the epoch.

Launched with 2 ranks; argument: a folder with the sets. Each rank writes what it read, batch by batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from composer.utils import dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.streaming_loader import new_loader, read

from rankllm_composer.data.streams import Stream
from rankllm_composer.errors import ShardError

# set, rows per rank and batch, workers, shuffle, canonical nodes, batches before the interruption
CASES = [
    ("lists_10", 2, 0, True, None, 1),
    ("lists_10", 2, 2, True, None, 2),
    ("lists_10", 5, 2, False, 1, 1),
    ("lists_11", 1, 3, True, 4, 3),
    ("lists_11", 2, 2, True, 2, 0),
    ("lists_11", 2, 0, False, 1, 2),
    ("lists_13", 3, 2, True, 64, 1),
    ("lists_13", 3, 0, True, 64, 2),
]


def main(folder: Path) -> None:
    dist.initialize_dist("cpu", timeout=300)
    answers = []
    for name, batch_size, workers, shuffle, canonical_nodes, num_before in CASES:
        stream = Stream(local=str(folder / "caches" / name), remote=str(folder / name))
        options = {
            "batch_size": batch_size,
            "workers": workers,
            "shuffle": shuffle,
            "num_canonical_nodes": canonical_nodes,
        }
        loader = new_loader(stream, **options)
        uninterrupted = read(loader, 2)
        states = {"after epoch 1": loader.dataset.state_dict(0, True)}
        dist.barrier()

        loader = new_loader(stream, **options)
        before = []
        for batch in loader:
            before.append(batch["ids"])
            if len(before) >= num_before:
                break
        before = before[:num_before]
        seen = num_before * batch_size * dist.get_world_size()
        states["interrupted"] = loader.dataset.state_dict(seen, True)
        dist.barrier()

        loader = new_loader(stream, **options)
        if num_before:
            loader.load_state_dict(states["interrupted"])
        resumed = read(loader, 2)
        answers.append({"uninterrupted": uninterrupted, "before": before, "resumed": resumed, "states": states})
        dist.barrier()

    vanishing = Stream(local=str(folder / "caches" / "lists_vanishing"), remote=str(folder / "lists_vanishing"))
    loader = new_loader(vanishing, batch_size=2, workers=2)
    dist.barrier()
    if dist.get_global_rank() == 0:
        (folder / "lists_vanishing" / "01" / "shard.00000.mds.zstd").unlink()
    dist.barrier()
    try:
        list(loader)
        error = None
    except ShardError as raised:
        error = str(raised)
    answers.append({"error": error})
    (folder / f"rank_{dist.get_global_rank()}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
