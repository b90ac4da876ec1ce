# make demo    train a small model on this machine and see what changed (README)
# make test    the tests
# make check   lint and format, types, import rules, docs; make -k check goes on after the first that fails
# make docs    the documentation as pages in site/
# make clean   remove the environment, caches and what was built
#
# Only Python 3.11 and make are needed. Everything is installed into .venv, once, and again when pyproject.toml or
# constraints.txt change. Without a GPU, a smaller torch: make demo PIP_FLAGS="--extra-index-url
# https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2
DEMO_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
SOURCES := pyproject.toml constraints.txt

# After the installation nothing is fetched from anywhere.
export HF_HUB_OFFLINE := 1
export NO_MKDOCS_2_WARNING := 1

.DELETE_ON_ERROR:
.PHONY: demo test check lint types imports pages docs clean

demo: $(VENV)/.installed
	$(BIN)/tropism demo $(DEMO_FLAGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

check: lint types imports pages

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

pages: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict --quiet

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find tropism tests recipes -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 found; install Python 3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; give another: make PYTHON=/path/to/python3.11"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# torch comes first and alone, so that no other package has a say in which one it is.
$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/python
	@echo "installing into $(VENV); this happens once, and torch is the large part"
	$(PIP) torch
	$(PIP) --quiet -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --quiet -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(PIP) --quiet -e '.[dev,docs]'
	@touch $@
