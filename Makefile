# make demo   create .venv, install, generate text with the model in the repository
# make demo GPU_EXPERTS=25%   the same with a quarter of the experts hot, on a GPU if there is one
# make test   the whole test suite
# make test-full   the same, with more models and with hundreds of requests to a server
# make fuzz   random checkpoints and random wrappers, for hours
# make test-tiers   kernels, layers and wrappers as on machines of other tiers
# make test-lowest  the lowest versions that pyproject.toml declares
# make lint   ruff and mypy
# make wheel  source distribution, and the wheel made from it
# make test-sglang   SGLang in an environment of its own (2.8 GB), then real layers and servers
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TREE := build/tree/hybrid_moe
MODEL := examples/tiny_moe/model
PROMPT ?= Emma was surprised to see Mr. Knightley in the garden, and
# options of the demo
HOT = $(if $(GPU_EXPERTS), --gpu-experts $(GPU_EXPERTS))$(if $(GPU_BACKEND), --gpu-backend $(GPU_BACKEND))

.PHONY: demo test test-full fuzz test-tiers test-lowest sglang test-sglang test-sglang-classes lint format install
.PHONY: install-dev wheel bench bench-big bench-ceilings bench-dense bench-end-to-end bench-load bench-peers
.PHONY: bench-formats bench-peers-install bench-pool bench-quick bench-results clean gpu-check

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The constraints file pins versions that are known to work together; __init__ has our own.
$(VENV)/.installed: pyproject.toml constraints.txt hybrid_moe/__init__.py | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e ".[transformers]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e ".[transformers,dev,gpu]"
	touch $@

demo:
	@test -e $(VENV)/.installed || echo "installing PyTorch, Transformers and hybrid_moe into $(VENV): minutes, once"
	@$(MAKE) --no-print-directory install
	$(BIN)/hybrid-moe generate --model $(MODEL) --prompt "$(PROMPT)" --max-new-tokens 120 --temperature 0.7 --seed 2$(HOT)
	@echo 'talk to it: $(BIN)/hybrid-moe chat --model $(MODEL) --temperature 0.7'

# a process for each core: few tests have work for two
PYTEST = $(BIN)/python -m pytest -n auto

test: install-dev
	$(PYTEST)

test-full: install-dev
	HYBRID_MOE_TEST_FULL=1 $(PYTEST)

# For hours, until something is wrong or Ctrl-C: both fuzzers of tests/fuzz in turn, with other inputs
# each time unless SEED is given.
FUZZ_INPUTS ?= 100000
FUZZ_CALLS ?= 10000
SEED ?= $(shell date +%s)
fuzz: install-dev
	$(BIN)/python -m tests.fuzz --inputs $(FUZZ_INPUTS) --calls $(FUZZ_CALLS) --seed $(SEED)

# Tests whose truth may depend on the processor's tier. Each runs once for every other tier that this
# processor can run, and for the kinds of tier that it lacks with their instructions emulated
# (tests/isa.py); `make test` has run them for its own.
TIER_TESTS := $(addprefix tests/cpu_kernels/,dsl/test_tiers.py kernels/test_kernels.py test_layer.py \
	kernels/test_coverage.py test_invariance.py test_dense.py test_attention_job.py pool/test_pool.py \
	streams/test_graph_job.py ceilings) \
	$(addprefix tests/hybrid_moe/,test_wrapper_forward.py test_wrapper_kernels.py \
	test_wrapper_plain.py integrations/test_transformers_experts.py runtime/test_export.py \
	streams/test_staging_kernels.py) \
	$(addprefix tests/hybrid_moe/integrations/,step/test_router.py step/test_rotary.py) \
	tests/bench/test_steps.py tests/conformance tests/examples tests/streams/test_hand_over.py
# As many tiers at a time as there are cores: a process for each costs less than several for one.
# KINDS=1 leaves out tiers that differ from others in single ops.
test-tiers: install-dev
	$(MAKE) --no-print-directory -j $$(nproc) --output-sync \
		$(addprefix test-tier-,$(shell $(BIN)/python -m tests.isa $(if $(KINDS),--kinds)))

test-tier-%:
	$(BIN)/python -m pytest --isa $* $(TIER_TESTS)

test-lowest:
	PYTHON=$(PYTHON) .ci/lowest

# its parts, which need not wait for each other once `.ci/lowest install` has run
test-lowest-%:
	PYTHON=$(PYTHON) .ci/lowest $*

# SGLang without its dependencies, which are kernels for GPUs; tests/sglang has what it needs.
SGLANG_VENV ?= .venv-sglang
SGLANG_PIP := $(SGLANG_VENV)/bin/python -m pip --disable-pip-version-check
$(SGLANG_VENV)/.installed: tests/sglang/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_PIP) install -q -r tests/sglang/requirements.txt
	$(SGLANG_PIP) install -q --no-deps sglang==0.5.23
	$(SGLANG_PIP) install -q -e .
	touch $@

sglang: $(SGLANG_VENV)/.installed

# SGLang's own classes in one process: no servers.
test-sglang-classes: sglang
	$(SGLANG_VENV)/bin/python -m pytest tests/sglang

test-sglang: sglang
	HYBRID_MOE_TEST_SERVER=1 $(SGLANG_VENV)/bin/python -m pytest tests/sglang --durations=15

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

# Without options, build makes the wheel from the source distribution that it has just made.
wheel: install-dev
	rm -rf dist && $(BIN)/python -m build
	$(BIN)/python .ci/check_dist.py

RECEIPTS := build/receipts

bench: install
	$(BIN)/python bench/moe_layer.py

bench-ceilings: install
	$(BIN)/hybrid-moe bench ceilings

bench-dense: install
	$(BIN)/python bench/dense.py

# Whole models beside llama.cpp, and the first table of README and of docs/results: 24 GB of memory.
# The checkpoints take 32 GB under MODELS, and one model's GGUF files up to 19 GB more at a time.
MODELS ?= build/models
END_TO_END = $(BIN)/python bench/end_to_end.py --models $(MODELS) --peers llama.cpp
bench-end-to-end: install
	mkdir -p $(RECEIPTS)
	$(PIP) install -q -c constraints.txt -e ".[bench]" # without it the results lose their pictures
	$(END_TO_END) --model gpt-oss-20b --json $(RECEIPTS)/end_to_end-gpt-oss.json
	$(END_TO_END) --model gpt-oss-20b --dense int8 --contexts 512 --remove-gguf \
		--json $(RECEIPTS)/end_to_end-int8.json
	$(END_TO_END) --model qwen3-30b-a3b --remove-gguf --json $(RECEIPTS)/end_to_end-qwen3.json
	$(BIN)/python bench/report.py $(RECEIPTS)/end_to_end-*.json

bench-load: install
	$(BIN)/python bench/load.py

# 14 GB of disk under MODELS, removed afterwards, and as much memory; the result goes to docs/results.
bench-big: install
	mkdir -p $(RECEIPTS)
	$(PIP) install -q -c constraints.txt -e ".[bench]"
	$(BIN)/python bench/big.py --directory $(MODELS) --json $(RECEIPTS)/big.json
	$(BIN)/python bench/report.py $(RECEIPTS)/big.json

bench-pool: install
	$(BIN)/python bench/pool.py

# under two minutes: is anything slower than docs/results says of this processor?
bench-quick: install
	$(BIN)/python bench/quick.py

# KT_PYTHON, GGML_LIB: where kt-kernel and ggml are, if not where bench-peers-install puts them
bench-peers: install
	$(BIN)/python bench/peers.py --targets

# Every format beside kt-kernel, ggml and torch, one token and 1024, with a core to spare and with all,
# and its bars: hours. FORMATS=Q4_K,FP8 for some, TIER=avx2 for another tier. Then docs/results and docs/formats.md.
# THREADS=1: with so many threads only.
FORMATS_RECEIPT := $(RECEIPTS)/formats$(addprefix -,$(TIER)).json
bench-formats: install
	mkdir -p $(RECEIPTS)
	$(BIN)/python bench/peers.py --formats $(addprefix --methods ,$(FORMATS)) $(addprefix --isa ,$(TIER)) $(addprefix --threads ,$(THREADS)) \
		--json $(FORMATS_RECEIPT)
	$(if $(FORMATS),,$(BIN)/python bench/report.py $(FORMATS_RECEIPT) && $(BIN)/python bench/formats_table.py)

# Of llama.cpp, whose sources llama-cpp-python's source distribution has, only the libraries are
# built: five minutes on two cores, where the whole takes a quarter of an hour.
GGML := build/peers/ggml
bench-peers-install: install
	$(PIP) install -q --target build/peers/kt_kernel --no-deps kt-kernel gguf
	$(PIP) install -q --target build/peers/gguf --no-deps gguf
	$(PIP) install -q cmake ninja
	rm -rf $(GGML) && mkdir -p $(GGML)
	$(PIP) download -q --no-deps --no-binary llama-cpp-python -d $(GGML) llama-cpp-python
	tar -xzf $(GGML)/llama_cpp_python-*.tar.gz -C $(GGML) --strip-components 1
	PATH="$(abspath $(BIN)):$$PATH" cmake -S $(GGML)/vendor/llama.cpp -B $(GGML)/build -G Ninja \
		-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON -DLLAMA_CURL=OFF \
		$(foreach part,COMMON TESTS TOOLS EXAMPLES SERVER,-DLLAMA_BUILD_$(part)=OFF)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(GGML)/build --target llama
	PATH="$(abspath $(BIN)):$$PATH" cmake -S $(GGML)/vendor/llama.cpp -B $(GGML)/build-avx2 -G Ninja \
		-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=OFF -DLLAMA_CURL=OFF \
		$(foreach set,SSE42 AVX AVX2 FMA F16C BMI2,-DGGML_$(set)=ON) \
		$(foreach part,COMMON TESTS TOOLS EXAMPLES SERVER,-DLLAMA_BUILD_$(part)=OFF)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(GGML)/build-avx2 --target ggml-cpu

# What only a GPU can tell, within eight minutes; without one, a rehearsal. Needs no network and no pip:
# any Python with torch, and what it lacks in a folder of unpacked wheels (bench/gpu_check/packages.py).
RESULTS ?= docs/results/gpu
GPU_CHECK_PYTHON ?= $(abspath $(BIN))/python
gpu-check:
	rm -rf build/tree && $(MAKE) --no-print-directory $(TREE)
	ln -s $(CURDIR)/bench $(CURDIR)/tests build/tree/
	cd build/tree && GPU_CHECK_PACKAGES=$(abspath $(GPU_CHECK_PACKAGES)) PYTHONPATH=$(CURDIR)/build/tree \
		$(GPU_CHECK_PYTHON) -m bench.gpu_check --results $(abspath $(RESULTS))

# the series of layers on an idle machine; its receipts become docs/results
bench-results: install
	mkdir -p $(RECEIPTS)
	$(PIP) install -q -c constraints.txt -e ".[bench]"
	$(BIN)/hybrid-moe bench ceilings --seconds 1 --json $(RECEIPTS)/ceilings.json
	$(BIN)/python bench/pool.py --json $(RECEIPTS)/pool.json
	$(BIN)/python bench/moe_layer.py --methods MXFP4 --shapes A,B,C,D --json $(RECEIPTS)/mxfp4.json
	$(BIN)/python bench/moe_layer.py --methods BF16 --json $(RECEIPTS)/bf16.json
	$(BIN)/python bench/moe_layer.py --methods MXFP4 --tiers others --tokens 1,64 --json $(RECEIPTS)/tiers.json
	$(BIN)/python bench/peers.py --targets --longest-call 10 --json $(RECEIPTS)/peers.json
	$(BIN)/python bench/load.py --json $(RECEIPTS)/load.json
	$(BIN)/python bench/dense.py --formats BF16,MXFP4 --json $(RECEIPTS)/dense.json
	$(BIN)/python bench/quick.py --json $(RECEIPTS)/quick.json
	$(BIN)/python bench/report.py $(RECEIPTS)/*.json

clean:
	rm -rf $(VENV) $(SGLANG_VENV) build dist *.egg-info
