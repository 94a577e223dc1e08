# Every target does all of its own set-up; nothing outside this folder and the data folder is touched, with one exception:
# as root, the set-up of the tests (make test, make setup-dev) installs Debian's Chromium with apt where there is none.
#   PYTHON=python3.12 make up     another interpreter (3.11 to 3.13)
#   PROFILE=base make setup       another profile (base, cpu, gpu); default: the best this machine can have
#   ARGS="--port 9000" make up    options of the windfarm command

.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
SETUP := $(PYTHON) -m infra.setup
ARGS ?=

.PHONY: help setup setup-dev up down test chaos soak test-kills test-leaks test-ranks test-nodes test-gpu test-unit lint format bench-laptop bench-experts bench-retrieval bench-answers bench-routing bench-overhead bench-scaling bench-coldstart lock screenshots manifests manifests-check map clean

help: ## List all targets
	@echo "windfarm: make up starts everything and prints the address of the page."
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

setup: python ## Prepare environment, packages and models (seconds when already done)
	@$(SETUP)

setup-dev: python ## The same, with what the tests need
	@$(SETUP) --dev

up: setup ## Start windfarm and print the address of its page (ctrl-C stops it)
	@$(BIN)/windfarm up $(ARGS)

down: ## Stop windfarm and everything it started
	@if [ -x $(BIN)/windfarm ]; then $(BIN)/windfarm down $(ARGS); else echo "Nothing is set up here, so nothing runs."; fi

# In two processes: most of its time a test waits for what it has started.
test: lint ## Checks and tests: what CI runs (the long forms are `test-kills`, `test-leaks`, `test-ranks`, `chaos`)
	@$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

test-kills: setup-dev ## 20 kills at random moments of an ingest of 200 files (a minute; `test` has the short form)
	@WINDFARM_TEST_KILLS=20 WINDFARM_TEST_KILL_FILES=200 $(BIN)/python -m pytest tests/services/test_ingestion_kills.py $(ARGS)

test-leaks: setup-dev ## 10,000 random tries to read what one may not (a minute; `test` has the short form)
	@WINDFARM_TEST_TRIES=10000 $(BIN)/python -m pytest tests/services/test_no_leak.py $(ARGS)

test-ranks: setup-dev ## vLLM in many processes: gangs, exactness, lost ranks and nodes; an ingest over two nodes (minutes)
	@$(BIN)/python -m pytest -m "" tests/cluster/vllm_plugin tests/cluster/test_small.py tests/cluster/test_placement_on_ray.py tests/e2e/test_gangs.py tests/e2e/test_small_gang.py tests/e2e/test_spread_ingest.py $(ARGS)

chaos: setup-dev ## Break everything many times, and write the measured times into docs/failure-contract.md (an hour and a half)
	@$(BIN)/python -m tests.chaos.campaign $(ARGS)

soak: setup-dev ## Mixed traffic with faults for MINUTES=60 (1: the short form): what is held stays bounded, requests succeed
	@$(BIN)/python -m tests.chaos.soak --minutes $(or $(MINUTES),60) $(ARGS)

test-nodes: setup-dev ## Nodes that come and go with requests, by Ray's autoscaler (two minutes, not part of `test`)
	@$(BIN)/python -m pytest -m nodes $(ARGS)

test-gpu: setup-dev ## On a machine with an NVIDIA GPU: engines, experts, embeddings and the product on it (minutes)
	@$(BIN)/python -m pytest -m "" -k "not llamacpp and not remote" tests/cluster/engines/test_contract.py tests/cluster/vllm_plugin/test_experts_on_gpu.py tests/cluster/test_embedding_on_gpu.py tests/e2e/test_on_gpu.py $(ARGS)

test-unit: setup-dev ## Only the tests that start no engine and no product
	@$(BIN)/python -m pytest -m "not integration and not e2e and not bench" $(ARGS)

lint: setup-dev ## Style, format and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: setup-dev ## Rewrite the code in the project's format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench-laptop: setup-dev ## Speed of one chat stream against the bare llama.cpp server, and of the start
	@$(BIN)/python -m tests.bench.laptop $(ARGS)

bench-experts: setup-dev ## Experts in pieces: exactness, balance, speed of two ranks against one, cost of counting
	@$(BIN)/python -m tests.bench.experts $(ARGS)

bench-retrieval: setup-dev ## What search finds on test sets beside bm25s; search and ingest at scale beside LangChain
	@$(BIN)/python -m tests.bench.retrieval $(ARGS)

bench-answers: setup-dev ## What answers are worth in three languages: cited spans, unsupported sentences, refusals
	@$(BIN)/python -m tests.bench.answers $(ARGS)

bench-routing: setup-dev ## Chats that share documents: replicas chosen by their caches against round robin
	@$(BIN)/python -m tests.bench.routing $(ARGS)

bench-overhead: setup-dev ## What the endpoint costs: beside bare vLLM and llama.cpp, Ray Serve LLM, and the LiteLLM proxy
	@$(BIN)/python -m tests.bench.overhead $(ARGS)

bench-scaling: setup-dev ## 1 to 3 and back to 1 replicas under a ramp: failed requests, share within the target
	@$(BIN)/python -m tests.bench.scaling $(ARGS)

bench-coldstart: setup-dev ## Seconds to the first token: stopped, scaled to zero, an additional replica
	@$(BIN)/python -m tests.bench.coldstart $(ARGS)

lock: setup-dev ## Resolve requirements/*.in again (ARGS=--upgrade: newest versions)
	@$(BIN)/python -m infra.setup.lock $(ARGS)

screenshots: setup-dev ## Take the pictures of the README again, from the real page and the real commands
	@$(BIN)/python -m tests.e2e.screenshots $(ARGS)
	@$(BIN)/python -m tests.e2e.terminal_pictures $(ARGS)

manifests: setup-dev ## Write infra/kuberay/*.yaml again, each by the command in its first line
	@$(BIN)/python -m infra.kuberay.write

manifests-check: setup-dev ## Check the Kubernetes manifests and Serve configs without a cluster
	@$(BIN)/python -m infra.kuberay.check $(ARGS)

map: setup-dev ## Write the code map of README.md from the docstrings
	@$(BIN)/python -m infra.setup.code_map

clean: ## Remove the environment and caches; the data folder stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info

.PHONY: python
python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Install it: sudo apt-get install python3 python3-venv"; exit 1; }
