# make demo   set up, train a small RCMHA language model with DeepSpeed, serve it on Ray Serve, print what was measured
# make test   set up, run the whole suite
# make help   everything else

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PORT ?= 8000
CHECKPOINT ?= runs/demo/export
TEXT ?= stdlib
# Tests share cores, one thread each, in one process more than there are cores (tests/conftest.py); contiguous shares keep
# what a file's tests share in one process. They start many
# processes, which would compile the project again and again where bytecode may not be written.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

.PHONY: help install demo train compare serve quick test coverage slow check docs release format clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml scripts/install.sh
	@scripts/install.sh $(VENV) $(PYTHON)

install: $(VENV)/.installed  ## create .venv and install the project

demo: install  ## train on 2 ranks, serve, complete; summary in runs/demo/summary.json (under 10 minutes)
	$(BIN)/python -m scripts.demo

train: install  ## a longer run of the same model (some 15 minutes), against the n-gram models
	$(BIN)/python -m scripts.demo --train-only --config long.yaml --run-dir runs/long

compare: install  ## train the variants side by side on the characters of TEXT (some 70 minutes on two cores)
	$(BIN)/python -m attnzoo compare text=$(TEXT) --json runs/compare/report.json --figures runs/compare

serve: install  ## serve CHECKPOINT (default: the demo's) on PORT until interrupted; MODEL=smollm2: a chat model
	$(BIN)/python -m attnzoo serve $(if $(MODEL),--config configs/serve/$(MODEL).yaml,--checkpoint $(CHECKPOINT)) --port $(PORT)

quick: install  ## a sample of the suite, without DeepSpeed and Ray (under 90 seconds on two cores)
	$(PYTEST) --quick -q

test: install  ## the whole suite but the slow ones; prints the 20 slowest
	$(PYTEST) --durations=20

coverage: install  ## the lines that the quick suite runs, per package; no thresholds
	$(PYTEST) --quick -q --no-header --cov --cov-report=json:.cache/coverage.json
	$(BIN)/python -m scripts.coverage_table .cache/coverage.json

slow: install  ## the slow suites: all ZeRO stages, soak
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

check: install  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install  ## the documentation site, in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site is in $(CURDIR)/site: open site/index.html in a browser"

release: check docs test  ## build sources and wheel into dist/, check version and changelog; TAG=--tag dates and tags
	$(BIN)/python -m scripts.release $(TAG)

format: install  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove runs, caches and the virtual environment
	rm -rf runs .cache site $(VENV)
