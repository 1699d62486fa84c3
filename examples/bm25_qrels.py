"""From a BM25 run and judgments to a reranker: lists, training with held-out queries, and nDCG beside BM25's.

    python examples/bm25_qrels.py

invents a small collection. Set the five paths below to files of your own, in any layout of docs/what-it-reads.md, or
to irds:ID of ir_datasets, and take away model.name_or_path to train the model of the recipe that you name.
"""

import sys
from pathlib import Path

import rankllm_composer as rc
from rankllm_composer.demo import CollectionOptions, build_collection, build_model_folder
from rankllm_composer.ranking.rerank import RerankFiles, rerank_files

folder = Path("runs/bm25_qrels")
files = build_collection(folder / "collection", CollectionOptions(num_train_queries=64, num_test_queries=20))
run, qrels, queries, docs = files.train_run, files.judgments, files.train_queries, files.docs
test_run, test_queries = files.test_run, files.test_queries
build_model_folder(folder / "model", files.words)

source = rc.SourceOptions(run=run, judgments=qrels, queries=queries, docs=docs, window=4, stride=4)
rc.build_shards(folder / "lists", source, rc.BuildOptions(hold_out=0.25))  # and lists-held-out

overrides = [f"run.folder={folder}/run", f"model.name_or_path={folder}/model", f"data.train.local={folder}/lists"]
overrides += ["data.train.source=null", "batch.global_lists=8", "run.max_duration=4ep", "schedule.warmup=1ba"]
overrides += [f"data.eval={{local: {folder}/lists-held-out, source: null}}", "evaluation={interval: 1ep}"]
trained = rc.train(rc.load_recipe("demo", [*overrides, *sys.argv[1:]]))

texts = {"queries": test_queries, "documents": docs}
job = RerankFiles(first_stage=test_run, judgments=qrels, output=folder / "reranked.trec", **texts)
report = rerank_files(trained.best, job, rc.RerankOptions(decoding="first_token"), measures=["nDCG@10"])
print(report.text)
