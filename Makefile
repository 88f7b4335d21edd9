# `make quickstart` and `make test` set up .venv by themselves; PYTHON picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test parity pods lint
.DEFAULT_GOAL := quickstart

quickstart: .venv/ready
	$(BIN)/python main.py --config configs/quickstart.py --workdir runs/quickstart

test: .venv/ready lint
	$(BIN)/python -m pytest -n auto --dist loadfile
	@if [ -e .venv/pods/ready ]; then \
	  echo "once more, with the compiler of TPUs: the files that use it"; \
	  .venv/pods/bin/python -m pytest -n auto --dist loadfile \
	    $$(grep -rl topologies tests --include='test_*.py'); fi

# The peers that tests/siglip/parity compares with; without them those tests skip.
parity: .venv/parity/ready

# The compiler of TPUs, for tests of programs that are compiled but not run; without it those skip.
pods: .venv/pods/ready

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

# Environments that see .venv, which does not see them: nothing of the lock moves or hides.
.venv/parity/ready: requirements-parity.txt
.venv/pods/ready: requirements-tpu.txt
.venv/parity/ready .venv/pods/ready: | .venv/ready
	$(BIN)/python -m venv --clear $(@D)
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(BIN)/python -c "$$packages" > "$$($(@D)/bin/python -c "$$packages")/venv.pth"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
