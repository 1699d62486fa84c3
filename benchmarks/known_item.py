"""Known-item lists from documents alone: the query is words of a text, and only that text is relevant.

They need neither judgments nor a teacher, their number is not limited, and they teach a model to compare a passage with
a query: a warm-up for small models before lists ordered by people or a teacher. Queries from the passage itself are the
inverse cloze task (Lee et al. 2019, "Latent Retrieval for Weakly Supervised Open Domain Question Answering") with the
words left in; a model learns it fastest.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from rankllm_composer.sources.files import read_rows


@dataclass(frozen=True)
class KnownItems:
    """Files for `shards build --run … --judgments … --queries …`, with the documents that they were made from.

    Attributes:
        queries: words of texts.
        run: the candidates of each query in random order.
        judgments: grade 1 for the document that the query was made from, 0 for the others.
    """

    queries: Path
    run: Path
    judgments: Path


def build_known_items(
    documents: str | Path,
    folder: str | Path,
    *,
    num_lists: int,
    num_candidates: int,
    query_words: tuple[int, int],
    seed: int,
) -> KnownItems:
    """Write the files of known-item lists. The same arguments write the same files.

    Args:
        documents: JSONL of docid and text; documents without a text are skipped.
        folder: created if absent; its files are replaced.
        num_lists: number of queries.
        num_candidates: passages per query, one of them relevant.
        query_words: minimum and maximum number of words per query, sampled in their order.
        seed: of documents, words and orders.
    Raises:
        ValueError: a number is out of range, or there are too few documents.
        SourceError: the documents cannot be read.
    """
    fewest, most = query_words
    if num_lists < 1 or num_candidates < 2 or not 1 <= fewest <= most:
        raise ValueError(
            f"num_lists is {num_lists}, num_candidates {num_candidates} and query_words {query_words}; expected at "
            "least 1 list, 2 candidates and 1 word, with the minimum first."
        )
    rows = (row.value for row in read_rows(documents))
    texts = {fields["docid"]: words for fields in rows if (words := (fields.get("text") or "").split())}
    if len(texts) < num_candidates:
        raise ValueError(
            f"{documents}: {len(texts)} documents have a text; expected at least {num_candidates}, the candidates of a "
            "list."
        )
    rng, docids = random.Random(seed), list(texts)
    queries, run, judgments = [], [], []
    for number in range(num_lists):
        qid, candidates = f"known-{number}", rng.sample(docids, num_candidates)
        relevant = rng.choice(candidates)
        words = texts[relevant]
        kept = sorted(rng.sample(range(len(words)), min(len(words), rng.randint(fewest, most))))
        queries.append(json.dumps({"qid": qid, "text": " ".join(words[place] for place in kept)}))
        for place, docid in enumerate(candidates):
            run.append(f"{qid} Q0 {docid} {place + 1} {num_candidates - place} chance")
            judgments.append(f"{qid} 0 {docid} {int(docid == relevant)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = KnownItems(*(folder / name for name in ("queries.jsonl", "run.trec", "qrels.trec")))
    for path, lines in zip((files.queries, files.run, files.judgments), (queries, run, judgments)):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files
