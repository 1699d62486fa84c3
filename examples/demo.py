# %% [markdown]
# # A reranker learns to read
#
# This notebook trains a listwise reranker from random weights on two CPU cores, without any download, and shows what it
# learned. The steps are those of a run on eight GPUs: lists, shards, a recipe, training, reranking held-out queries.
# `rankllm-composer demo` runs the same from the command line.
#
# The task is invented, so that nothing can be known beforehand: words without meaning, passages of four of them, and
# queries of one. A passage is the better the more often it contains the query.

# %%
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import rankllm_composer as rc
from rankllm_composer.demo import CollectionOptions, build_collection, build_model_folder, export_untrained
from rankllm_composer.ranking.rerank import RerankFiles, rerank_files

torch.set_num_threads(2)
folder = Path("runs/demo")
sizes = CollectionOptions(**json.loads(os.environ.get("DEMO_SIZES", "{}")))  # 20,000 lists, 200 held-out queries
files = build_collection(folder / "collection", sizes)
print("the words:", *files.words)

# %% [markdown]
# One held-out query with its candidates, in the random order of the "first stage", and their grades. No passage of a
# held-out query occurs in training.

# %%
documents = {row["docid"]: row["text"] for row in map(json.loads, files.docs.open())}
query = json.loads(files.test_queries.open().readline())
candidates = [line.split()[2] for line in files.test_run.open() if line.startswith(query["qid"] + " ")]
print("query:", query["text"])
for docid in candidates:
    print(f"  grade {documents[docid].split().count(query['text'])}   {documents[docid]}")

# %% [markdown]
# ## The recipe
#
# `demo` is a complete recipe; each `key=value` replaces one of its values. The model is a two-layer Mistral with fresh
# weights. Its loss is language modeling of the answer, such as `[C] > [A] > [B] > [D]`, plus RankNet on the scores of
# the letters. Every 75 batches, the held-out queries are ranked.

# %%
build_model_folder(folder / "model", files.words)
names = "judgments: runs/demo/collection/qrels.trec, docs: runs/demo/collection/docs.jsonl, window: 4, stride: 4"
test = "run: runs/demo/collection/test_run.trec, queries: runs/demo/collection/test_queries.jsonl"
overrides = [f"data.eval={{local: runs/demo/eval_shards, source: {{{test}, {names}}}}}", "evaluation={interval: 75ba}"]
recipe = rc.load_recipe("demo", [*overrides, *os.environ.get("DEMO_OVERRIDES", "").split()])
print(f"{recipe.objective.name}, {recipe.batch.global_lists} lists per batch, learning rate {recipe.optimizer.lr}")

# %% [markdown]
# ## Training
#
# Shards are built first. A run that was stopped resumes; one that is complete says so.

# %%
untrained = export_untrained(recipe, folder / "untrained")
run = rc.train(recipe)

# %% [markdown]
# The loss falls fast at first, while the model learns to write any order. Then it seems to stand still, until the
# attention heads find how to compare a candidate with the query, and nDCG on queries that it never saw rises.

# %%
batches = [row for row in map(json.loads, (run.folder / "metrics.jsonl").open()) if row["event"] == "batch"]
rows = list(map(json.loads, (run.folder / "evaluations.jsonl").open()))
means = [sum(one["first_token"] for one in row["ndcg@10"].values()) / len(row["ndcg@10"]) for row in rows]
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
left.plot([row["batch"] for row in batches], [row["loss/train/total"] for row in batches])
left.set(xlabel="batch", ylabel="training loss", yscale="log")
right.plot([row["batch"] for row in rows], means, marker="o")
right.set(xlabel="batch", ylabel="nDCG@10, held-out queries")
plt.show()

# %% [markdown]
# ## What it learned
#
# Both models rank the held-out queries from the scores of the first token, as rank_llm does with `--use-logits`.


# %%
def rank(model: Path, name: str) -> dict[str, dict[str, float]]:
    texts = {"queries": files.test_queries, "documents": files.docs}
    output = folder / f"{name}.trec"
    job = RerankFiles(first_stage=files.test_run, judgments=files.judgments, output=output, **texts)
    options = rc.RerankOptions(decoding="first_token")
    report = rerank_files(model, job, options, measures=["nDCG@10"], progress_bar=False)
    row = report.result.comparisons[0]
    return {"first stage": row.first_stage, name: row.reranked}


found = rank(untrained, "untrained") | rank(run.best, "trained")
for name, values in found.items():
    print(f"{name:<12} {sum(values.values()) / len(values):.3f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(8, 2.4), layout="constrained", sharey=True)
for panel, (name, values) in zip(axes, found.items()):
    panel.hist(values.values(), bins=20, range=(0.5, 1))
    panel.set(title=name, xlabel="nDCG@10")
axes[0].set_ylabel("queries")
plt.show()

# %% [markdown]
# The query from above, as the trained model orders it:

# %%
reranker = rc.Reranker.from_pretrained(run.best)
for passage in reranker.rerank(query["text"], [documents[docid] for docid in candidates]):
    print(f"  grade {passage.text.split().count(query['text'])}   {passage.text}")

# %% [markdown]
# The export in `runs/demo/hf` is a Hugging Face folder that rank_llm serves. Next: [your own
# data](own_jsonl.py), a [BM25 run with judgments](bm25_qrels.py), or `rankllm-composer report runs/demo`.
