# Two commands do all the set-up and the work: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-slow lint format clean

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

test: $(STAMP) lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2

# about 11 minutes beside other jobs on 2 cores
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" -n 2

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf .venv demo-output .pytest_cache .mypy_cache .ruff_cache
