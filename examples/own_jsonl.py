"""Train on lists of your own: one JSON object per line with a query, its passages and what orders them.

    python examples/own_jsonl.py

writes five lines to runs/own_jsonl/records.jsonl and trains a tiny model without weights on them, in seconds on a CPU.
Put your own file there, and name a base model and what fits it:

    rankllm-composer recipes copy first_qwen3_0.6b mine.yaml
    rankllm-composer train mine.yaml data.train.source.input=records.jsonl data.train.local=lists
"""

import json
import sys
from pathlib import Path

import rankllm_composer as rc
from rankllm_composer.demo import build_model_folder

folder = Path("runs/own_jsonl")
folder.mkdir(parents=True, exist_ok=True)
lines = [
    {"query": "plum", "passages": ["apple", "plum"], "ranking": [2, 1]},  # positions from 1, best first
    {"query": "apple", "passages": ["apple pie", "plum", "pie"], "grades": [2, 0, 1]},  # 0: not relevant
    {"query": "pie", "passages": ["plum", "apple", "apple pie"], "scores": [-3.5, 0.25, 7.0]},  # of a cross-encoder
    {"query": "plum pie", "passages": ["pie", "plum pie"], "ranking": [2, 1]},
    {"query": "apple pie", "passages": ["apple pie", "apple"], "ranking": [1, 2]},
]
rows = [json.dumps({"id": f"q{number}", **line}) for number, line in enumerate(lines)]
(folder / "records.jsonl").write_text("\n".join(rows) + "\n")
build_model_folder(folder / "model", ("plum", "apple", "pie"))  # configuration and tokenizer

overrides = [f"run.folder={folder}/run", f"model.name_or_path={folder}/model", f"data.train.local={folder}/lists"]
overrides += [f"data.train.source={{input: {folder}/records.jsonl}}", "batch.global_lists=5"]
overrides += ["run.max_duration=10ep", "schedule.warmup=1ba", *sys.argv[1:]]
run = rc.train(rc.load_recipe("demo", overrides))
print(rc.Reranker.from_pretrained(run.best).rerank("plum", ["apple", "plum"]))
