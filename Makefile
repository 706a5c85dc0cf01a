# `make` alone lists what can be made.

PYTHON ?= python3
BIN := .venv/bin
UV := $(shell command -v uv)
# Both install the versions of uv.lock; pip reads them as constraints.
ifdef UV
INSTALL = uv sync --quiet --frozen --inexact
INSTALL_DEV = $(INSTALL) --extra dev
else
PIP = $(BIN)/python scripts/constraints.py > .venv/constraints.txt && \
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c .venv/constraints.txt
INSTALL = $(PIP) -e .
INSTALL_DEV = $(PIP) -e '.[dev]'
endif
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow check docs
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: .venv/.installed ## Train, measure and export a small sparse model: no GPU, no network after installing
	@$(BIN)/sparsify train quickstart

test: .venv/.installed-dev ## Run the fast tests
	@$(PYTEST) -m "not slow"

test-slow: .venv/.installed-dev ## Run the tests that take minutes
	@$(PYTEST) -m slow

check: .venv/.installed-dev ## Check style, types, words and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/check_words.py

docs: .venv/.installed-dev ## Check that the documentation's links and commands hold
	@$(BIN)/pytest -q tests/test_docs.py

# Stamps, so that nothing is installed again unless pyproject.toml or uv.lock has changed.
.venv/.installed: pyproject.toml uv.lock | .venv/bin/python
	@echo "Installing into .venv; the first time takes a few minutes."
	@$(INSTALL)
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "Installing the tools for tests and checks."
	@$(INSTALL_DEV)
	@touch $@

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "There is no '$(PYTHON)'. Name a Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sparsify needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
		"Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 2; }
