# The doors of the project. Everything runs inside .venv, which is made on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs bench chaos clean

.venv: .venv/.stamp

.venv/.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/.stamp
	$(BIN)/python -m fedsplit demo

test: .venv/.stamp
	$(BIN)/python -m pytest

check: .venv/.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# The site of docs/, in docs/_build/html; a warning is an error.
docs: .venv/.stamp
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

# Measures and prints a table, with the JSON in benchmarks/results/; half an hour. ARGS="--quick round merge" for less.
bench: .venv/.stamp
	$(BIN)/python -m benchmarks $(ARGS)

# A hundred SIGKILLs over all five programs; takes about ten minutes on two cores.
chaos: .venv/.stamp
	$(BIN)/python -m tests.chaos --kills 100

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
