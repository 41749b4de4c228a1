# Everything on a fresh machine: Python 3.11 or later with venv, g++ or clang++, make, and a package registry.
#
#   make demo       compile a language model, ask it a question, show what the compiler did and how fast it is
#   make test       lint, and the tests that take minutes
#   make test-slow  the long sweeps;  make test-all: both
#   make bench      effc beside other engines, one table (BENCH="--json --inductor" passes arguments on)
#   make lint       ruff, which also formats with `make format`
#   make clean      remove what make made here
#
# The first run makes a virtual environment in .venv and installs effc into it. pip takes torch from the registry that
# it is configured for; where that holds only CUDA builds, TORCH_INDEX=URL names one more index to look at, such as
# that of PyTorch's CPU wheels (hundreds of megabytes instead of gigabytes).

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BENCH ?=

PIP_OPTIONS = --disable-pip-version-check --quiet -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.DEFAULT_GOAL = help
.PHONY: help demo test test-slow test-all lint format bench clean

help:
	@sed -n '3,8s/^# *//p' Makefile

demo: $(INSTALLED)
	@$(BIN)/python -m effc.demo

test: lint
	@echo "== tests (without the slow ones)"
	@$(BIN)/python -m pytest -q -m "not slow" --durations=5

test-slow: $(INSTALLED)
	@echo "== slow tests"
	@$(BIN)/python -m pytest -q -m slow --durations=5

test-all: lint
	@echo "== all tests"
	@$(BIN)/python -m pytest -q --durations=10

lint: $(INSTALLED)
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(INSTALLED)
	@$(BIN)/python bench/decode.py $(BENCH)

clean:
	rm -rf $(VENV) build dist effc.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "effc needs Python 3.11 or later with venv, found $$($(PYTHON) -V 2>&1): set PYTHON=..." >&2; exit 1; }
	@test -n "$$EFFC_CXX$$CXX" || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		{ echo "effc needs a C++ compiler: install g++ or clang++, or set CXX" >&2; exit 1; }
	@echo "== virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "== install effc with what it needs (torch is the largest: minutes on a slow network)"
	@$(BIN)/python -m pip install $(PIP_OPTIONS) -e ".[test]"
	@touch $@
