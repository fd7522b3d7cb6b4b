PYTHON ?= python3
PY := .venv/bin/python
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
SOAK_ARGS ?=

.PHONY: help setup setup-test demo docs lint test test-gpu soak clean

help:
	@echo "make setup   .venv with everything that belongs to this machine (CPU or NVIDIA GPU)"
	@echo "make demo    the whole way on a generated world: train, evaluate, index, recommend"
	@echo "make test    what must pass before a commit: lint, types, tests (PYTEST_ARGS='-k index')"
	@echo "make test-gpu  what a GPU makes of the same work, on a machine with one: make test is of CPUs, and hides it"
	@echo "make soak    every fault as often as it takes (some 25 minutes), to soak.json (SOAK_ARGS='--share 0.1')"
	@echo "make lint    style and types alone"
	@echo "make docs    the documentation as a site, in site/; a broken link fails"
	@echo "make clean   remove what tools left behind; .venv, data and runs stay"
	@echo "PYTHON=python3.12 picks another interpreter; TREC_TT_DEVICE=cpu|gpu overrides what setup detects; TEST_PROCESSES=1 runs tests in turn"

setup:
	@$(PYTHON) launch/setup_env.py

setup-test:
	@$(PYTHON) launch/setup_env.py --test

demo: setup
	@$(PY) -m trec_twotower demo

docs:
	@$(PYTHON) launch/setup_env.py --docs
	$(PY) docs/site/generate_reference.py --check
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --config-file docs/site/mkdocs.yml
	@echo "site/index.html"

lint: setup-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not soak" $(PYTEST_ARGS)

test-gpu: setup-test
	$(PY) -m pytest tests/test_gpu.py tests/index/test_index.py::test_the_gpu_answers_as_the_cpu_does $(PYTEST_ARGS)

soak: setup-test
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PY) -m pytest -m soak
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PY) -m tests.soak $(SOAK_ARGS)

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
