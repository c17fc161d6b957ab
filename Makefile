# make demo    trains Interflow VGG-16 on the embedded digits, prints accuracy and throughput
# make test    runs the whole test suite
# make lint    ruff and mypy
# make bench   measures the head against eager PyTorch, torch.compile and the memory limit
# make wheel   builds sdist and wheel into dist/, installs the wheel beside torch alone and runs the head
# Each makes .venv first. Needs Python >= 3.10, a C++ compiler and make. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
BENCH_OUT ?= bench/results/local

.PHONY: demo test lint bench wheel clean

demo: $(VENV)/installed
	$(BIN)/python -m interflow_vision.demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -q

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	mkdir -p $(BENCH_OUT)
	$(BIN)/python -m pytest bench -q --benchmark-json=$(BENCH_OUT)/head.json
	$(BIN)/python bench/report.py $(BENCH_OUT)/head.json

wheel: $(VENV)/installed
	$(BIN)/python tests/wheel_check.py

# Requirements first, pinned; then the package itself, its compiled part built against the torch that is there.
$(VENV)/requirements: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch numpy setuptools wheel ninja pybind11
	@touch $@

$(VENV)/installed: $(VENV)/requirements setup.py $(shell find csrc interflow_kernels python -name '*.cpp' -o -name '*.h' -o -name '*.py' -o -name '*.yaml')
	INTERFLOW_CUDA=0 $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[train,bench,dev]'
	@touch $@

clean:
	rm -rf build dist *.egg-info interflow_kernels/*.so
