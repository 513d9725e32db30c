# Every target does its own set-up: a virtual environment, torch, FFmpeg's libraries where it can, the package.
#
#   make demo                              the main job on sample clips and a tiny model made here
#   make demo DATASET=path MODEL=path      the same on yours
#   make test                              the test suite; make test-slow adds the long tests
#   make check                             formatter, linter, types
#
# TORCH chooses another build of torch, PIP_ARGS adds to pip's command line (an index with builds for the CPU, say).

SHELL := bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Many tests start several processes of their own.
TEST_PROCESSES ?= 2

DATASET ?=
MODEL ?=
DEMO ?= $(if $(DATASET)$(MODEL),demo-own,demo)
DEMO_FLAGS ?= $(if $(MODEL),,--max-height 128 --max-width 224 --num-frames 17)

.PHONY: demo test test-slow check clean

$(READY): pyproject.toml tools/setup.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" PIP_ARGS="$(PIP_ARGS)" tools/setup.sh $(VENV)
	touch $@

demo: $(READY)
	BIN=$(BIN) tools/demo.sh $(DEMO) "$(DATASET)" "$(MODEL)" $(DEMO_FLAGS)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile --durations=25

test-slow: $(READY)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo demo-own
