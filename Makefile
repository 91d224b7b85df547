# Every target makes what it needs; `make quickstart` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart test check format bench docs clean

help:  ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# llama-cpp-python compiles libllama here: some minutes, once.
$(VENV)/.gguf: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --quiet --constraint constraints.txt --editable '.[gguf]'
	@touch $@

$(VENV)/.dev: $(VENV)/.gguf
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --quiet --constraint constraints.txt --editable '.[awq,coreml,gguf,fp8,int8,segquant,smoothquant,dev]'
	@touch $@

quickstart: $(VENV)/.gguf  ## quantize a small model to GGUF and let it speak
	$(BIN)/qwodel quickstart

test: $(VENV)/.dev  ## run the tests
	$(BIN)/python -m pytest

check: $(VENV)/.dev  ## lint, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## run the benchmarks, one table each
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: $(VENV)/.dev  ## build the manual into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove what the targets made (not the cache)
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
