"""Does a training step ever wait for input?

    python benchmarks/input_pipeline.py [--lists 400] [--workers 0,1,2] [--batch-size 16] [--shape SHAPE]

Writes shards (zstd, xxh64) of synthetic lists with 20 passages each. The number of words in a passage is lognormal
(median 70, sigma 0.6), times a lognormal factor per query (sigma 0.35), at most 300; a word has about 1.35 tokens. Then
reads epochs through `data.build_train_data_spec` as a rank does: read, check hashes, apply the chat template, repair
text, tokenize, collate. One row per number of workers. The first epoch includes starting the workers and is reported
separately; rates are those of the later epochs. Lists over 4,096 tokens are tokenized, counted and skipped, as in
training; rates count only tokens that are delivered. Tokens per CPU second, of loader and workers together, is the
speed of one core even if the machine is shared. The default tokenizer is that of Mistral-7B-Instruct-v0.3. The last
line compares with the speed of a training step: one packed list of a model of --shape, on all cores.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from report import NUM_CORES, run_in_process
from steps import new_stepper
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from workload import SHAPES, new_lists, new_model, typical_lengths

from rankllm_composer.data.dataset import ListDataset, ListEncoding, build_train_data_spec
from rankllm_composer.data.streams import Stream
from rankllm_composer.prompts.encoding import encode_record
from rankllm_composer.prompts.permutations import format_permutation
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn
from rankllm_composer.shards.index import COLUMNS, sample_from_record

NUM_PASSAGES = 20
MAX_LENGTH_TOKENS = 4096
EPOCHS = 2


def new_records(num: int, tokenizer: PreTrainedTokenizerBase) -> list[Record]:
    """Create synthetic lists in which two thirds of the words have one token, the others two."""
    rng = np.random.default_rng(0)
    pieces = (piece[1:] for piece in sorted(tokenizer.get_vocab()) if piece[0] in "▁Ġ")
    words = [piece for piece in pieces if piece.isascii() and piece.isalpha() and len(piece) > 1]
    simple = rng.choice(words, 4_000)
    joined = [first + second for first, second in rng.choice(words, (2_000, 2))]
    vocabulary = np.concatenate([simple, joined])

    def text(num_words: int) -> str:
        return " ".join(rng.choice(vocabulary, num_words))

    records = []
    for index in range(num):
        lengths = rng.lognormal(np.log(70), 0.6, NUM_PASSAGES) * rng.lognormal(0, 0.35)
        passages = [text(int(n)) for n in np.clip(lengths, 3, 300)]
        order = rng.permutation(NUM_PASSAGES).tolist()
        records.append(
            Record(f"q{index}", SYSTEM_MESSAGE, render_user_turn(text(6), passages), format_permutation(order))
        )
    return records


def write_shards(records: list[Record], folder: Path) -> None:
    """Write the records as `rankllm-composer shards build` does, with 1 MiB per shard."""
    from streaming import MDSWriter

    with MDSWriter(
        out=str(folder), columns=COLUMNS, compression="zstd", hashes=["xxh64"], size_limit=1 << 20
    ) as writer:
        for record in records:
            writer.write(sample_from_record(record))


def measure(folder: Path, tokenizer: PreTrainedTokenizerBase, batch_size: int, workers: int) -> tuple[float, ...]:
    """Return seconds to the first batch, seconds of the first epoch, lists, tokens per list, tokens/s, tokens/CPU s."""
    cpu = cpu_seconds()
    encoding = ListEncoding(tokenizer=tokenizer, objective="combined", max_length_tokens=MAX_LENGTH_TOKENS)
    dataset = ListDataset([Stream(local=str(folder))], encoding, batch_size=batch_size)
    loader = build_train_data_spec(dataset, microbatch_lists=1, num_workers=workers).dataloader
    start = time.perf_counter()
    first_batch = 0.0
    for _ in loader:
        first_batch = first_batch or time.perf_counter() - start
    first_epoch = time.perf_counter() - start
    num_lists = num_tokens = 0
    start = time.perf_counter()
    for _ in range(EPOCHS):
        for batch in loader:
            trained = [row for row in batch["sequences"] if row.encoded is not None]
            num_lists += len(trained)
            num_tokens += sum(len(row.encoded.input_ids) for row in trained)
    seconds = time.perf_counter() - start
    loader.close()  # the CPU time of workers is available once they have ended
    cpu = (cpu_seconds() - cpu) * EPOCHS / (EPOCHS + 1)
    return first_batch, first_epoch, num_lists / EPOCHS, num_tokens / num_lists, num_tokens / seconds, num_tokens / cpu


def step_rate(shape: str, threads: int) -> float:
    """Return tokens per second of a packed training step on one typical list, after an untimed step."""
    import torch

    torch.set_num_threads(threads)
    step = new_stepper("packed", new_model(shape))
    lengths = typical_lengths(1)
    lists = new_lists(lengths, shape)
    step(lists)
    seconds, _ = step(lists)
    return sum(lengths) / seconds


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=int, default=400)
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--tokenizer", help="HF folder; default: Mistral-7B-Instruct-v0.3's, built from mistral-common")
    options = parser.parse_args()
    if options.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    else:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from support.real_tokenizers import build_tokenizer

        tokenizer = build_tokenizer("mistral_v3")

    records = new_records(options.lists, tokenizer)
    sample = records[:50]
    start = cpu_seconds()
    for record in sample:
        encode_record(record, tokenizer, "combined")
    print(f"encode_record alone: {(cpu_seconds() - start) / len(sample) * 1e3:.2f} CPU ms per list\n")
    print("| workers | first batch, s | first epoch, s | lists trained | tokens per list | tokens/s | tokens/CPU s |")
    print("|---|---|---|---|---|---|---|")
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(records, Path(folder))
        for workers in map(int, options.workers.split(",")):
            first_batch, first_epoch, *rest = measure(Path(folder), tokenizer, options.batch_size, workers)
            rates[workers] = rest[2]
            figures = [f"{first_batch:.2f}", f"{first_epoch:.2f}", *(f"{figure:,.0f}" for figure in rest)]
            print(f"| {workers} | {' | '.join(figures)} |", flush=True)
    consumed = run_in_process(step_rate, options.shape, NUM_CORES, threads=NUM_CORES)
    workers, delivered = max(rates.items())
    print(
        f"\nA training step of {options.shape} on {NUM_CORES} threads consumes {consumed:,.0f} tokens/s; "
        f"{workers} workers deliver {delivered / consumed:,.0f} times as many."
    )


if __name__ == "__main__":
    main()
