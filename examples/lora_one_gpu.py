"""Fine-tune a 7B model with LoRA on one GPU of 24 GB, on records of your own.

    python examples/lora_one_gpu.py records.jsonl
    python examples/lora_one_gpu.py records.jsonl model.name_or_path=Qwen/Qwen3-0.6B model.lora.rank=8

The command does the same: rankllm-composer train first_mistral_lora -n 1 key=value …. The export is the whole model,
with the adapter merged, as rank_llm serves it; with checkpoint.export.merge_lora=false it is the adapter alone.
Estimate memory and hours first: rankllm-composer plan first_mistral_lora -n 1 --gpu a10-24gb
"""

import sys

import rankllm_composer as rc

records, *overrides = sys.argv[1:]
recipe = rc.load_recipe(
    "first_mistral_lora",
    [
        "run.folder=runs/lora_one_gpu",
        f"data.train.source.input={records}",
        "data.train.local=runs/lora_one_gpu/lists",
        "model.lora.rank=16",
        "batch.global_lists=16",
        *overrides,
    ],
)
run = rc.train(recipe)
print(f"{run.best} reranks:")
for passage in rc.Reranker.from_pretrained(run.best).rerank("red apples", ["about pears", "about red apples"]):
    print(passage)
