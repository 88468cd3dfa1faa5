# Two commands do everything: `make book` and `make test`. Everything they write is git-ignored.
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
BIN := .venv/bin
export LORA_OPCM_CACHE ?= $(CURDIR)/.cache
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export OMP_WAIT_POLICY ?= PASSIVE# threads that wait must not spin on cores that others use

PACKAGE := $(wildcard lora_opcm/*.py lora_opcm/lab/*.py)
EXPERIMENTS := $(patsubst book/experiments/%.ipynb,_build/executed/%.ipynb,$(wildcard book/experiments/*.ipynb))
PAGES := $(shell find book -type f -not -path '*/.ipynb_checkpoints/*' -not -path '*/__pycache__/*') _config.yml _toc.yml
TEXTS := 200# test texts a task in the quick profile

.PHONY: book test quick adapters publish bench lint clean help
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

book: _build/site/index.html  ## install, fetch the data, run the experiments, build the site
	@echo; $(BIN)/python -c "import pandas as pd; from lora_opcm.lab.results import comparison; print(comparison(pd.read_csv('_build/results/one_merge.csv')).to_string())"
	@echo; echo "The book: $(CURDIR)/_build/site/index.html"

test: _build/site/index.html  ## unit tests, every chapter under nbval, the site in a browser
	$(BIN)/pytest

quick: $(BIN)/.ready  ## the fast tests, under 2 minutes
	$(BIN)/pytest -m "not slow and not browser"

adapters: $(BIN)/.ready  ## retrain the shipped adapters that are missing or were trained otherwise
	$(BIN)/python -m lora_opcm.lab.train data/adapters

publish: $(BIN)/.ready  ## run the experiments on all test texts and put the tables into data/results
	mkdir -p _build/published
	for nb in book/experiments/*.ipynb; do \
	  $(BIN)/papermill --progress-bar $$nb _build/published/$$(basename $$nb) \
	    -p texts 0 -p profile full -p results data/results || exit 1; done

bench: $(BIN)/.ready  ## time and memory of merging, against the dense algorithm and the floor
	$(BIN)/python -m lora_opcm.lab.bench

lint: $(BIN)/.ready  ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:  ## remove what was built; keeps .venv and the downloads
	rm -rf _build

$(BIN)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

# Executed out of tree: papermill never writes beside its source, so `git status` stays clean.
_build/executed/%.ipynb: book/experiments/%.ipynb $(PACKAGE) data/adapters/manifest.json | $(BIN)/.ready
	@mkdir -p $(@D) _build/results
	@echo "Running $<"
	$(BIN)/papermill --progress-bar --kernel python3 $< $@ -p texts $(TEXTS) -p profile quick -p results _build/results

_build/site/index.html: $(PAGES) $(EXPERIMENTS) | $(BIN)/.ready
	@echo "Building the site"
	@rm -rf _build/source && mkdir -p _build/source
	@cp -r book _config.yml _toc.yml _build/source/ && cp $(EXPERIMENTS) _build/source/book/experiments/
	@$(BIN)/jupyter-book build --warningiserror --nitpick --keep-going --quiet --path-output _build/jb _build/source
	@rm -rf _build/site && mv _build/jb/_build/html _build/site
