# Everything happens in .venv, which the first target makes.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-quick versions lint bench accuracy aot gpu gpu-dry clean

help:  ## say what the targets do
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(RUN) -m pip check --disable-pip-version-check
	touch $@

demo: $(INSTALLED)  ## adapt a frozen backbone with LION beside VPT-deep and a linear probe
	$(RUN) -m lion_fast demo

test: $(INSTALLED) lint  ## all tests that a machine without a GPU can run
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist worksteal

test-quick: $(INSTALLED)  ## the tests that take seconds
	$(RUN) -m pytest -m 'not slow'

# OLDEST: a Python that the oldest releases have wheels for. The tools of bench/ need a Triton that compiles the kernels.
OLDEST ?= python3.10
OLD := build/oldest
$(OLD)/.installed: setup.py pyproject.toml
	$(OLDEST) -m venv --clear $(OLD)
	sed -nE 's/.*"([A-Za-z0-9._-]+)>=([0-9.]+)".*/\1==\2/p' setup.py > $(OLD)/oldest.txt
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OLD)/oldest.txt --editable '.[dev]'
	$(OLD)/bin/python -m pip check --disable-pip-version-check
	touch $@

versions: $(INSTALLED) $(OLD)/.installed  ## the tests on the oldest releases that setup.py allows; adapters to and fro
	OMP_NUM_THREADS=1 $(OLD)/bin/python -m pytest --numprocesses 2 --dist worksteal -m 'not slow' --ignore tests/bench
	rm -rf build/adapters
	$(OLD)/bin/python tests/exchange.py write build/adapters/oldest
	$(RUN) tests/exchange.py write build/adapters/newest
	$(OLD)/bin/python tests/exchange.py read build/adapters/newest
	$(RUN) tests/exchange.py read build/adapters/oldest

lint: $(INSTALLED)  ## style and unused code
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(INSTALLED)  ## cost of the layer, of every method's hot pieces, and of every method on this machine
	$(RUN) -m pytest bench/bench_layer.py bench/bench_methods.py \
		--benchmark-columns=mean,min,median,max,rounds --benchmark-sort=mean
	$(RUN) -m lion_fast bench --out bench/results/methods-cpu --device cpu

# GRID names one grid, ARGUMENTS more options: make accuracy GRID=bench/accuracy/smoke.yaml
# By default all but the grid of a GPU, which is too large for a CPU.
GRID ?= $(filter-out bench/accuracy/gpu.yaml,$(wildcard bench/accuracy/*.yaml))
accuracy: $(INSTALLED)  ## run what is left of the accuracy experiments in bench/accuracy, and report
	set -e; for grid in $(GRID); do \
		$(RUN) -m lion_fast experiment $$grid --out bench/results/accuracy/$$(basename $$grid .yaml) $(ARGUMENTS); \
	done

aot: $(INSTALLED)  ## compile every kernel for sm_80, sm_90 and sm_100, without a GPU
	$(RUN) bench/aot.py

# make gpu STAGE="warm first" OUT=folder MINUTES=7; STAGE: warm, first, tests, rest, accuracy (all)
STAGE ?=
OUT ?= bench/results
MINUTES ?= 25
gpu:  ## check, then measure kernels and methods on this machine's GPU, with its own python3
	PYTHONPATH=.:kernels $(PYTHON) bench/gpu/run.py $(STAGE) --out $(OUT) --minutes $(MINUTES)

gpu-dry: $(INSTALLED)  ## rehearse `make gpu` on a CPU with tiny shapes
	PYTHONPATH=.:kernels $(VENV)/bin/python bench/gpu/run.py --dry-run --device cpu --out runs/gpu-dry

clean:  ## remove what the targets made, downloads excepted
	rm -rf $(VENV) build dist *.egg-info runs
