"""Known-item lists from documents alone: a title, or words of a text, ask; that text answers, others do not.

They need no judgments and no teacher, there are as many as one wants, and what a model must learn for them is to hold a
passage against a query: a start for small models before lists that people or a teacher ordered. Asking with words of
the passage itself is the inverse cloze task (Lee et al. 2019, "Latent Retrieval for Weakly Supervised Open Domain
Question Answering") with the words left in; it is learned soonest.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankllm_composer.sources.retrieval_files import read_json_lines


class KnownItemError(ValueError):
    """Documents of which no known-item lists can be made."""


@dataclass(frozen=True)
class KnownItems:
    """Files that `shards build --run … --judgments … --queries … --docs …` takes.

    Attributes:
        queries: titles or texts, or some of their words.
        docs: what is shown: the documents' texts without their titles, or parts of them.
        run: the candidates of each query in an order drawn by chance.
        judgments: grade 1 for the document that asks, 0 for the others.
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
        documents: JSONL of docid, title, text; those without a text, or the title that is to ask, are passed over.
        folder: made if absent; its files are replaced.
        num_lists: queries written.
        num_candidates: passages of each, one of them the one asked for.
        ask_with: the document's title, or the very passage that is shown of it.
        query_words: fewest and most words that ask, drawn anew for each list, in their order; None = all words.
        passage_words: show this many words from a place in the text that is drawn anew; None = whole texts.
        exclude: documents that must not be shown, such as those of held-out lists.
        seed: of documents, words, places and orders.
    Raises:
        KnownItemError: a number is out of range, or too few documents can ask.
        SourceError: the documents cannot be read.
    """
    fewest, most = query_words or (1, 1)
    if num_lists < 1 or num_candidates < 2 or not 1 <= fewest <= most or (passage_words or 1) < 1:
        raise KnownItemError(
            f"found {num_lists} lists of {num_candidates} candidates, query_words {query_words}, passage_words "
            f"{passage_words}; allowed are 1 list, 2 candidates and 1 word or more, the fewest words first"
        )
    titles: dict[str, str] = {}
    texts: dict[str, list[str]] = {}
    for _, _, fields in read_json_lines(documents, "docid"):
        title, text = (str(fields.get(name) or "").strip(" .\n") for name in ("title", "text"))
        if text and (title or ask_with == "text") and fields["docid"] not in exclude:
            titles[fields["docid"]], texts[fields["docid"]] = title, text.split()
    if len(texts) < num_candidates:
        raise KnownItemError(
            f"{documents}: found {len(texts)} documents with a {ask_with} that asks and a text, allowed are "
            f"{num_candidates} or more, the candidates of a list"
        )
    source, docids = random.Random(seed), list(texts)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = KnownItems(*(folder / name for name in ("queries.jsonl", "docs.jsonl", "run.trec", "qrels.trec")))
    queries, run, judgments = [], [], []
    shown: dict[str, str] = {}
    for number in range(num_lists):
        asked, qid = source.choice(docids), f"known-{number}"
        candidates = [asked]
        while len(candidates) < num_candidates:
            other = source.choice(docids)
            if other not in candidates:
                candidates.append(other)
        passages = [_part(texts[docid], passage_words, source) for docid in candidates]
        words = titles[asked].split() if ask_with == "title" else passages[0]
        if query_words is not None:
            kept = source.sample(range(len(words)), min(len(words), source.randint(fewest, most)))
            words = [words[place] for place in sorted(kept)]
        queries.append(json.dumps({"qid": qid, "text": " ".join(words)}))
        names = candidates if passage_words is None else [f"{docid}-in-{qid}" for docid in candidates]
        shown.update(zip(names, map(" ".join, passages)))
        for place, docid in enumerate(source.sample(names, len(names))):
            run.append(f"{qid} Q0 {docid} {place + 1} {num_candidates - place} chance")
            judgments.append(f"{qid} 0 {docid} {int(docid == names[0])}")
    docs = [json.dumps({"docid": docid, "text": text}) for docid, text in shown.items()]
    for path, lines in zip((files.queries, files.docs, files.run, files.judgments), (queries, docs, run, judgments)):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def _part(words: list[str], count: int | None, source: random.Random) -> list[str]:
    if count is None:
        return words
    start = source.randint(0, max(0, len(words) - count))
    return words[start : start + count]
