# Every target works in a fresh clone: `setup` makes .venv once, and again when the requirements change.
# PYTHON chooses the interpreter that makes the environment; set VENV to use one that is there already.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.v4graph-setup

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-asan cpu-kernels kernels kernel-docs gpu-kernels test-gpu sanitize-gpu bench-gpu lint format type nano bodies clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install v4graph with every extra (once)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[export,ort,rtx,hub,plan,serve,dev]'
	@touch $@

cpu-kernels: setup ## Compile the CPU kernels of the custom ops for onnxruntime (needs g++)
	$(BIN)/v4graph kernels build-cpu

demo: cpu-kernels ## Checkpoint to text: export nano, build, generate, score held-out chapters
	@rm -rf build/nano.graph build/nano.engine
	$(BIN)/v4graph export models/nano build/nano.graph --numerics v4 --all-logits --max-seq-len 2048
	$(BIN)/v4graph build build/nano.graph build/nano.engine --backend ort
	$(BIN)/v4graph run build/nano.engine --checkpoint models/nano --prompt "In the beginning" \
	    --max-new-tokens 250 --temperature 0.8 --seed 1
	$(BIN)/v4graph eval build/nano.engine --checkpoint models/nano --text models/nano/heldout.txt --documents

test: cpu-kernels ## The fast tests (no GPU; at most 8 minutes on 2 cores)
	$(BIN)/pytest -q -n 2 -m "not slow and not gpu" tests

test-slow: cpu-kernels ## The slow proofs (no GPU; at most 17 minutes on 2 cores)
	$(BIN)/pytest -q -m "slow and not gpu" tests

ASAN := build/asan/libv4graph_cpu.so
# Python frees little of what it holds at its end: leaks are not looked for.
test-asan: setup ## The CPU kernels' tests under AddressSanitizer and UBSan (2 minutes on 2 cores)
	$(BIN)/v4graph kernels build-cpu --sanitize --out $(ASAN)
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 V4GRAPH_CPU_LIBRARY=$(ASAN) \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    $(BIN)/pytest -q -n 2 tests/runtime/test_cpu_kernels.py

kernels: setup ## Compile the CUDA kernels for every target (needs nvcc 13.0, no GPU); TARGETS= chooses
	$(BIN)/v4graph kernels build $(TARGETS)

kernel-docs: kernels ## Write the tables of docs/kernels.md and docs/kernel-resources.md again
	$(BIN)/python benchmarks/kernel_floors.py
	( sed '/^|/,$$d' docs/kernel-resources.md; $(BIN)/v4graph kernels list ) > docs/kernel-resources.partial
	mv docs/kernel-resources.partial docs/kernel-resources.md

# Where the GPU is, packages may come with the machine: without .venv these run in PYTHON's environment.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_PATH := PYTHONPATH=.:export:plugins:runtime:tests/support
GPU_RUN := $(GPU_PATH) $(GPU_PYTHON)
GPU_NAME = $(shell $(GPU_RUN) -c 'from v4graph.gpu import gpus; print(*(gpu.target for gpu in gpus()[:1]))')
BENCH_OUT ?= benchmarks/$(or $(GPU_NAME),no-gpu)

gpu-kernels:
	$(if $(GPU_NAME),$(GPU_RUN) -m v4graph.cli kernels build $(GPU_NAME))

# Six processes, as most of the time goes to the references, which run on the CPU.
GPU_PYTEST = -m pytest -q -rs -o minversion=8.0 -m gpu
test-gpu: gpu-kernels ## The tests that need an NVIDIA GPU (90 seconds on an H100; needs pytest-xdist)
	OMP_NUM_THREADS=2 $(GPU_RUN) $(GPU_PYTEST) -n 6 tests/gpu/test_kernels_on_gpu.py
	$(GPU_RUN) $(GPU_PYTEST) --ignore tests/gpu/test_kernels_on_gpu.py tests/gpu

# Without torch's memory pool every tensor has bounds of its own.
sanitize-gpu: gpu-kernels ## compute-sanitizer's memcheck and racecheck over one shape of every op (needs a GPU)
	for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(GPU_PATH) compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 1 $(GPU_PYTHON) $(GPU_PYTEST) \
	        tests/gpu/test_kernels_on_gpu.py -k one_shape_of_each || exit 1; \
	done

bench-gpu: gpu-kernels ## Time a token of Flash, and every op's kernels beside torch; BENCH_OUT= chooses the folder
	$(GPU_RUN) benchmarks/decode_on_gpu.py --out $(BENCH_OUT)/decode.json
	$(GPU_RUN) benchmarks/kernels.py --out $(BENCH_OUT)

lint: setup ## ruff: lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## ruff: sort imports and format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

type: setup ## mypy --strict on the four packages
	$(BIN)/mypy

nano: setup ## Train the nano checkpoint again (about half an hour on 2 cores)
	@rm -rf build/nano/trained build/nano/official
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m nano.train --out build/nano/trained --work-dir build/nano
	$(BIN)/v4graph pack build/nano/trained build/nano/official --quantize
	$(BIN)/python -m nano.card build/nano/trained models/nano
	cp build/nano/official/model.safetensors models/nano/

bodies: setup ## Rebuild the prebuilt function bodies of the custom ops
	$(BIN)/python -m v4graph_export.rebuild_bodies

clean: ## Remove what the targets above wrote, the environment excepted
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
