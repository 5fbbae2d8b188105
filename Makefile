# Every target makes the environment that it needs, once, in .venv; a second call starts at once.
#   make train   train the embedded default (real handwritten digits)       make test    the whole test suite
#   make setup   the environment alone                                      make lint    ruff and pyright
#   make bench   side-by-side timings against PyTorch                       make docs    the documentation as a site

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NEWEST_VENV := .venv-newest
# XLA on CPU asks for its buffers anew at every step; in huge pages (where the system has them) that costs a fifth less time.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help setup train test test-newest lint bench docs clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(VENV)/.train

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "scconv_jax needs Python 3.11 or newer; $$($(PYTHON) --version 2>&1) is first on PATH." \
	       "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "Making the environment in $(VENV) (once; one to three minutes) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(BIN)/python
	@$(PIP) --editable '.[train]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[train,tfds,test]'
	@touch $@ $(VENV)/.train

train: $(VENV)/.train
	$(HUGE_PAGES) $(BIN)/python -m train.main $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.run $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@$(PIP) --editable '.[docs]'
	@touch $@

# What a user on a newer Python gets: the newest jax and flax there are, the tests that need no torch.
test-newest:
	@PYTHON_NEWEST="$(PYTHON_NEWEST)" VENV="$(NEWEST_VENV)" sh .ci/test-newest

clean:
	rm -rf $(VENV) $(NEWEST_VENV) build dist
