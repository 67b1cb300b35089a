# Everything a developer types. `make serve` and `make test` build what they need and are quick when nothing changed.

DEFAULT_MODEL := smollm2-135m-instruct

PYTHON    ?= python3
MODEL_ID  ?= $(DEFAULT_MODEL)
NUM_SHARD ?= 1
PORT      ?= 8080
DTYPE     ?=
URL       ?= http://127.0.0.1:$(PORT)
ARGS      ?=

# Chosen first and alone, so that nothing else can pull in another build of it. To take one from elsewhere:
# make setup TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
# Not a dependency of ours that pip could resolve: its own requirements start a long C++ build that nothing here needs.
MODEL_PACKAGE := $(shell sed -n 's/^REQUIREMENT: Final = "\(.*\)"/\1/p' shard/smollm2.py)

VENV := .venv
BIN  := $(VENV)/bin
# Warnings about package indexes that are not there say nothing to somebody who only wants to start a server.
PIP  := $(BIN)/python -m pip install -qq --disable-pip-version-check
# One `make` at a time builds; others wait and then find the work done.
LOCK := $(if $(shell command -v flock),flock build/lock)

SOURCES := proto router shard tests

CLIENTS := $(patsubst tests/clients/pins/%.txt,build/clients/%/installed,$(wildcard tests/clients/pins/*.txt)) \
	build/clients/node/installed

PEERS := build/peers
# Its source distribution carries llama.cpp whole.
LLAMACPP := llama-cpp-python==0.3.36
PEER_WEIGHTS := $(addprefix $(PEERS)/weights/,bf16.gguf q8_0.gguf q4_0.gguf openvino-bf16 openvino-int8 openvino-int4 vllm-w8a8)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup everything model kernels serve test test-all test-clients check lint types arch format proto readme bench \
	bench-peers peers clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: MODEL_ID=$(MODEL_ID) NUM_SHARD=$(NUM_SHARD) PORT=$(PORT) DTYPE=$(DTYPE) URL=$(URL) PYTHON=$(PYTHON)"
	@echo "           ARGS= is handed on to the server, pytest or the bench."

setup: ## Create .venv, install, build the proto stubs, convert the default model
	@mkdir -p build && $(LOCK) $(MAKE) --no-print-directory everything

serve: setup ## Serve MODEL_ID on PORT with NUM_SHARD ranks in DTYPE
	@$(BIN)/python -m router --model-id $(MODEL_ID) --num-shard $(NUM_SHARD) --port $(PORT) \
		$(if $(DTYPE),--dtype $(DTYPE)) $(ARGS)

test: setup ## Run the tests (ARGS="tests/test_x.py -k name" for some of them)
	@$(BIN)/python -m pytest $(ARGS)

test-all: setup ## Run the tests and the exhaustive matrices behind some of them
	@$(BIN)/python -m pytest -m "not clients" $(ARGS)

test-clients: setup ## Install the clients of others, unmodified, and run them against a server
	@$(LOCK) $(MAKE) --no-print-directory $(CLIENTS)
	@$(BIN)/python -m pytest -m "" tests/clients $(ARGS)

check: lint types arch ## Check format, lint, types and the direction of imports

format: setup ## Format the code and repair what can be repaired
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

proto: setup ## Build proto/shard_pb2*.py from proto/shard.proto

readme: setup ## Write the configuration table into README.md
	@$(BIN)/python -m tests.readme

bench: setup ## Measure the server at URL
	@$(BIN)/python -m tests.bench.load --url $(URL) $(ARGS)

bench-peers: setup ## Measure llama.cpp, OpenVINO, vLLM, transformers and us in turns (installs them; half an hour)
	@$(LOCK) $(MAKE) --no-print-directory --keep-going peers || echo "what could not be installed is left out" >&2
	@$(BIN)/python -m tests.bench.peers $(ARGS)
	@-$(PEERS)/tools/bin/python tests/bench/peers/plot.py $(PEERS)/results.json $(PEERS)/results.png

clean: ## Remove everything built except .venv and the converted model
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	rm -f proto/shard_pb2*
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv too
	rm -rf $(VENV)

# The parts of `check`.
lint: setup
	@$(BIN)/ruff format --check --quiet $(SOURCES) || { echo "run: make format"; exit 1; }
	@$(BIN)/ruff check $(SOURCES)

types: setup
	@$(BIN)/mypy

arch: setup
	@$(BIN)/lint-imports

# Each client has an environment of its own, because what they pin conflicts; the pins are complete, so nothing is
# resolved and no torch can slip in: lm-eval, which runs models too, is shown the torch of .venv by its test.
build/clients/%/installed: tests/clients/pins/%.txt
	@echo "installing the client $*"
	@rm -rf $(@D) && $(BIN)/python -m venv --without-pip $(@D)
	@$(BIN)/python -m pip --python $(@D)/bin/python install -qq --disable-pip-version-check --no-deps -r $<
	@touch $@

build/clients/node/installed: tests/clients/pins/node/package.json tests/clients/pins/node/package-lock.json
	@echo "installing the clients for node"
	@rm -rf $(@D) && mkdir -p $(@D) && cp $^ $(@D)
	@npm ci --prefix $(@D) --silent --no-audit --no-fund
	@touch $@

# The parts of `bench-peers`. Every engine has an environment of its own with complete pins, and torch is chosen alone as
# in `setup`. Compilers are niced: nothing waits for them but this.
peers: $(PEERS)/bandwidth $(PEERS)/tools/installed $(PEERS)/vllm/installed $(PEER_WEIGHTS)

$(PEERS)/%/installed: tests/bench/peers/pins/%.txt
	@echo "installing $* to measure against"
	@rm -rf $(@D) && $(BIN)/python -m venv --without-pip $(@D)
	@$(if $(filter tools,$*),,$(BIN)/python -m pip --python $(@D)/bin/python install -qq $(TORCH))
	@$(BIN)/python -m pip --python $(@D)/bin/python install -qq --disable-pip-version-check --no-deps -r $<
	@touch $@

$(PEERS)/llamacpp/installed: $(PEERS)/tools/installed
	@echo "building llama.cpp to measure against (long)"
	@rm -rf $(@D) && mkdir -p $(@D)/source
	@$(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps --no-binary :all: -d $(@D) $(LLAMACPP)
	@tar -xzf $(@D)/*.tar.gz -C $(@D)/source --strip-components 3 --wildcards '*/vendor/llama.cpp'
	@PATH="$(abspath $(PEERS)/tools/bin):$$PATH"; \
	nice cmake -S $(@D)/source -B $(@D)/build -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
		-DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF > $(@D)/build.log 2>&1 && \
	nice cmake --build $(@D)/build --target llama-server llama-quantize >> $(@D)/build.log 2>&1 || \
		{ tail $(@D)/build.log >&2; exit 1; }
	@echo "of $(subst ==, ,$(LLAMACPP))" > $(@D)/version
	@touch $@

$(PEERS)/weights/%.gguf: $(PEERS)/llamacpp/installed $(PEERS)/transformers/installed
	@$(BIN)/python -m tests.bench.peers.weights $(@F)

$(PEERS)/weights/q8_0.gguf $(PEERS)/weights/q4_0.gguf: $(PEERS)/weights/bf16.gguf

$(PEERS)/weights/openvino-%: $(PEERS)/openvino/installed
	@$(BIN)/python -m tests.bench.peers.weights $(@F)

$(PEERS)/weights/vllm-%: $(PEERS)/vllm/installed
	@$(BIN)/python -m tests.bench.peers.weights $(@F)

$(PEERS)/bandwidth: tests/bench/peers/bandwidth.c
	@mkdir -p $(@D) && $(CC) -O3 -march=native -pthread -o $@ $<

# The parts of `setup`, run under its lock.
everything: $(VENV)/installed proto/shard_pb2.py kernels model

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Shardstream needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing $(TORCH) (large)"
	@$(PIP) $(TORCH)
	@echo "installing the other dependencies"
	@$(PIP) --editable '.[router,shard,dev]'
	@echo "installing $(MODEL_PACKAGE), the default model"
	@$(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@

proto/shard_pb2.py: proto/shard.proto $(VENV)/installed
	@$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. $<

# Always asked, because the cache is not ours alone: 50 ms when the library is there, some seconds when it is not.
kernels: $(VENV)/installed
	@$(BIN)/python -m shard.kernels.build > /dev/null

# Always asked, because the cache is not ours alone: 30 ms when the model is there.
model: $(VENV)/installed
	@$(BIN)/python -m shard.checkpoint $(DEFAULT_MODEL) > /dev/null
