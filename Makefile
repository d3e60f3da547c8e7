# make demo | make test | make check | make wheel | make bench
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OPS_TESTS := tests/test_ensemble_batch_norm.py tests/test_ensemble_batch_norm_gain.py tests/test_member_gain.py tests/test_rank1_linear.py \
	tests/test_rank1_linear_products.py tests/test_rank1_lstm_steps.py
FORMATTED := $(shell find csrc tests/emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu*')
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

# Tests of the front-end, of several devices and of the benchmarks: many processes, and as long as all others together.
TRAINING_TESTS := $(shell grep -lE 'latephase_kernels\.(train|data)|benchmarks|distributed' tests/test_*.py)

# The C library fills new memory: what a kernel leaves unwritten shows.
POISON := GLIBC_TUNABLES=glibc.malloc.perturb=1:glibc.malloc.tcache_count=0

.PHONY: demo test test-native test-training test-triton test-compile test-emulator check format wheel bench

demo: $(VENV)/.installed
	$(BIN)/latephase demo

# Threads sleep while they wait: spinning, two test processes on two cores take each other's time (three times as long).
test test-native test-training test-triton test-compile test-emulator: export OMP_WAIT_POLICY := passive

test: test-native test-training test-triton test-compile test-emulator

# All else that runs natively, then the ops' tests again on each older instruction set, of which the reference knows nothing.
test-native: $(VENV)/.installed
	$(POISON) $(BIN)/python -m pytest -q --ignore-glob='tests/test_triton*' $(TRAINING_TESTS:%=--ignore=%)
	$(POISON) LATEPHASE_ISA=baseline $(BIN)/python -m pytest -q $(OPS_TESTS) -k "not reference"
	$(POISON) LATEPHASE_ISA=x86_64_v3 $(BIN)/python -m pytest -q $(OPS_TESTS) -k "not reference"

test-training: $(VENV)/.installed
	$(BIN)/python -m pytest -q $(TRAINING_TESTS)

# Triton kernels in the interpreter, in a process of its own.
test-triton: $(VENV)/.installed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/test_triton_ensemble_batch_norm.py tests/test_triton_member_gain.py \
		tests/test_triton_rank1_linear.py tests/test_triton_rank1_lstm.py

# Triton kernels compiled ahead of time for GPUs that need not be there.
test-compile: $(VENV)/.installed
	$(BIN)/python -m pytest -q -s tests/test_triton_compile.py

# CUDA kernels in an emulator that checks every access, warps in a random order. Left out here are tests of many blocks and of much data.
test-emulator: $(VENV)/.installed
	LATEPHASE_EMULATOR_SEED=1 $(BIN)/python tests/emulator/run.py -q tests/emulator tests/test_cuda_ensemble_batch_norm.py \
		tests/test_cuda_ensemble_batch_norm_tiers.py tests/test_cuda_member_gain.py tests/test_cuda_rank1_linear.py \
		tests/test_cuda_rank1_lstm.py -k "not (triton or 70000 or 4096 or beside_the_edges or depends_on_itself or do_not_fit)"
	LATEPHASE_EMULATOR_CLUSTERS=0 $(BIN)/python tests/emulator/run.py -q tests/test_cuda_ensemble_batch_norm_tiers.py -k one_case

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

wheel: $(VENV)/.installed
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/bench_ensemble_batch_norm.py
	$(BIN)/python benchmarks/bench_member_gain.py
	$(BIN)/python benchmarks/bench_rank1_linear.py
	$(BIN)/python benchmarks/bench_rank1_lstm.py
	$(BIN)/python benchmarks/bench_norm_gains.py

# torch first, then the package without isolation: an isolated build would download torch a second time.
$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch torchvision numpy matplotlib tqdm ninja 'setuptools>=77'
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@
