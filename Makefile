# Every target creates the environment that it needs in .venv, once.
#   make train   train the embedded default (real handwritten digits)       make test    the whole test suite
#   make setup   the environment alone                                      make lint    ruff and pyright
#   make bench   side-by-side timings against PyTorch, 45 minutes           make docs    the documentation as a site
#   make dist    wheel and sdist, into dist/
#   make accelerators   what XLA compiles for GPUs and TPUs, without one; ARGS=--check compares it with the record

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NEWEST_VENV := .venv-newest
ACCELERATORS_VENV := .venv-accelerators
# The equivalence tests need PyTorch. Every build of it will do: pip takes the one that its own settings name.
TORCH ?= torch==2.13.0
# XLA allocates its CPU buffers anew at every step. Huge pages, where the system has them, make a step a fifth faster.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1
# An environment without JAX's plug-in for GPUs or TPUs trains on the CPU, also on a machine that has one.
PLUGINS = $(wildcard $(VENV)/lib/python3*/site-packages/jax_plugins $(VENV)/lib/python3*/site-packages/libtpu)

.DEFAULT_GOAL := help
.PHONY: help setup train test test-newest accelerators lint bench docs dist clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(VENV)/.train

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "scconv_jax needs Python 3.11 or newer; $$($(PYTHON) --version 2>&1) is first on PATH." \
	       "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "Creating the environment in $(VENV) (once; one to three minutes) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(BIN)/python
	@$(PIP) --editable '.[train]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@$(PIP) $(TORCH)
	@$(PIP) --editable '.[train,tfds,export,test,docs]'
	@touch $@ $(VENV)/.train $(VENV)/.docs

train: $(VENV)/.train
	$(HUGE_PAGES) $(BIN)/python -m train.main $(if $(PLUGINS),,--no-accel) $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(VENV)/.test
	$(HUGE_PAGES) $(BIN)/python -m benchmarks.networks $(ARGS)

docs: $(VENV)/.docs
	@$(BIN)/python docs/drawing/runtime.py
	$(BIN)/python -m sphinx -q -E -W --keep-going -d site/.doctrees docs site
	@echo "Documentation: open site/index.html"

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@$(PIP) --editable '.[docs]'
	@touch $@

dist: $(VENV)/.dist
	rm -rf dist
	$(BIN)/python -m hatchling build

$(VENV)/.dist: pyproject.toml | $(BIN)/python
	@$(PIP) 'hatchling>=1.26'
	@touch $@

# The tests that need no PyTorch, on a newer Python with the newest jax and flax.
test-newest:
	@PYTHON_NEWEST="$(PYTHON_NEWEST)" TESTED="$(BIN)/python" VENV="$(NEWEST_VENV)" sh .ci/test-newest

# XLA's compilers for GPUs and TPUs, in an environment of their own (about 6 GB). No device is needed.
accelerators: $(ACCELERATORS_VENV)/.made
	$(ACCELERATORS_VENV)/bin/python -m benchmarks.compiled $(ARGS)

$(ACCELERATORS_VENV)/.made: pyproject.toml
	@$(PYTHON) -m venv $(ACCELERATORS_VENV)
	@$(ACCELERATORS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[train,cuda,tpu]'
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST_VENV) $(ACCELERATORS_VENV) build dist
