# `make install` sets everything up; every other target but `gpu` calls it first, and repeated calls
# are quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2

DEPENDENCIES := $(VENV)/.dependencies
PACKAGE := $(VENV)/.package
EXTENSION := $(VENV)/.extension
CXX_FILES = $(wildcard csrc/*.[ch]* csrc/*/*.[ch]* csrc/*/*/*.[ch]*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint format bench bench-quick bench-report sanitize triton-report gpu lock clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(EXTENSION) ## Make .venv with pinned versions and the compiled extension.

demo: install ## Train CIN and its plain backbone on the built-in images (under 5 minutes on 2 cores).
	$(BIN)/python -m cin_fast.demo

# Two processes share the cores: threads that wait for each other must not keep them busy.
test: install ## Run every test this machine can run, and say why the others cannot.
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile \
	    --no-loadscope-reorder $(PYTEST_ARGS)

lint: install ## Check style, types and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: install ## Rewrite the code in the project's style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: install ## Measure every backend beside its rivals on this machine (10 minutes on 2 cores).
	@mkdir -p .benchmarks
	$(BIN)/python -m pytest -q bench --benchmark-only --benchmark-json=.benchmarks/bench.json $(PYTEST_ARGS)

bench-quick: install ## The same at small shapes (2 minutes).
	@mkdir -p .benchmarks
	CIN_FAST_BENCH_QUICK=1 $(BIN)/python -m pytest -q bench --benchmark-only \
	    --benchmark-json=.benchmarks/quick.json $(PYTEST_ARGS)

bench-report: install ## Tables and plots of the last `make bench`, and the README's section.
	$(BIN)/python bench/report.py .benchmarks/bench.json --readme

sanitize: install ## Run the C++ kernels under the address and undefined-behaviour sanitizers.
	bash tests/sanitize.sh

triton-report: install ## Compile the Triton kernels for sm_80 and sm_90: registers, spills, shared memory.
	$(BIN)/python -m cin_fast.kernels.report

gpu: ## On a machine with a GPU: kernel tests and benchmarks, with no more than its own torch.
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu.py

lock: install ## Pin the newest versions of everything again, in requirements.lock.
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/lock.sh

clean: ## Remove what was built (.venv stays: rm -r .venv).
	rm -rf build dist *.egg-info cin_fast/*.so cin_fast/_build.json $(PACKAGE) $(EXTENSION)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find cin_fast kernels tests bench -name __pycache__ -prune -exec rm -rf {} +

# pip unpacks gigabytes into TMPDIR, which may be a small memory disk: use the checkout's own.
$(DEPENDENCIES): requirements.lock
	@sh scripts/preflight.sh $(PYTHON) $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing what requirements.lock names (PyTorch with CUDA: about 3 GB to download) ..."
	@mkdir -p $(VENV)/tmp
	@TMPDIR=$(CURDIR)/$(VENV)/tmp $(BIN)/python -m pip install --quiet --no-deps \
	    --disable-pip-version-check --requirement requirements.lock
	@rm -rf $(VENV)/tmp
	@touch $@

$(PACKAGE): $(DEPENDENCIES) pyproject.toml
	@CIN_FAST_BUILD=0 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation \
	    --disable-pip-version-check --editable .
	@touch $@

$(EXTENSION): $(PACKAGE) setup.py cin_fast/schemas.py $(CXX_FILES)
	@sh scripts/preflight.sh $(PYTHON) $(VENV)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
