# make run    the main job: a federated run over four websocket workers (all set-up included)
# make test   the whole test suite and the static checks
# make check  the static checks and a part of the suite, in about two minutes: for daily use
# make bench  the speed claims, measured
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROUNDS ?=
# Two processes, each with whole files: tests of one file may share ports. In the order of tests/conftest.py.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: run test check bench lint clean

# What breaks first: the table of ops, recording, the border of states, rounds and pointers on both transports.
CHECKED := tests/test_architecture.py tests/serde tests/plans/test_graph.py tests/plans/test_guards.py \
	tests/plans/test_tracer.py tests/workers/test_state.py tests/workers/test_behaviour.py \
	tests/pointers/test_names.py tests/fl/test_errors.py tests/docs

run: $(VENV)/.installed
	$(BIN)/python -m planrt.fl.mnist_async $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

check: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest $(PARALLEL) $(CHECKED) $(ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "planrt needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	@echo "Installing planrt and PyTorch into $(VENV) (a few GB, some minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[run]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	@echo "Installing planrt, PyTorch and the test tools into $(VENV) (a few GB, some minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed
