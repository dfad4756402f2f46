# make demo   create .venv, install, generate text with the model in the repository
# make test   the whole test suite
# make lint   ruff and mypy
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TREE := build/tree/hybrid_moe
MODEL := examples/tiny_moe/model
PROMPT ?= Emma was surprised to see Mr. Knightley in the garden, and

.PHONY: demo test lint format install install-dev wheel bench bench-load bench-peers clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The constraints file pins versions that are known to work together.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e ".[transformers]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e ".[transformers,dev]"
	touch $@

demo: install
	$(BIN)/hybrid-moe generate --model $(MODEL) --prompt "$(PROMPT)" --max-new-tokens 120 --temperature 0.7 --seed 2

test: install-dev
	$(BIN)/python -m pytest

# Type checkers see neither package-dir nor import hooks: give them the package as one tree.
$(TREE): pyproject.toml
	rm -rf build/tree && mkdir -p $(TREE)
	ln -s $(CURDIR)/hybrid_moe/* $(TREE)/
	ln -s $(CURDIR)/cpu_kernels $(CURDIR)/gpu_kernels $(CURDIR)/loaders $(TREE)/

lint: install-dev
	rm -rf build/tree && $(MAKE) --no-print-directory $(TREE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build && MYPYPATH=$(CURDIR)/build/tree $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p hybrid_moe

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: install-dev
	rm -rf dist && $(BIN)/python -m build --wheel

bench: install
	$(BIN)/python bench/moe_layer.py

bench-load: install
	$(BIN)/python bench/load.py

# KT_PYTHON: a Python that has kt-kernel. GGML_LIB: a folder with libggml-base.so and libggml-cpu.so.
bench-peers: install
	$(BIN)/python bench/peers.py $(if $(KT_PYTHON),--kt-python $(KT_PYTHON)) $(if $(GGML_LIB),--ggml-lib $(GGML_LIB))

clean:
	rm -rf $(VENV) build dist *.egg-info
