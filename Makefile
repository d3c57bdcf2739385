# Everything here sets up what it needs by itself, in .venv. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
SOAK_MINUTES ?= 30
# Most tests wait for disks and other processes, so there are more workers than a small machine has
# cores. Tests of one group share what is expensive to set up.
TEST_WORKERS ?= 3
PYTEST_ARGS ?=

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help demo test check soak bench clean fuse

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.demo ## the main job on real data: scans and money survive a storm of kills
	@$(BIN)/everpool demo

test: $(VENV)/.test fuse ## every test but the long ones
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadgroup $(PYTEST_ARGS)

check: $(VENV)/.dev ## lint, types, direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python
	@$(BIN)/lint-imports

soak: $(VENV)/.test fuse ## the long tests: thousands of kills; SOAK_MINUTES=30 of them
	@EVERPOOL_SOAK=1 EVERPOOL_SOAK_MINUTES=$(SOAK_MINUTES) $(BIN)/python -m pytest -m soak \
		-o faulthandler_timeout=0 $(PYTEST_ARGS)

bench: $(VENV)/.bench ## speed beside the machine's limits and other stores
	@$(BIN)/everpool bench $(BENCH_ARGS)

clean: ## remove .venv and every cache
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp says that the packages of one list are in; they build on each other.

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Everpool needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) >/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing Debian's python3-venv"; \
			apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null && \
			rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); \
		else \
			echo "$(PYTHON) cannot make a virtual environment: install Debian's python3-venv" >&2; \
			rm -rf $(VENV); exit 1; \
		fi; }
	@touch $@

$(VENV)/.base: $(VENV)/.python requirements/base.txt pyproject.toml
	@echo "installing what everpool needs into $(VENV)"
	@$(PIP) install -r requirements/base.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.demo: $(VENV)/.base requirements/demo.txt requirements/demo-data.txt
	@echo "installing what the demo needs"
	@$(PIP) install -r requirements/demo.txt
	@$(PIP) install --no-deps -r requirements/demo-data.txt
	@touch $@

$(VENV)/.bench: $(VENV)/.base requirements/bench.txt
	@echo "installing what the benchmark needs"
	@$(PIP) install -r requirements/bench.txt
	@touch $@

$(VENV)/.test: $(VENV)/.demo $(VENV)/.bench requirements/test.txt requirements/bucket.txt requirements/lock.txt
	@echo "installing what the tests need"
	@$(PIP) install -r requirements/test.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.test requirements/dev.txt
	@echo "installing what the checks need"
	@$(PIP) install -r requirements/dev.txt
	@touch $@

# The power-loss tests mount a small FUSE file system. Root needs nothing for that but /dev/fuse;
# others need Debian's fuse3.
fuse:
	@if [ ! -e /dev/fuse ]; then \
		echo "The power-loss tests will be skipped: there is no /dev/fuse here." >&2; \
	elif [ "$$(id -u)" != 0 ] && ! command -v fusermount3 >/dev/null; then \
		echo "The power-loss tests will be skipped: they need Debian's fuse3, which takes root:" >&2; \
		echo "    apt-get install fuse3" >&2; \
	fi
