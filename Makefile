# core4-jobs: everything a person or a machine does with a checkout. `make` alone lists it.
# Needs python3 (3.11 or newer) with its venv module, and nothing else.

VENV ?= .venv
PYTHON ?=
BIN = $(VENV)/bin
RUN = $(BIN)/python
REPORT = reports/rows.json
# More words for pytest: make test ARGS="tests/unit -k cron"
ARGS ?=
# As many at a time as there are cores: three on two took longer than two.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 2 ? 2 : n > 8 ? 8 : n)))

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1
# Hundreds of processes are started here: none of them shall compile the modules again.
unexport PYTHONDONTWRITEBYTECODE

# A seed that an earlier run has printed: make chaos SEED=7
SEED ?=
# Not empty: RQ, Celery and Procrastinate are measured, too, in an environment of their own.
PEERS ?=
CHAOS = $(RUN) -m tests.chaos.run --json reports/chaos.jsonl $(if $(SEED),--seed $(SEED))

.PHONY: help demo up test seed crowd check format docs rows bench chaos chaos-long planted build clean
.DELETE_ON_ERROR:

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.embedded  ## install, start everything, follow a real job in this terminal, stop again
	@$(RUN) -m core4 demo

up: $(VENV)/.embedded  ## run database, API and worker on http://localhost:5001 until Ctrl-C
	@exec $(RUN) -m core4 up

test: $(VENV)/.test  ## install what the tests need and run all of them
	$(RUN) -m pytest --numprocesses $(WORKERS) --dist worksteal --rows-report $(REPORT) $(ARGS)

seed: $(VENV)/.test  ## the job API document with the minutes of sleep that it says
	CORE4_TEST_SEED_FULL=1 $(RUN) -m pytest tests/acceptance/test_seed.py -k verbatim $(ARGS)

crowd: $(VENV)/.test  ## 1,000 functions of four clients, and pools of ten workers (minutes)
	CORE4_TEST_FUNCTIONS=1000 CORE4_TEST_POOL=10 $(RUN) -m pytest tests/integration/test_functions.py \
	  tests/integration/test_function_pools.py tests/integration/test_pool.py -k "many_from_many or pool" $(ARGS)

check: $(VENV)/.dev  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## lay out the code and mend what can be mended mechanically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs  ## build docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -q -n -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

rows: $(VENV)/.test  ## which rows of the acceptance list the last `make test` has covered
	@$(RUN) -m tests.rows $(REPORT)

bench: $(VENV)/.test  ## measure against bare loops in the same run; PEERS=1: and other job systems; reports/bench.json
	$(RUN) -m tests.bench $(if $(PEERS),--peers) --json reports/bench.json

chaos: $(VENV)/.test  ## 2,000 jobs while processes die and the network fails: nothing lost (minutes)
	@mkdir -p reports
	$(CHAOS) --jobs 2000

chaos-long: $(VENV)/.test  ## the same with 20,000 jobs (most of an hour)
	@mkdir -p reports
	$(CHAOS) --jobs 20000

planted: $(VENV)/.test  ## plant one fault after the other in the engine: does the judge find each?
	$(RUN) -m tests.chaos.planted

build: $(VENV)/.dev  ## sdist and wheel, the wheel made from the sdist
	$(RUN) -m build --outdir dist .

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist reports docs/_build docs/generated *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# One stamp per extra: the second time nothing is installed, until pyproject.toml changes.
$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	@echo "installing core4-jobs[$*] into $(VENV) (a minute, the first time)"
	@$(RUN) -m pip install --quiet --editable '.[$*]'
	@touch $@

$(VENV)/bin/python:
	@set -e; for each in "$(PYTHON)" python3 python3.14 python3.13 python3.12 python3.11; do \
	  command -v "$$each" >/dev/null 2>&1 || continue; \
	  "$$each" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  if ! "$$each" -c 'import ensurepip, venv' 2>/dev/null; then unusable="$$each"; continue; fi; \
	  echo "creating $(VENV) with $$("$$each" --version)"; \
	  "$$each" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
	  exit 0; \
	done; \
	if [ -n "$$unusable" ]; then \
	  echo "$$unusable has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv) and try again" >&2; \
	else \
	  found=$$(python3 --version 2>/dev/null || echo "none"); \
	  echo "core4-jobs needs Python 3.11 or newer; found: $$found. Install one, or name it: make demo PYTHON=/path/to/python3" >&2; \
	fi; \
	exit 1
