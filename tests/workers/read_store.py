"""Read epochs of two sets in an object store on two ranks, mixed by proportion, through caches that are too small.

Launched with 2 ranks; argument: a folder for the caches and for what each rank read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from composer.utils import dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.streaming_loader import new_loader, read

from rankllm_composer.data.streams import Stream

SETS = {"few": 12, "many": 24}
# proportions of the sets `few` and `many`, workers per rank
CASES = [((None, None), 0), ((None, None), 3), ((1 / 3, 2 / 3), 1), ((0.25, 0.75), 0), ((0.25, 0.75), 2)]
NUM_EPOCHS = 2


def new_loader_of_sets(roots: dict[str, tuple[str, str | None]], proportions, **options):
    """Create a loader of record ids (None for padding rows); `roots` maps each set to its local and remote folder."""
    streams = [Stream(*roots[name], proportion=share) for name, share in zip(SETS, proportions)]
    return new_loader(streams, num_canonical_nodes=2, **options)


def main(folder: Path) -> None:
    dist.initialize_dist("cpu", timeout=300)
    answers = []
    for number, (proportions, workers) in enumerate(CASES):
        roots = {name: (str(folder / f"cache {number}" / name), f"s3://exact/{name}") for name in SETS}
        limit = f"{int((folder / 'limit').read_text()) / 1024}kb"
        options = {
            "workers": workers,
            "batch_size": 2,
            "cache_limit": limit,
            "predownload": 2,
            "store_patience_seconds": 60,
        }
        answers.append(read(new_loader_of_sets(roots, proportions, **options), NUM_EPOCHS))
        dist.barrier()
    (folder / f"rank_{dist.get_global_rank()}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
