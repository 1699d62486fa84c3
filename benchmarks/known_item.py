"""Known-item lists from documents alone: the query is a title or words of a text, and only that text is relevant.

They need neither judgments nor a teacher, their number is not limited, and they teach a model to compare a passage with
a query: a warm-up for small models before lists ordered by people or a teacher. Queries from the passage itself are the
inverse cloze task (Lee et al. 2019, "Latent Retrieval for Weakly Supervised Open Domain Question Answering") with the
words left in; a model learns it fastest.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankllm_composer.sources.files import read_rows


@dataclass(frozen=True)
class KnownItems:
    """Files for `shards build --run … --judgments … --queries … --docs …`.

    Attributes:
        queries: titles or texts, or some of their words.
        docs: passages: the documents' texts without their titles, or parts of them.
        run: the candidates of each query in random order.
        judgments: grade 1 for the document that the query was made from, 0 for the others.
    """

    queries: Path
    docs: Path
    run: Path
    judgments: Path


def build_known_items(
    documents: str | Path,
    folder: str | Path,
    *,
    num_lists: int,
    num_candidates: int,
    ask_with: Literal["title", "text"] = "title",
    query_words: tuple[int, int] | None = None,
    passage_words: int | None = None,
    exclude: Collection[str] = (),
    seed: int = 42,
) -> KnownItems:
    """Write the files of known-item lists. The same arguments write the same files.

    Args:
        documents: JSONL of docid, title, text; documents without a text, or without a needed title, are skipped.
        folder: created if absent; its files are replaced.
        num_lists: number of queries.
        num_candidates: passages per query, one of them relevant.
        ask_with: make queries from the document's title, or from the passage itself.
        query_words: minimum and maximum number of words per query, sampled in their order; None = all words.
        passage_words: number of words per passage, from a random position in the text; None = complete texts.
        exclude: documents to leave out, such as those of held-out lists.
        seed: of documents, words, positions and orders.
    Raises:
        ValueError: a number is out of range, or there are too few documents.
        SourceError: the documents cannot be read.
    """
    fewest, most = query_words or (1, 1)
    if num_lists < 1 or num_candidates < 2 or not 1 <= fewest <= most or (passage_words or 1) < 1:
        raise ValueError(
            f"num_lists is {num_lists}, num_candidates {num_candidates}, query_words {query_words} and passage_words "
            f"{passage_words}; expected at least 1 list, 2 candidates and 1 word, with the minimum first."
        )
    titles: dict[str, str] = {}
    texts: dict[str, list[str]] = {}
    for fields in (row.value for row in read_rows(documents)):
        title, text = (str(fields.get(name) or "").strip(" .\n") for name in ("title", "text"))
        if text and (title or ask_with == "text") and fields["docid"] not in exclude:
            titles[fields["docid"]], texts[fields["docid"]] = title, text.split()
    if len(texts) < num_candidates:
        raise ValueError(
            f"{documents}: {len(texts)} documents have a {ask_with} and a text; expected at least {num_candidates}, "
            "the candidates of a list."
        )
    rng, docids = random.Random(seed), list(texts)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = KnownItems(*(folder / name for name in ("queries.jsonl", "docs.jsonl", "run.trec", "qrels.trec")))
    queries, run, judgments = [], [], []
    shown: dict[str, str] = {}
    for number in range(num_lists):
        relevant, qid = rng.choice(docids), f"known-{number}"
        candidates = [relevant]
        while len(candidates) < num_candidates:
            other = rng.choice(docids)
            if other not in candidates:
                candidates.append(other)
        passages = [_part(texts[docid], passage_words, rng) for docid in candidates]
        words = titles[relevant].split() if ask_with == "title" else passages[0]
        if query_words is not None:
            kept = rng.sample(range(len(words)), min(len(words), rng.randint(fewest, most)))
            words = [words[place] for place in sorted(kept)]
        queries.append(json.dumps({"qid": qid, "text": " ".join(words)}))
        names = candidates if passage_words is None else [f"{docid}-in-{qid}" for docid in candidates]
        shown.update(zip(names, map(" ".join, passages)))
        for place, docid in enumerate(rng.sample(names, len(names))):
            run.append(f"{qid} Q0 {docid} {place + 1} {num_candidates - place} chance")
            judgments.append(f"{qid} 0 {docid} {int(docid == names[0])}")
    docs = [json.dumps({"docid": docid, "text": text}) for docid, text in shown.items()]
    for path, lines in zip((files.queries, files.docs, files.run, files.judgments), (queries, docs, run, judgments)):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def _part(words: list[str], count: int | None, rng: random.Random) -> list[str]:
    if count is None:
        return words
    start = rng.randint(0, max(0, len(words) - count))
    return words[start : start + count]
