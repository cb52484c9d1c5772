# make demo: install and run the relay on made-up images. make test: install and check everything. Nothing else is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

# Tests load an export in timm. It asks for torchvision, whose wheels fit one build of torch each: beside another, all that
# imports torchvision where it is there breaks, torchmetrics for one. The part of timm that is tested does not use it.
TIMM := 'timm>=1.0.15,<2'

.PHONY: demo test check fast install bundle clean

demo: $(VENV)/.demo
	$(BIN)/invcoss-server simulate plans/demo.toml

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fast: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

install: $(VENV)/.dev

bundle: $(VENV)/.dev
	$(BIN)/python deploy/bundle/make_bundle.py $(if $(EXTRA),--extra $(EXTRA))

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[simulation]'
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(TIMM)
	touch $@

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .ruff_cache .pytest_cache
