"""The commands of docs/own-data.md on an invented collection: is the model better than its first stage afterwards?

    python benchmarks/own_data.py runs/own_data

A query is one of 16 words behind one of 15 that occur in no passage, so that a held-out query is a text that was
never trained. A passage has four words; its grade is how often it contains the word of the query, so that grades are
tied. The first stage orders eight candidates by their grade and chance. The commands are those of the page, from
`sources look` to `report`; the recipe that they copy is changed by CHANGES, since no model is downloaded: the small
architecture of the demo is trained from random weights on a CPU.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

from rankllm_composer.demo import build_model_folder, invent_words
from rankllm_composer.recipe.load import load_recipe, recipe_to_yaml

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "own-data.md"
SECTION = "## From a BM25 run to a trained reranker"
CHANGES = [
    "model.name_or_path=base",
    "model.random_weights=true",
    "model.activation_checkpointing=0",
    "data.max_length_tokens=256",
    "batch.microbatch_tokens=4096",
    "objective.ranking_weight=1",
    "neftune=null",
    "optimizer.lr=1e-3",
    "parallelism.device=cpu",
    "parallelism.precision=fp32",
]
NUM_WORDS, NUM_OPENINGS, WORDS_PER_PASSAGE = 16, 15, 4
GRADES = (3, 2, 1, 1, 0, 0, 0, 0)


def write_files(folder: Path, queries_per_text: int, seed: int = 42) -> None:
    """Write queries.jsonl, docs.jsonl, qrels.trec, bm25.trec and the folder of the untrained model, base."""
    source = random.Random(seed)
    invented = invent_words(NUM_WORDS + NUM_OPENINGS, seed)
    build_model_folder(folder / "base", invented)
    words, openings = invented[:NUM_WORDS], invented[NUM_WORDS:]
    queries, docs, judgments, run = [], [], [], []
    for number, (opening, word) in enumerate(list(product(openings, words)) * queries_per_text):
        qid, others = f"q{number}", [other for other in words if other != word]
        queries.append({"qid": qid, "text": f"{opening} {word}"})
        scored = []
        for grade in GRADES:
            fillers = source.sample(others, 2)  # passages repeat words whatever the query
            passage = [word] * grade + [source.choice(fillers) for _ in range(WORDS_PER_PASSAGE - grade)]
            source.shuffle(passage)
            docid = f"d{len(docs)}"
            docs.append({"docid": docid, "title": "", "text": " ".join(passage)})
            scored.append((grade + source.gauss(0, 2), docid))
            if grade:
                judgments.append(f"{qid} 0 {docid} {grade}")
        for place, (score, docid) in enumerate(sorted(scored, reverse=True), start=1):
            run.append(f"{qid} Q0 {docid} {place} {score:.4f} noisy")
    for name, rows in (("queries.jsonl", queries), ("docs.jsonl", docs)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, lines in (("qrels.trec", judgments), ("bm25.trec", run)):
        (folder / name).write_text("\n".join(lines) + "\n")


def commands() -> list[str]:
    """The commands of the section, in its order, each on one line."""
    section = PAGE.read_text().partition(SECTION)[2].partition("\n## ")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def main(folder: Path, queries_per_text: int = 6) -> None:
    """Write the collection into a new folder and run the page's commands there."""
    folder.mkdir(parents=True)
    write_files(folder, queries_per_text)
    for command in commands():
        print(f"$ {' '.join(command.split())}", flush=True)
        words = command.replace("rankllm-composer", f"{sys.executable} -m rankllm_composer", 1)
        subprocess.run(words, shell=True, cwd=folder, check=True)
        if " recipes copy " in command:
            path = folder / command.split()[-1]
            path.write_text(recipe_to_yaml(load_recipe(path, CHANGES)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
