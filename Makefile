# Every target does its own set-up; any of them can be run again, also after an interruption.
.PHONY: help setup lint test unit kernels engine engine-interpreted serve serve-shared serve-own demo bench test-gpu bench-gpu clean

PY := .venv/bin/python
STEP = @printf '\n== %s\n'

help:
	@echo "make setup   .venv with vLLM for the CPU, the tools and this project"
	@echo "make demo    plain vLLM and the plugin on the same prompts, side by side"
	@echo "make test    lint, types and every test          make unit | kernels | engine | serve   one suite"
	@echo "make engine-interpreted   the engine suite on what a GPU would run, under Triton's interpreter"
	@echo "make bench   the measurements of docs/benchmarks.md"
	@echo "make test-gpu | bench-gpu   on a machine with a GPU, in the environment that has vLLM for CUDA (docs/gpu.md)"

setup:
	@.ci/setup

lint: setup
	$(STEP) "ruff"
	@$(PY) -m ruff check .
	$(STEP) "mypy"
	@$(PY) -m mypy

# Two processes, a file each at a time, in tests/conftest.py's order: tests run one thread, and machines have two cores.
unit engine: setup
	$(STEP) "tests/$@"
	@$(PY) -m pytest tests/$@ --durations=8 -n 2 --dist loadfile --no-loadscope-reorder

# Triton reads the switch when it is imported; with it, kernels run on the CPU, slowly.
kernels: setup
	$(STEP) "tests/$@"
	@TRITON_INTERPRET=1 $(PY) -m pytest tests/$@ --durations=8 -n 2 --dist loadfile

# The engine suite on what a GPU would run, interpreted.
engine-interpreted: setup
	$(STEP) "tests/engine, interpreted"
	@TEST_LANE=interpreted $(PY) -m pytest tests/engine --ignore tests/engine/cpu --timeout 3600 --durations=8 -n 2 --dist loadfile --no-loadscope-reorder

# Two processes here too: the files that share servers, and those that start their own. Each shows what it found at its end.
OWN := tests/serve/test_router.py tests/serve/test_answer_cache.py
serve: setup
	$(STEP) "tests/$@"
	@$(MAKE) --no-print-directory --output-sync=target --jobs 2 --keep-going serve-shared serve-own

serve-shared:
	@$(PY) -m pytest tests/serve $(OWN:%=--ignore=%) --durations=5

serve-own:
	@$(PY) -m pytest $(OWN) --durations=5

# One process per suite: an engine leaves state in its process (backends, plugins) that the next suite must not see.
test: lint
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory kernels
	@$(MAKE) --no-print-directory engine
	@$(MAKE) --no-print-directory serve

demo: setup
	@$(PY) -m vllm_spec_plugins.tools.demo

bench: setup
	@$(PY) -m vllm_spec_plugins.tools.bench

# No set-up: .venv holds vLLM for the CPU. GPU_PY is the interpreter of the environment with vLLM for CUDA.
GPU_PY ?= python3
GPU_OUT ?= gpu-figures
# All servers are up together: each gets a part of the memory.
GPU_SPEED ?= -- --gpu-memory-utilization 0.2

test-gpu:
	$(STEP) "tests/gpu"
	@$(GPU_PY) -m pytest tests/gpu --durations=10

bench-gpu:
	$(STEP) "kernels"
	@$(GPU_PY) -m vllm_spec_plugins.tools.bench kernels --json $(GPU_OUT)/kernels.json
	$(STEP) "speed"
	@$(GPU_PY) -m vllm_spec_plugins.tools.bench speed --json $(GPU_OUT)/speed.json --no-ngram $(GPU_SPEED)

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
