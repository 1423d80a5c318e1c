# The whole workflow. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Fails where there is no .venv yet, one without pip (no python3-venv), or one whose Python has been replaced.
HAS_PIP := $(BIN)/python -c 'import pip' 2>/dev/null
# Through the environment, so that a prompt may contain any character.
export CHECKPOINT PROMPT
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Bytecode is kept, whatever the caller's environment says: else each worker compiles torch anew, for 20 s of a core.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install check fix test test-all test-k8s test-images up demo bench chaos
.PHONY: $(shell $(HAS_PIP) || echo $(VENV)/.installed)

help:  ## Show this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## Make .venv with the pinned dependencies and generate the protos' code

$(VENV)/.installed: pyproject.toml constraints.txt protos/generate.py $(shell find protos -name '*.proto')
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 …"; exit 1; }
	$(HAS_PIP) || $(PYTHON) -m venv --clear $(VENV)
	@# The pip that Python brings takes twice as long to read the package index.
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --upgrade pip
	@# Bytecode is made of what gets imported, when it is: all of it would take a third of the installation.
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@# Alone, without the torchvision that it declares: gpu_worker/models/upscaling.py says why.
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --no-deps spandrel
	@touch $@

check: install  ## Lint, types, proto rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tests.buf

fix: install  ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: install  ## What a change needs, with the real parts on free ports
	@# One thread each: threads of torch spin while they wait for a core that another test has. Three processes keep two
	@# cores busy: one or the other waits for a service to start or a job to end.
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not k8s and not images" --numprocesses 3

test-all: install  ## That and the rest: chaos, kills, demos, trainings, and the whole of long tables of cases
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not k8s and not images" --numprocesses 3

test-k8s: install  ## What needs a Kubernetes control plane: KUBEBUILDER_ASSETS, else one is built in .cache (minutes; as root, Debian)
	@assets=$${KUBEBUILDER_ASSETS:-$$(tests/deploy/kube-assets.sh .cache/kube-assets)} && test -n "$$assets" && \
	KUBEBUILDER_ASSETS="$$assets" OMP_NUM_THREADS=1 $(BIN)/pytest -m k8s --numprocesses 3 tests/services/endpoints tests/e2e/kubernetes

test-images: install  ## Build the images line by line, without Docker (five minutes; as root, Debian)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m images

up: install  ## The one-machine stack in the foreground
	$(BIN)/esd up

demo: install  ## A picture through the REST API: make demo CHECKPOINT=model.safetensors PROMPT="…"
	@$(BIN)/esd demo $${CHECKPOINT:+--checkpoint "$$CHECKPOINT"} $${PROMPT:+--prompt "$$PROMPT"} $(ARGS)

bench: install  ## Measure speed and memory, side by side, and print the tables
	$(BIN)/python -m tests.bench $(ARGS)
	$(BIN)/python -m tests.bench.batching
	$(BIN)/python -m tests.bench.throughput
	$(BIN)/python -m tests.bench.table_size
	$(BIN)/python -m tests.bench.checkpoints
	$(BIN)/python -m tests.bench.training
	$(BIN)/python -m tests.bench.revocation
	$(BIN)/python -m tests.bench.scaling

chaos: install  ## Kill everything at random while users submit jobs, and prove that none is lost or doubled
	$(BIN)/python -m tests.chaos $(ARGS)
