"""Everything from Python: lists, a recipe, training, and a reranker that ranks candidates of a first stage.

    python examples/python_only.py

No command and no YAML of your own. All names are in the API reference (docs/api.md).
"""

import sys
from pathlib import Path

import rankllm_composer as rc
from rankllm_composer.demo import CollectionOptions, build_collection, build_model_folder

folder = Path("runs/python_only")
files = build_collection(folder / "collection", CollectionOptions(num_train_queries=32))
build_model_folder(folder / "model", files.words)

names = {"run": files.train_run, "queries": files.train_queries, "docs": files.docs, "judgments": files.judgments}
report = rc.build_shards(folder / "lists", rc.SourceOptions(**names))
print(f"{report.stats.num_records} lists of {max(report.stats.candidates)} passages in {folder}/lists")

overrides = [f"run.folder={folder}/run", f"model.name_or_path={folder}/model", f"data.train.local={folder}/lists"]
overrides += ["data.train.source=null", "batch.global_lists=8", "run.max_duration=2ep", "schedule.warmup=1ba"]
recipe = rc.load_recipe("demo", [*overrides, *sys.argv[1:]])
print(f"{recipe.objective.name}, {recipe.objective.ranking_loss}, learning rate {recipe.optimizer.lr}")
run = rc.train(recipe)

reranker = rc.Reranker.from_pretrained(run.best, rc.RerankOptions(decoding="first_token"))
word, other = files.words[:2]
documents = {"d1": f"{other} {other} {other} {other}", "d2": f"{word} {word} {other} {word}"}
for query in reranker.rerank_queries({"q1": word}, documents, {"q1": ["d1", "d2"]}):
    print(query)
