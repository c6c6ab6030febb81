# Everything sets itself up: `make tour` and `make test` need Python 3.11+, make and a C compiler, nothing else.
ifndef PYTHON  # the first Python here that is new enough
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
endif
BIN := .venv/bin
CHAPTERS := $(notdir $(patsubst %/exercises.toml,%,$(wildcard ch*/exercises.toml)))
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm setup-sglang setup-genai-bench setup-routers setup-kube system-deps tour test smoke smoke-gpu lint format types constraints clean $(foreach c,$(CHAPTERS),$(firstword $(subst _, ,$(c))))

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  make chNN               smoke-run one chapter: $(foreach c,$(CHAPTERS),$(firstword $(subst _, ,$(c))))"

setup:  ## make .venv from exact pins (CPU or CUDA torch by what is here); does nothing when nothing changed
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one or run make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) common/bootstrap.py

setup-vllm: setup  ## make vLLM's own environment in the cache folder (CUDA or CPU build by what is here; some GB)
	@$(PYTHON) common/bootstrap.py vllm

setup-sglang: setup  ## make SGLang's own environment there (CUDA build 11 GB, CPU build 1.5 GB)
	@$(PYTHON) common/bootstrap.py sglang

setup-routers: setup  ## make an environment with the routers that chapter 7 measures ours against (some 40 MB)
	@$(PYTHON) common/bootstrap.py routers

setup-genai-bench: setup  ## make genai-bench's own environment there (0.8 GB)
	@$(PYTHON) common/bootstrap.py genai-bench

setup-kube: setup  ## build the control plane of chapter 8's local Kubernetes cluster there (Debian; about 5 minutes)
	@$(BIN)/python -m ch08_kubernetes.cluster.build

system-deps:  ## install the optional system packages (Debian or Ubuntu, root); without them some things are skipped
	@common/system-deps.sh

tour: setup  ## the book in one run: train on real text, see where time went, survive a kill, read the report
	@$(BIN)/python -m tour

test: setup  ## all tests, on CPU, two files at a time
	$(BIN)/python -m pytest -n $(if $(TEST_ON_GPU),0,2) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

smoke: setup  ## run every exercise briefly [CHAPTER=ch01]
	$(BIN)/python -m common.exercises smoke $(CHAPTER) --junit runs/smoke.xml --json runs/smoke.json

smoke-gpu: setup  ## run the exercises' GPU commands [CHAPTER=ch01]
	$(BIN)/python -m common.exercises smoke $(CHAPTER) --gpu --junit runs/smoke-gpu.xml --json runs/smoke-gpu.json

$(foreach c,$(CHAPTERS),$(firstword $(subst _, ,$(c)))): setup
	$(BIN)/python -m common.exercises smoke $@

lint: setup  ## ruff check, ruff format --check and mypy --strict on common
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch pins its own CUDA packages exactly, and which ones depends on the build: they stay out of the constraints.
constraints: setup  ## pin the transitive set anew after a change in requirements.txt
	uv_bin=$$($(PYTHON) -c 'import sys; sys.path.insert(0, "common"); import bootstrap; print(bootstrap.find_uv())') && \
	$$uv_bin pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header $(addprefix --find-links ,$(PIP_FIND_LINKS)) \
	    requirements.txt | grep -vE '^(torch|triton|nvidia-|cuda-)' > constraints.txt

clean:  ## remove .venv, runs and tool caches of this checkout (the shared cache folder stays)
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
