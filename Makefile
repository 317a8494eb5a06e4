# The doors of the project. Everything runs inside .venv, which is made on first use.
PYTHON ?= python3
BIN := .venv/bin
# uv installs: the one on the PATH, or one that pip puts into the environment.
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo $(BIN)/uv)
# The versions that CI saw. The ranges in pyproject.toml are for users.
INSTALL := $(UV) pip install --python $(BIN)/python --constraint constraints.txt

.PHONY: .venv demo test test-all check docs bench chaos lock clean

.venv: .venv/.dev

$(BIN)/python:
	@echo "make: a Python environment in .venv"
	$(PYTHON) -m venv .venv

$(BIN)/uv: | $(BIN)/python
	@echo "make: no uv on the PATH; pip fetches it"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

# Two stamps: what the demo needs, and everything.
.venv/.demo: pyproject.toml constraints.txt | $(BIN)/python $(filter $(BIN)/uv,$(UV))
	@echo "make: installing what the demo needs; on Linux PyTorch is 3 GB, since it brings CUDA"
	$(INSTALL) --editable '.[demo]'
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | $(BIN)/python $(filter $(BIN)/uv,$(UV))
	@echo "make: installing what the tests need"
	$(INSTALL) --editable '.[dev]'
	@touch .venv/.demo $@

demo: .venv/.demo
	$(BIN)/python -m fedsplit demo $(ARGS)

# Without bytecode each of the many processes compiles PyTorch and Flower anew; some images ask for that.
demo test test-all: export PYTHONDONTWRITEBYTECODE =

# The quick ones. A worker that has no more tests takes some of the other one's.
test: .venv/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: .venv/.dev
	FEDSPLIT_TESTS=all $(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site of docs/, in docs/_build/html; a warning is an error.
docs: .venv/.dev
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

# Measures and prints a table, with the JSON in benchmarks/results/; half an hour. ARGS="--quick round merge" for less.
bench: .venv/.dev
	$(BIN)/python -m benchmarks $(ARGS)

# Three hundred faults over all five programs, SIGKILL and SIGSTOP; takes about a quarter of an hour on two cores.
chaos: .venv/.dev
	$(BIN)/python -m tests.chaos --faults 300

# Renews constraints.txt: the newest version of everything, for every Python that is supported.
lock: | $(BIN)/python $(filter $(BIN)/uv,$(UV))
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras --no-annotate --no-header \
		--no-emit-find-links --no-emit-index-url --output-file constraints.txt pyproject.toml

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
