# Everything runs in .venv, which `make setup` makes; PYTHON=... chooses the Python for it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-ranks test-slow test-gpu gpu-quick torture lint format bench race race-groups race-hybrid race-ref wheel freeze

help:  ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(STAMP)  ## make .venv and install everything, at the versions that constraints.txt pins

# DeepSpeed is built from source, and its build needs torch. So torch is installed first, and the
# build is not isolated. With DS_BUILD_OPS=0, DeepSpeed compiles its ops later, when a run uses them.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dpofast needs Python 3.11 or later: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into .venv (one or two minutes)"
	$(PYTHON) -m venv .venv
	$(PIP) setuptools wheel torch numpy
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation --editable '.[dev,peft,bitsandbytes,bench]'
	@touch $@

demo: setup  ## train a small model by DPO on generated pairs and see that it learnt (minutes)
	$(BIN)/dpofast demo

# ARGS goes to pytest: a part of the tests, as in ARGS=tests/data, or ARGS="-n 0 --stepwise", which
# goes on where an earlier run failed.
#
# The tests are small, so two of them run at a time, each on one thread. A fixture that takes long is
# made once for a file, so the slow tests of a file stay together.
TWO_WORKERS := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -q -n 2

# If no GPU is visible, Triton interprets its kernels on CPU tensors; otherwise it compiles them.
# One process can't do both, so the tests on CPU tensors hide the GPU.
test: setup  ## the tests to run at every change (under 5 minutes on 2 cores)
	$(TWO_WORKERS) -m 'not slow and not distributed and not torture and not gpu' $(ARGS)

test-ranks: setup  ## the tests that train on several ranks or try the launchers
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -q --durations=25 -m 'distributed and not torture and not gpu' $(ARGS)

test-slow: setup  ## the slow tests, among them the step by step comparison with TRL
	$(TWO_WORKERS) --durations=25 --dist loadfile -m 'slow and not distributed and not torture and not gpu' $(ARGS)

test-gpu: setup  ## the tests that need a GPU, with compiled kernels
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

gpu-quick: setup  ## measure what matters most on a GPU, in ten minutes; writes runs/bench/gpu
	$(BIN)/python -m benchmarks.gpu --quick

torture: setup  ## kill builds and corrupt files many times over; full counts of the slow tests
	$(BIN)/python -m pytest -q -m torture $(ARGS)

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## fix the style of the code, as far as ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## race the head and its loss against plain PyTorch and other libraries (minutes)
	$(BIN)/python -m benchmarks.head --json runs/bench/head.json

race: setup  ## race whole training steps against TRL and plain PyTorch, on this machine (15 minutes)
	$(BIN)/python -m benchmarks.train --json runs/bench/train.json

race-groups: setup  ## race steps on prompts with four answers, all six pairs of each (25 minutes)
	$(BIN)/python -m benchmarks.train --answers 4 --json runs/bench/train-groups.json

race-hybrid: setup  ## race steps of a small hybrid, in shared rows and padded, on this machine (10 minutes)
	$(BIN)/python -m benchmarks.train --device cpu --shape hybrid --json runs/bench/train-hybrid.json

race-ref: setup  ## race the scoring of the reference against TRL's, on this machine (15 minutes)
	$(BIN)/python -m benchmarks.reference --json runs/bench/reference.json

wheel: setup  ## build the wheel into dist/
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

freeze: setup  ## write the installed versions to constraints.txt
	@head -1 constraints.txt > .venv/constraints.txt
	@$(BIN)/python -m pip --disable-pip-version-check freeze --all --exclude-editable --exclude pip \
	  | sed 's/+cpu$$//' | LC_ALL=C sort -f >> .venv/constraints.txt
	@mv .venv/constraints.txt constraints.txt
