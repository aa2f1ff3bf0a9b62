# Everything a fresh machine needs: `make demo` installs and runs the demo, `make test` installs and passes the tests.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml constraints.txt
SELECT := not full and not gpu
PYTEST = $(BIN)/python -m pytest -m "$(SELECT)"

# The CUDA library takes minutes and runs on GPUs only; the tests compile the kernels for the emulator, and to look at their code. `make build FASTADAPT_CUDA=1` builds it.
export FASTADAPT_CUDA ?= 0

.PHONY: demo test test-full build lint bench gpu-check clean test-library test-models test-cuda test-interpreted test-compiled
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(BIN)/fastadapt demo --out out/demo

# Two processes at a time. Triton's two parts must be processes of their own: one process cannot both interpret and compile kernels.
test: .venv/.installed lint
	$(MAKE) --no-print-directory -j2 -Otarget $(PARTS)

# The longest part first.
test-full: .venv/.installed lint
	$(MAKE) --no-print-directory -j2 -Otarget SELECT="not gpu" test-compiled $(PARTS)
	$(BIN)/python -m tests.triton.mutants
	$(BIN)/python -m tests.triton.mutants phm
	$(BIN)/python -m tests.triton.mutants norm
	$(BIN)/python -m tests.mutation.cpu
	$(BIN)/python -m tests.mutation.cpu phm
	$(BIN)/python -m tests.mutation.cpu norm
	$(BIN)/python -m tests.mutation.cuda
	$(BIN)/python -m tests.mutation.cuda phm
	$(BIN)/python -m tests.mutation.cuda norm
	$(BIN)/python -m tests.proof --write

PARTS := test-cuda test-models test-library test-interpreted test-compiled
MODELS := tests/hosts tests/hosts_vl tests/methods tests/nn tests/training tests/test_patching.py tests/test_checkpoint.py tests/test_packaging.py
test-models:
	$(PYTEST) $(MODELS)
test-library:
	$(PYTEST) tests --ignore=tests/triton --ignore=tests/cuda $(MODELS:%=--ignore=%)
test-cuda:
	$(PYTEST) tests/cuda
test-interpreted:
	TRITON_INTERPRET=1 $(PYTEST) tests/triton/interpret
test-compiled:
	$(PYTEST) tests/triton/compiled

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# About 45 minutes; QUICK=--quick takes two. The machine should have nothing else to do.
bench: .venv/.installed
	$(BIN)/fastadapt bench $(QUICK) --json benchmarks/data/bench.json --history --plots benchmarks/data

# Ready to run on a machine with a GPU, where it builds the CUDA kernels; anywhere else it says why its GPU part is left out. Hours; QUICK=--quick takes a quarter of one.
gpu-check: .venv/$(if $(findstring GPU 0,$(shell command -v nvidia-smi >/dev/null && nvidia-smi -L)),.cuda,.installed)
	$(BIN)/python -m benchmarks.gpu_check $(QUICK)

.venv/.cuda: .venv/.installed
	$(BIN)/python -c 'import setup; raise SystemExit(setup.no_nvcc())' || $(PIP) --no-build-isolation -e '.[cuda-build]'
	FASTADAPT_CUDA=1 $(PIP) --no-build-isolation -e '.[demo,test]'
	touch $@

# Again whatever is there: for another torch, or other FASTADAPT_CUDA and FASTADAPT_CPU_LEVELS.
build:
	rm -f .venv/.installed
	$(MAKE) --no-print-directory .venv/.installed

# torch is installed by itself first: its exact version is a build on this machine's disk or PyPI's, and the extension is built against it, without isolation.
.venv/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --upgrade pip setuptools ninja
	$(PIP) torch==2.13.0
	$(PIP) --no-build-isolation -e '.[demo,test]'
	touch $@

clean:
	rm -rf .venv build dist out *.egg-info fastadapt/*.so fastadapt/_*_build.json
