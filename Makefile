# Everything on a fresh machine: Python 3.11 or later with venv, g++ or clang++, make, and a package registry.
#
#   make demo       compile a language model, ask it a question, show what the compiler did and how fast it is
#   make test       lint, and the tests that take minutes
#   make test-slow  the long sweeps;  make test-all: both, and the CPU target under other releases of Triton
#   make test-triton TRITON=3.9.0   the CPU target under another release of Triton, into build/
#   make test-clang the CPU target with clang++, which has to be installed
#   make sanitize   random kernels, and those of the CPU target's tests, under AddressSanitizer and UBSan
#   make bench      effc beside other engines, one table (BENCH="--json --inductor" passes arguments on)
#   make bench-cpu  Triton kernels on the CPU beside PyTorch, native and held to AVX2 (BENCH="--only softmax")
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

TRITON ?= 3.9.0
OTHER_TRITONS = 3.6.0 3.9.0

PIP_OPTIONS = --disable-pip-version-check --quiet -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

# Files of tests share the cores as processes, so threads of kernels must not spin while they wait.
JOBS ?= 2
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

.DEFAULT_GOAL = help
.PHONY: help demo test test-slow test-all test-triton test-clang sanitize lint format bench bench-cpu clean

help:
	@sed -n '3,13s/^# *//p' Makefile

demo: $(INSTALLED)
	@$(BIN)/python -m effc.demo

test: lint
	@echo "== tests (without the slow ones)"
	@$(PYTEST) -m "not slow" --durations=5

test-slow: $(INSTALLED)
	@echo "== slow tests"
	@$(PYTEST) -m slow --durations=5

test-all: lint
	@echo "== all tests"
	@$(PYTEST) --durations=10
	@for version in $(OTHER_TRITONS); do $(MAKE) --no-print-directory test-triton TRITON=$$version || exit 1; done

# Another Triton stands before the installed one on the path; torch stays as it is.
build/triton-%/.installed: | $(INSTALLED)
	@$(BIN)/python -m pip install $(filter-out -c constraints.txt,$(PIP_OPTIONS)) --no-deps --target $(@D) triton==$*
	@touch $@

test-triton: build/triton-$(TRITON)/.installed
	@echo "== the CPU target under Triton $(TRITON)"
	@PYTHONPATH=$(CURDIR)/build/triton-$(TRITON) EFFC_TEST_CACHE_DIR=$(CURDIR)/build/cache-$(TRITON) \
		$(PYTEST) -m "not slow" tests/test_cpu_*.py tests/test_triton_cpu*.py

test-clang: $(INSTALLED)
	@command -v clang++ >/dev/null || { echo "make test-clang needs clang++: install it" >&2; exit 1; }
	@echo "== the CPU target with $$(clang++ --version | head -n 1)"
	@EFFC_CXX=clang++ $(PYTEST) -m "not slow" tests/test_cpu_*.py

# The rest is left out since it launches nothing here, or looks at what a compiler or another process does.
SANITIZED = $(filter-out $(patsubst %,tests/test_cpu_%.py,build compilers fuzz language portable sanitize),\
	$(wildcard tests/test_cpu_*.py))

sanitize: $(INSTALLED)
	@$(PYTEST) tests/test_cpu_sanitize.py
	@echo "== the kernels of the CPU target's tests under AddressSanitizer and UBSan"
	@LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" EFFC_CXX=g++ \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 EFFC_TEST_SANITIZE=1 \
		$(PYTEST) -m "not slow" $(SANITIZED)

lint: $(INSTALLED)
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(INSTALLED)
	@$(BIN)/python bench/decode.py $(BENCH)

bench-cpu: $(INSTALLED)
	@$(BIN)/python bench/cpu_kernels.py --build
	@$(BIN)/python bench/cpu_kernels.py $(BENCH)

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
