"""Loaders of record ids from small sets of shards."""

from __future__ import annotations

import itertools

from rankllm_composer.data.dataset import ListLoader
from rankllm_composer.data.exact_streaming import ExactStreamingDataset
from rankllm_composer.options import StreamOptions


def new_loader(stream, *, workers=0, batch_size=4, **options):
    """Create a loader of record ids (None for padding rows); `options` are those of the dataset and `StreamOptions`."""
    streams = stream if isinstance(stream, list) else [stream]
    dataset_options = {name: options.pop(name) for name in ("seed", "predownload", "validate_hash") if name in options}
    stream_options = StreamOptions(**{"store_patience_seconds": 0, **options})
    return ListLoader(
        ExactStreamingDataset(streams, stream_options, batch_size=batch_size, **{"seed": 7, **dataset_options}),
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        timeout=300 if workers else 0,
        collate_fn=lambda rows: {"ids": [row and row["id"] for row in rows]},
    )


def read(loader, num_epochs=1):
    return [[batch["ids"] for batch in loader] for _ in range(num_epochs)]


def flat(batches):
    return list(itertools.chain(*batches))


def ids(*numbers):
    return [f"q{number}" for number in numbers]
