"""Known-item lists from documents alone: a title asks, the text it stands over answers, other texts do not.

They need no judgments and no teacher, there are as many as one wants, and what a model must learn for them is to hold a
passage against a query: a start for small models before lists that people or a teacher ordered.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from rankllm_composer.trec_files import read_json_lines


class KnownItemError(ValueError):
    """Documents of which no known-item lists can be made."""


@dataclass(frozen=True)
class KnownItems:
    """Files that `shards build --run … --judgments … --queries … --docs …` takes.

    Attributes:
        queries: titles, or some of their words.
        docs: the documents' texts without their titles.
        run: the candidates of each query in an order drawn by chance.
        judgments: grade 1 for the document that the title is of, 0 for the others.
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
    min_query_words: int | None = None,
    exclude: Collection[str] = (),
    seed: int = 42,
) -> KnownItems:
    """Write the files of known-item lists. The same arguments write the same files.

    Args:
        documents: JSONL of docid, title, text; those without either are passed over.
        folder: made if absent; its files are replaced.
        num_lists: queries written.
        num_candidates: passages of each, one of them the one asked for.
        min_query_words: ask with this many words of the title or more, drawn anew for each list; None = with all.
        exclude: documents that must not be shown, such as those of held-out lists.
        seed: of documents, words and orders.
    Raises:
        KnownItemError: a number is out of range, or too few documents have a title and a text.
        TrecError: the documents cannot be read.
    """
    if num_lists < 1 or num_candidates < 2 or (min_query_words is not None and min_query_words < 1):
        raise KnownItemError(
            f"found {num_lists} lists of {num_candidates} candidates, {min_query_words} query words; allowed are "
            "1 list, 2 candidates and 1 word or more"
        )
    titles: dict[str, str] = {}
    texts: dict[str, str] = {}
    for _, _, fields in read_json_lines(documents, "docid"):
        title, text = (str(fields.get(name) or "").strip(" .\n") for name in ("title", "text"))
        if title and text and fields["docid"] not in exclude:
            titles[fields["docid"]], texts[fields["docid"]] = title, text
    if len(titles) < num_candidates:
        raise KnownItemError(
            f"{documents}: found {len(titles)} documents with a title and a text, allowed are {num_candidates} or "
            "more, the candidates of a list"
        )
    source, docids = random.Random(seed), list(titles)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = KnownItems(*(folder / name for name in ("queries.jsonl", "docs.jsonl", "run.trec", "qrels.trec")))
    queries, run, judgments = [], [], []
    for number in range(num_lists):
        asked = source.choice(docids)
        words = titles[asked].split()
        if min_query_words is not None and len(words) > min_query_words:
            kept = source.sample(range(len(words)), source.randint(min_query_words, len(words)))
            words = [words[i] for i in sorted(kept)]
        shown = [asked]
        while len(shown) < num_candidates:
            other = source.choice(docids)
            if other not in shown:
                shown.append(other)
        source.shuffle(shown)
        qid = f"known-{number}"
        queries.append(json.dumps({"qid": qid, "text": " ".join(words)}))
        run += [f"{qid} Q0 {docid} {i + 1} {num_candidates - i} chance" for i, docid in enumerate(shown)]
        judgments += [f"{qid} 0 {docid} {int(docid == asked)}" for docid in shown]
    docs = [json.dumps({"docid": docid, "text": text}) for docid, text in texts.items()]
    for path, lines in zip((files.queries, files.docs, files.run, files.judgments), (queries, docs, run, judgments)):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files
