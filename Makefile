# Every target makes what it needs; `make quickstart` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart test check format bench docs resolve release clean

help:  ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# llama.cpp is compiled for this machine's CPU first, so that pip does not do it in its own way.
$(VENV)/.gguf: pyproject.toml constraints.txt scripts/build_llama.py scripts/llama_core.cmake | $(BIN)/python
	$(PIP) install --quiet cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/build_llama.py
	@echo "installing torch, transformers and the rest: one to three minutes"
	$(PIP) install --quiet --constraint constraints.txt --editable '.[gguf]'
	@touch $@

$(VENV)/.dev: $(VENV)/.gguf
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --quiet --constraint constraints.txt --editable '.[awq,coreml,gguf,fp8,int8,segquant,smoothquant,dev]'
	@touch $@

quickstart: $(VENV)/.gguf  ## quantize a small model to GGUF and let it speak
	$(BIN)/qwodel quickstart

test: $(VENV)/.dev  ## run the tests
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

check: $(VENV)/.dev  ## lint, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python scripts/module_tree.py

bench: $(VENV)/.dev  ## run the benchmarks, one table each
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: $(VENV)/.dev  ## build the manual into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

resolve: | $(BIN)/python  ## do all extras resolve on every Python and system? (some minutes)
	$(PIP) install --quiet 'uv>=0.9,<1'
	$(BIN)/python scripts/resolve.py

release: check docs resolve test  ## everything that must hold before a release

clean:  ## remove what the targets made (not the cache)
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
