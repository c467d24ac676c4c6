# Each target creates or refreshes .venv by itself; its progress goes to stderr, so that `make run` can be piped.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
# One thread for each worker: more threads than cores wait for one another at every matrix product. Three workers for
# two cores, as a third of the tests' time is waiting for other processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$($(BIN)/python -c 'import os; print(os.cpu_count() * 3 // 2)') --dist loadfile --no-loadscope-reorder --durations=25
.PHONY: help run serve unit test drill lint bench lock docs clean
.SILENT:
.DEFAULT_GOAL := run

help:                   ## list the targets
	sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

$(STAMP): pyproject.toml constraints.txt deploy/make_venv.py
	command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: Python 3.11 or newer is needed" >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) deploy/make_venv.py $(VENV) && touch $(STAMP)

run: $(STAMP)           ## chat in the terminal; ARGS="--home DIR"
	exec $(BIN)/distributary chat $(ARGS)

serve: $(STAMP)         ## run the configured bots; ARGS="--config FILE"
	exec $(BIN)/distributary serve $(ARGS)

lint: $(STAMP)          ## format check, ruff, mypy
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

unit: $(STAMP)          ## tests without processes and without the demo model, under 90 s
	$(PYTEST) -m 'not gpu and not drill and not slow' $(ARGS)

test: lint              ## lint and every test but drills
	$(PYTEST) -m 'not gpu and not drill' $(ARGS)

drill: $(STAMP)         ## long kill and chaos runs, hours
	$(BIN)/python -m pytest -m drill --timeout=14400 --durations=25 $(ARGS)

bench: $(STAMP)         ## benchmarks
	$(BIN)/python -m tests.bench.ready $(ARGS)
	$(BIN)/python -m tests.bench.telegram $(ARGS)
	$(BIN)/python -m tests.bench.slack $(ARGS)
	$(BIN)/python -m tests.bench.serving $(SERVING)

docs: $(STAMP)          ## write the generated tables of deploy/docs anew
	$(BIN)/python -m tests.test_docs

# torch is left out: its build depends on the machine (CPU, CUDA version), and so does its hash.
LOCK := $(VENV)/lock
lock: $(STAMP)          ## write requirements.lock: constraints.txt with the hashes of every file
	$(PYTHON) -m venv $(LOCK) && $(LOCK)/bin/python -m pip install -q --disable-pip-version-check 'pip-tools>=7.5,<8'
	echo "Asking for the hashes of every file, about 2 min ..." >&2
	$(LOCK)/bin/pip-compile -q --generate-hashes --all-extras --strip-extras --allow-unsafe --unsafe-package torch \
	  --no-header --no-annotate --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
	  -c constraints.txt -o $(LOCK)/compiled pyproject.toml
	{ sed -n '/^# Install/,/^$$/p' requirements.lock; sed '/^# The following packages/,$$d' $(LOCK)/compiled; } > $(LOCK)/new
	! grep -n '://' $(LOCK)/new && mv $(LOCK)/new requirements.lock

clean:                  ## remove .venv
	rm -rf $(VENV)
