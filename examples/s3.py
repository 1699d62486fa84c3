"""Keep lists and checkpoints in an object store: S3, or one that speaks its protocol (MinIO, R2, Ceph).

    export AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… AWS_DEFAULT_REGION=…
    export S3_ENDPOINT_URL=https://…    # of a store other than Amazon's
    python examples/s3.py s3://bucket/prefix

Nothing else changes: gs:// and the other stores that streaming reads are named the same way.
"""

import sys
from pathlib import Path

import rankllm_composer as rc
from rankllm_composer.demo import CollectionOptions, build_collection, build_model_folder

url, *overrides = sys.argv[1:]
folder = Path("runs/s3")
files = build_collection(folder / "collection", CollectionOptions(num_train_queries=32))
build_model_folder(folder / "model", files.words)
source = {"run": files.train_run, "queries": files.train_queries, "docs": files.docs, "judgments": files.judgments}
rc.build_shards(f"{url}/lists", rc.SourceOptions(**source))  # uploaded as a whole or not at all

recipe = rc.load_recipe(
    "demo",
    [
        f"run.folder={folder}/run",
        f"model.name_or_path={folder}/model",
        f"data.train.remote={url}/lists",
        f"data.train.local={folder}/cache",  # shards are downloaded as they are needed
        "data.train.source=null",
        f"checkpoint.folder={url}/checkpoints",  # the same command on another machine resumes from there
        "batch.global_lists=8",
        "run.max_duration=2ep",
        "schedule.warmup=1ba",
        *overrides,
    ],
)
print(rc.train(recipe).best)
