# make demo    trains Interflow VGG-16 on the embedded digits, prints accuracy and throughput
# make test    runs the test suite, one worker process for each core; WORKERS=0 runs it in one process
# make test-slow   what takes longer: the CUDA library for every architecture and its machine code, Triton's kernels under its interpreter,
#              mistakes that the emulation must catch, sanitizers, training in two processes
# make test-backbones   Interflow on the smallest model of every timm family, forward and backward, both memory formats: part of test-slow
# make test-newest   the suite beside the newest torch that was tried, NEWEST, with its torchvision, in an environment of its own, .venv-newest
# make lint    ruff and mypy
# make fuzz    20,000 random calls of every public function, module and raw operator beside the definitions: hours. FUZZ_ARGS: as python -m tests.fuzz --help
# make numerics   the worst error of every operator beside eager PyTorch's, on a million values of each kind, into docs/reliability.md: a minute
# make bench   measures everything in under ten minutes against eager PyTorch, torch.compile, inference engines and the memory limit;
#              report.md, report.html and speed.png appear in BENCH_OUT. make bench-full: every case, hours on two cores.
# make bench-backbones   backbones of timm with Interflow and without, ten cases and two layouts: a quarter of an hour, into BENCH_OUT
# make bench-compare A=FOLDER B=FOLDER   what changed between two runs, and whether it is more than noise
# make bench-readme   the README's sections on speed anew, on a CPU and on a GPU, from the committed results
# make profile where the time of whole networks goes, with Interflow and without, by torch.profiler: BENCH_OUT, BENCH_DEVICE
# make profile-page FROM=FOLDER   the page in docs/ from the profile that lies in a folder of bench/results/
# make gpu     on a machine with an NVIDIA GPU and no network, with the Python that is there (PYTHON, no environment is made): builds for the GPU, then
#              every part below. Each is a target of its own, gpu-smoke and so on, of at most 200 s, and ends with a short table:
#              build, info, smoke (each kernel against the CPU), speed (beside a copy), blocks (the same, launched otherwise), test (the suites), headline
#              (whole networks), bench (the rest).
#              Results in bench/results/<gpu>/ or GPU_OUT. DEVICE=cpu rehearses in seconds, without a GPU. GPU_ARGS: as `python -m gpu --help` lists.
# make gpu-full   every case of bench, the whole grid of networks, batches, dtypes and layouts: hours, into bench/results/<gpu>-full/
# make gpu-kit    here, for a GPU elsewhere: build/gpu-kit, the package with libraries for every GPU, for any Python >= 3.10 and torch >= 2.10
# make wheel   builds sdist and wheel into dist/, has auditwheel check them for manylinux_2_28, installs the wheel beside torch alone and runs the head
# make docs    the documentation site into site/, from docs/ and the docstrings; any warning ends it. make docs-serve: on this machine, at port 8000
# make audit   known vulnerabilities of the pinned packages, by pip-audit: needs the network, and fails for a package that it cannot ask about
# make sbom    dist/sbom.cdx.json, the bill of materials of .venv in CycloneDX's form. make licences: docs/licences.md
# make lock    constraints-hashed.txt, the pins of constraints.txt with the hashes of their files; see SECURITY.md
# make hub     build/hub, the package as a kernel for Hugging Face's `kernels`. HUB_ARGS: as `python bench/hub.py --help` lists
# Each but those of gpu, gpu-kit excepted, makes .venv first. Needs Python >= 3.10, a C++ compiler and make. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
BENCH_OUT ?= bench/results/local

BENCH_RESULTS := bench/results/cpu-2core
GPU_RESULTS := bench/results/nvidia-h200
BENCH_DEVICE ?= cpu
WORKERS ?= auto
DEVICE ?= cuda
NEWEST ?= torch==2.14.1 torchvision==0.29.1
NEW := .venv-newest
DOCS := $(VENV)/docs

SUPPLY := .venv-supply
SUPPLY_TOOLS := cyclonedx-bom==7.5.0 pip-audit==2.10.1 uv==0.13.9

.PHONY: demo test test-slow test-backbones test-newest hub docs docs-serve lint fuzz bench bench-full bench-backbones bench-compare bench-readme \
	profile profile-page gpu gpu-full gpu-kit gpu-model wheel clean audit sbom licences lock numerics \
	gpu-build gpu-info gpu-smoke gpu-speed gpu-blocks gpu-test gpu-headline gpu-bench

demo: $(VENV)/installed
	$(BIN)/python -m interflow_vision.cli.demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m slow

test-backbones: $(VENV)/installed
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m slow tests/backbones/test_backbone_families.py

test-newest: $(NEW)/installed
	$(NEW)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/installed
	$(BIN)/python -m tests.fuzz --calls 20000 $(FUZZ_ARGS)

numerics: $(VENV)/installed
	$(BIN)/python bench/numerics.py --write

bench bench-full: $(VENV)/installed
	mkdir -p $(BENCH_OUT)
	$(BIN)/python -m pytest bench -q -rs --disable-warnings --benchmark-columns=median,iqr,rounds --device $(BENCH_DEVICE) \
		$(if $(filter bench-full,$@),--full) --benchmark-json=$(BENCH_OUT)/results.json
	PYTHONPATH=bench $(BIN)/python -m pages.report $(BENCH_OUT)

bench-backbones: $(VENV)/installed
	mkdir -p $(BENCH_OUT)
	$(BIN)/python -m pytest bench/bench_backbones.py -q -rs --disable-warnings --benchmark-columns=median,iqr,rounds --device $(BENCH_DEVICE) \
		--full --benchmark-json=$(BENCH_OUT)/results.json
	PYTHONPATH=bench $(BIN)/python -m pages.report $(BENCH_OUT)

bench-compare: $(VENV)/installed
	PYTHONPATH=bench $(BIN)/python -m pages.compare $(A) $(B)

bench-readme: $(VENV)/installed
	PYTHONPATH=bench $(BIN)/python -m pages.readme $(BENCH_RESULTS)
	PYTHONPATH=bench $(BIN)/python -m pages.gpu_readme $(GPU_RESULTS)

profile: $(VENV)/installed
	$(BIN)/python bench/profile_networks.py --device $(BENCH_DEVICE) --out $(BENCH_OUT)

profile-page: $(VENV)/installed
	PYTHONPATH=bench $(BIN)/python -m pages.profile_page $(FROM)

gpu gpu-full gpu-build gpu-info gpu-smoke gpu-speed gpu-blocks gpu-test gpu-headline gpu-bench:
	PYTHONPATH=bench $(PYTHON) -m gpu $(if $(filter gpu,$@),all,$(if $(filter gpu-full,$@),bench --full,$(@:gpu-%=%))) --device $(DEVICE) \
		$(if $(GPU_OUT),--out $(GPU_OUT)) $(GPU_ARGS)

gpu-kit: $(VENV)/installed
	PYTHONPATH=bench $(BIN)/python -m gpu.kit

gpu-model: $(VENV)/installed
	PYTHONPATH=bench $(BIN)/python -m gpu_model.page

wheel: $(VENV)/installed
	$(BIN)/python tests/wheel_check.py

audit: $(SUPPLY)/installed
	$(SUPPLY)/bin/pip-audit -r constraints-hashed.txt --require-hashes --disable-pip --strict --progress-spinner off

sbom: $(VENV)/installed $(SUPPLY)/installed
	mkdir -p dist
	$(SUPPLY)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --mc-type library --output-reproducible -o dist/sbom.cdx.json

licences: $(VENV)/installed
	$(BIN)/python tests/licences.py

# The pins are of Python 3.11 and newer; which of them belong together is settled already, so nothing is resolved.
lock: $(SUPPLY)/installed
	$(SUPPLY)/bin/uv pip compile constraints.txt --no-deps --generate-hashes --universal --python-version 3.11 --no-annotate --quiet \
		--custom-compile-command "make lock" -o constraints-hashed.txt

hub: $(VENV)/installed
	$(BIN)/python bench/hub.py $(HUB_ARGS)

docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

docs-serve: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs serve --strict

# The variable silences an advertisement of mkdocs-material. What the site needs lies in an environment of its own, without torch: docstrings are read, not imported.
$(DOCS)/installed: constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip --disable-pip-version-check install -q -c constraints.txt mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

# Tools that look at the environment from outside, in one of their own.
$(SUPPLY)/installed:
	$(PYTHON) -m venv $(SUPPLY)
	$(SUPPLY)/bin/pip --disable-pip-version-check install -q $(SUPPLY_TOOLS)
	@touch $@

# The newest torch brings its own Triton; all else is pinned as in .venv. The package is this tree's, with the compiled part of .venv: the libraries are one
# binary for every torch >= 2.10, which this environment tests.
$(NEW)/installed: $(VENV)/installed
	$(PYTHON) -m venv $(NEW)
	grep -vE '^(torch|torchvision|triton|setuptools)==' constraints.txt > $(NEW)/constraints.txt
	$(NEW)/bin/pip --disable-pip-version-check install -q -c $(NEW)/constraints.txt $(NEWEST) numpy setuptools wheel ninja pybind11
	INTERFLOW_NATIVE=0 $(NEW)/bin/pip --disable-pip-version-check install -q -c $(NEW)/constraints.txt --no-build-isolation -e '.[train,bench,dev]'
	@touch $@

# timm and torchvision lie beside the environment, for tests and benchmarks (tests/torchvision_operators.py): inside it, a torchvision that does
# not load beside this torch would keep Lightning from loading.
# Requirements first, pinned; then the package itself, its compiled part built against the torch that is there.
$(VENV)/requirements: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch numpy setuptools wheel ninja pybind11
	@touch $@

$(VENV)/installed: $(VENV)/requirements setup.py $(shell find csrc interflow_kernels python -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -name '*.yaml')
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[train,data,bench,dev]'
	$(PIP) install -q -c constraints.txt --no-deps --upgrade --target $(VENV)/backbones timm torchvision
	@touch $@

clean:
	rm -rf build dist site *.egg-info interflow_kernels/*.so
