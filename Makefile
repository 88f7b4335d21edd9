# `make quickstart` and `make test` set up .venv by themselves; PYTHON picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint
.DEFAULT_GOAL := quickstart

quickstart: .venv/ready
	$(BIN)/python main.py --config configs/quickstart.py --workdir runs/quickstart

test: .venv/ready lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Anew whenever the lock changes. Compiled bytecode halves every later import.
.venv/ready: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
	@touch $@
