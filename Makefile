# `make quickstart` and `make test` work on a fresh clone: each makes the virtual
# environment if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: help quickstart test test-slow test-package test-fuzz test-study test-tpu docs check format
help:
	@echo "make quickstart   train, score and talk on the embedded corpus (5 min)"
	@echo "make test         lint, types, layers, spelling and the fast tests"
	@echo "make test-slow    tests of every system, of kills and of two hosts"
	@echo "make test-package tests of the installed package, notebook and docs"
	@echo "make test-fuzz    hundreds of damaged and hostile inputs"
	@echo "make test-study   a study in a browser; installs the extra study"
	@echo "make test-tpu     tests with the TPU compiler, which it installs"
	@echo "make docs         build the documentation in site/"
	@echo "make format       format the code"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[docs]'
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/empdg train --config=configs/quickstart.py --workdir=$(RUN)
	$(BIN)/empdg evaluate --workdir=$(RUN) --split=test

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/pyrefly check
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch

test: check
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: $(VENV)/installed-dev
	$(BIN)/pytest -m slow -n 2 --dist loadfile

test-package: $(VENV)/installed-dev $(VENV)/installed-docs
	$(BIN)/pytest -m package

test-fuzz: $(VENV)/installed-dev
	$(BIN)/pytest -m fuzz -n 2

# The browser is Debian's package chromium, or Playwright's own.
test-study: $(VENV)/installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[study]' playwright
	JAX_PLATFORMS=cpu $(BIN)/pytest -m study

test-tpu: $(VENV)/installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[tpu]'
	JAX_PLATFORMS=cpu $(BIN)/pytest -m tpu

docs: $(VENV)/installed-docs
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -q -W --keep-going \
	  -d build/doctrees docs site

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
