# `make quickstart` and `make test` work on a fresh clone: each makes the virtual
# environment if it is missing.
VENV := .venv
BIN := $(VENV)/bin
# An environment keeps its Python, unless you name another.
PYTHON ?= $(firstword $(wildcard $(BIN)/python3) python3)
VERSION := $(shell $(PYTHON) -c \
  'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED := $(VENV)/installed-$(VERSION)
CONSTRAINTS := constraints/python$(VERSION).txt
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check \
  --constraint $(CONSTRAINTS)
RUN := runs/quickstart

.PHONY: help quickstart test test-slow test-package test-fuzz test-browser \
  test-study test-tpu test-peer docs check format constraints
help:
	@echo "make quickstart   train, score and talk on the embedded corpus (5 min)"
	@echo "make check        lint, types, layers, spelling and security"
	@echo "make test         make check and the fast tests"
	@echo "make test-slow    tests of every system, of kills and of two hosts"
	@echo "make test-package tests of the installed package, notebook and docs"
	@echo "make test-fuzz    hundreds of damaged and hostile inputs"
	@echo "make test-browser tests of the demo's page, in a headless Chromium"
	@echo "make test-study   a study in a browser; installs the extra study"
	@echo "make test-tpu     tests with the TPU compiler, which it installs"
	@echo "make test-peer    PyTorch's version of the steps; installs PyTorch"
	@echo "make docs         build the documentation in site/"
	@echo "make format       format the code"
	@echo "make constraints  pin the newest releases that fit pyproject.toml"
	@echo "PYTHON=python3.12 takes another Python than python3 (3.11 to 3.13)"

$(INSTALLED): pyproject.toml $(wildcard $(CONSTRAINTS))
	@test -f $(CONSTRAINTS) || { echo "Python $(VERSION) is not supported:" \
	  "no $(CONSTRAINTS); try make PYTHON=python3.12" >&2; exit 2; }
	$(BIN)/python$(VERSION) -c '' 2>/dev/null \
	  || $(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) --editable .
	touch $@

$(INSTALLED)-dev: $(INSTALLED)
	$(INSTALL) --editable '.[dev]'
	touch $@

$(INSTALLED)-docs: $(INSTALLED)
	$(INSTALL) --editable '.[docs]'
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/empdg train --config=configs/quickstart.py --workdir=$(RUN)
	$(BIN)/empdg evaluate --workdir=$(RUN) --split=test

check: $(INSTALLED)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/bandit --quiet --severity-level=medium --recursive empdg_jax configs
	$(BIN)/lint-imports
	$(BIN)/pyrefly check
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch constraints/*.sh

test: check
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: $(INSTALLED)-dev
	$(BIN)/pytest -m slow -n 2 --dist loadfile

test-package: $(INSTALLED)-dev $(INSTALLED)-docs
	$(BIN)/pytest -m package

test-fuzz: $(INSTALLED)-dev
	$(BIN)/pytest -m fuzz -n 2

# The browser is Debian's package chromium, or Playwright's own.
test-browser: $(INSTALLED)-dev
	$(BIN)/pytest -m browser

test-study: $(INSTALLED)-dev
	$(INSTALL) --editable '.[study]'
	JAX_PLATFORMS=cpu $(BIN)/pytest -m study

test-tpu: $(INSTALLED)-dev
	$(INSTALL) --editable '.[tpu]'
	JAX_PLATFORMS=cpu $(BIN)/pytest -m tpu

# Keeps a build of PyTorch that is there; by default it takes the newest.
test-peer: $(INSTALLED)-dev
	$(INSTALL) --editable '.[peer]'
	JAX_PLATFORMS=cpu $(BIN)/pytest -m peer

docs: $(INSTALLED)-docs
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -q -W --keep-going \
	  -d build/doctrees docs site

format: $(INSTALLED)-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	constraints/compile.sh $(BIN)
