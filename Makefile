# Rootstock's commands; `make help` lists them. A target that needs the environment makes it first.

# The first of these that is Python 3.11 or newer; override with `make PYTHON=…`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo serve check lint fast test soak hostile kill-jobs bench bench-quick bench-drift lock fmt examples monitoring clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv with every pinned package and the `rootstock` command

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Rootstock needs Python 3.11 or newer: make PYTHON=/path/to/python3 install"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: install  ## the whole story in four minutes: three tenants, three adapters, one base
	$(BIN)/python -m tools.demo

serve: install  ## leave the service running on the bundled base (API on 8000, metrics on 9400)
	$(BIN)/rootstock serve

check: install  ## what a commit must pass, in two minutes: linters, types, import contract, fast tests
	@$(MAKE) --no-print-directory -j 2 lint fast

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

fast: install
	$(BIN)/pytest -m "not slow" -n 2 --dist worksteal

test: lint  ## everything: linters, types, import contract and all tests
	$(BIN)/pytest -n 2 --dist loadfile

soak: install  ## twenty minutes of everything at once, with kills: nothing lost, wrong, leaked or growing
	$(BIN)/python -m tools.soak --minutes 20

hostile: install  ## thousands of generated requests, in all phases; then how many hostile cases there are
	$(BIN)/python -m tests.hostile.generated --examples 100
	$(BIN)/python -m tests.hostile.count

bench: install  ## the full benchmark, as ratios, into bench/results/
	$(BIN)/python -m bench

bench-quick: install  ## the same benchmark with small sizes, to see that it runs
	$(BIN)/python -m bench --quick

bench-drift: install  ## how long drift tests run, how soon they find a shift: make bench-drift DATA=DIR
	@test -n "$(DATA)" || { echo "make bench-drift DATA=DIR: the folder with tasks/, drift/ and corpora/"; exit 1; }
	$(BIN)/python -m bench.drift --data $(DATA)

kill-jobs: install  ## kill -9 real services 200 times while they train, and look whether anything is lost: half an hour
	$(BIN)/python -m tools.kill_jobs --kills 200 --seed $(or $(SEED),1)

lock: install  ## pin again after pyproject.toml changed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev,postgres,s3]'
	$(BIN)/python tools/lock.py
	@touch $(STAMP)

fmt: install  ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

examples: install  ## make examples/*/*.jsonl again
	$(BIN)/python -m examples.make_examples

monitoring: install  ## write k8s/monitoring's rules and dashboards again, from tools/monitoring/
	$(BIN)/python -m tools.monitoring

clean:  ## remove caches and builds; the environment and the data stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
