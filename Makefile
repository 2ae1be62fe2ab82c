# Two commands: `make train` and `make test`. Each sets up what it needs first, inside this folder.
# EXTRAS adds optional parts, e.g. `make train EXTRAS=cuda` on a machine with an NVIDIA GPU.
# ARGS reaches the command, e.g. `make train ARGS="--epsilon 1 --data my.csv"`.

.PHONY: help train test slow gpu lint docs wheel newest clean

BIN := .venv/bin
EXTRAS ?=
ARGS ?=
WORKERS ?= 2
export JAX_TRACEBACK_FILTERING ?= auto

help:
	@echo "make train   set up, then train a transformer privately on Reuters R8 (epsilon 3)"
	@echo "make test    set up, then pass the quick test suite"
	@echo "make slow | gpu | lint | docs | wheel | newest    for contributors, see CONTRIBUTING.md"

train:
	@sh scripts/setup.sh data $(EXTRAS)
	@$(BIN)/dpfa train $(ARGS)

test:
	@sh scripts/setup.sh data test $(EXTRAS)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist worksteal $(ARGS)

slow:
	@sh scripts/setup.sh data test $(EXTRAS)
	$(BIN)/python -m pytest -m "slow and not gpu" -n $(WORKERS) --dist worksteal $(ARGS)

gpu:
	@sh scripts/setup.sh data test cuda $(EXTRAS)
	$(BIN)/python -m pytest -m "gpu" $(ARGS)

lint:
	@sh scripts/setup.sh data test lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs:
	@sh scripts/setup.sh data docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

wheel:
	@sh scripts/setup.sh data
	@sh scripts/check_wheel.sh

newest:
	@sh scripts/setup.sh data test
	@sh scripts/check_newest.sh

clean:
	rm -rf .venv .tools build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
