# One name for each task, everywhere: CI calls these too. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet -c constraints.txt
# Sources with a pyproject.toml of their own, in the order of their dependencies.
MEMBERS  := protos kernels[torch] services/chassis services/gateway services/scheduler services/worker services/trainer cli
PACKAGES := $(foreach m,protos kernels services/chassis services/gateway services/scheduler services/worker services/trainer cli,$(m)/pyproject.toml)
PROTOS    = $(shell cd protos && find lmesh -name '*.proto' | sort)
FOR  ?= 600
SEED ?= 0
JOBS ?= 2
QUESTION := What is the capital of France?

.PHONY: help demo up down gen lint type test test-full test-gpu chaos bench install install-dev clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | sort | expand -t 14

demo: install ## from nothing to a running mesh, one streamed answer, and one from an adapter trained on the spot
	$(BIN)/lmesh up
	@printf '\n> %s\n' '$(QUESTION)'
	$(BIN)/lmesh chat smollm2-135m-instruct -m '$(QUESTION)' --temperature 0 --max-tokens 64
	$(BIN)/lmesh train -c examples/jobs/lighthouse.yaml
	@printf '\n> %s\n' '$(QUESTION)'
	$(BIN)/lmesh chat smollm2-135m-instruct:lighthouse -m '$(QUESTION)' --temperature 0 --max-tokens 64

up: install ## start the mesh; ARGS="--workers 2"
	$(BIN)/lmesh up $(ARGS)

down: ## stop the mesh
	@if [ -x $(BIN)/lmesh ]; then $(BIN)/lmesh down; else echo "lmesh is not installed here"; fi

gen: install-dev ## write protos/python from protos/lmesh
	cd protos && ../$(BIN)/buf format -w
	cd protos && PATH="$(CURDIR)/$(BIN):$$PATH" ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=python --grpc_python_out=python \
		--mypy_out=python --mypy_grpc_out=python $(PROTOS)

lint: install-dev ## style, types, import rules, protos
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(MAKE) --no-print-directory type
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code

type: install-dev ## strict types
	$(BIN)/mypy kernels services cli

# Two files at a time: most tests wait for processes and sockets, and one at a time would leave half the cores idle.
# With a thread each, which does not spin: two that share the cores would otherwise wait for each other's (measured: x3).
test: install-dev ## everything but the long matrix and what needs a GPU
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=2000 $(BIN)/python -P -m pytest -n $(JOBS) --dist loadfile -m "not full and not gpu" $(ARGS)

test-full: install-dev ## with the long matrix
	$(BIN)/python -P -m pytest -m "not gpu" $(ARGS)

test-gpu: install-dev ## what needs a CUDA device
	$(BIN)/python -P -m pytest -m gpu $(ARGS)

chaos: install-dev ## seeded lives of a mesh on virtual time; FOR=600 (seconds), SEED=0 (the first)
	CHAOS_SECONDS=$(FOR) CHAOS_SEED=$(SEED) $(BIN)/python -P -m pytest -s tests/chaos/test_simulation.py $(ARGS)

bench: install-dev ## W1-W3 through transformers, the engine and the mesh; one JSON line a case
	$(BIN)/python benchmarks/run.py $(ARGS)

clean: down ## stop the mesh and remove the virtual environment
	rm -rf $(VENV)

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# torch first and alone: it is most of the download, and later steps must not choose another one.
$(VENV)/.installed: constraints.txt $(PACKAGES) | $(VENV)/.created
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation $(foreach m,$(MEMBERS),-e './$(m)')
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("lmesh needs Python 3.11 or newer, and $(PYTHON) is %d.%d: run make PYTHON=python3.12, or another that you have" % v[:2])'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "no virtual environment could be made with $(PYTHON); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@
