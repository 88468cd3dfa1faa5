# Two commands do everything: `make book` and `make test`. Everything they write is git-ignored.
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
BIN := .venv/bin
export LORA_OPCM_CACHE ?= $(CURDIR)/.cache
export HF_HUB_OFFLINE ?= $(if $(filter gpu,$(PROFILE)),0,1)# only that profile needs the hub
export TOKENIZERS_PARALLELISM ?= false
unexport PYTHONDONTWRITEBYTECODE# a module is compiled once, and not by each of a thousand processes
export OMP_WAIT_POLICY ?= PASSIVE# threads that wait must not spin on cores that others use

PAGES := $(shell find book -type f -not -path '*/.ipynb_checkpoints/*' -not -path '*/__pycache__/*' -not -path 'book/paper/*') _config.yml _toc.yml
EXECUTED := $(wildcard _build/quick/executed/*.ipynb _build/gpu/executed/*.ipynb)
PROFILE ?= quick
# A test waits for disk, browser or kernel a third of its time, so there is one process more than cores; threads of
# linear algebra would spin on each other's cores.
CORES := $(shell getconf _NPROCESSORS_ONLN)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(shell expr $(CORES) + 1) --maxprocesses 4 --dist loadgroup
SNAKEMAKE := $(BIN)/snakemake --cores all --keep-going --rerun-incomplete --quiet host reason

.PHONY: book test quick mutants adapters experiments evidence publish bench gpu pdf figures paper cards release address lint clean help
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

book: experiments  ## install, fetch the data, run the experiments, build the site
	@$(MAKE) --no-print-directory _build/site/index.html
	@echo; $(BIN)/python -c "from lora_opcm.lab.evidence.tables import headline; print('Gain kept by one adapter in place of eight, %'); print(headline().round(1).to_string())"
	@echo; echo "The book: $(CURDIR)/_build/site/index.html"

test: experiments  ## unit tests, every chapter under nbval, the site in a browser
	@$(MAKE) --no-print-directory _build/site/index.html
	@$(BIN)/python book/_ext/chromium.py || true  # without a browser its tests are skipped, and the run is not green
	$(PYTEST)

experiments: $(BIN)/.ready  ## run what is not up to date: PROFILE=quick (default), full, gpu or rehearsal; DRY_RUN=1 lists it
	$(SNAKEMAKE) --config profile=$(PROFILE) $(if $(DRY_RUN),--dry-run)

evidence: $(BIN)/.ready  ## the run behind the bake-off and the streams, from nothing: minutes on a GPU, hours on processors; BASE=mpnet or smollm2: its main rows on another base, of LIMIT=150 texts a task (0: all)
	$(BIN)/python -m lora_opcm.lab.evidence.run _build/evidence$(BASE:%=-%) $(BASE:%=--base % --limit $(or $(LIMIT),150))
	$(BIN)/python -m lora_opcm.lab.evidence.publish _build/evidence$(BASE:%=-%)/outcomes.jsonl $(BASE:%=--to data/results/%.xz)

publish: $(if $(filter full gpu,$(PROFILE)),experiments)  ## put the tables of a full run into data/results (make publish PROFILE=full)
	@test -n "$(filter full gpu,$(PROFILE))" || { echo "the $(PROFILE) profile is no published run: make publish PROFILE=full"; exit 1; }
	cp $(filter-out %/bake_off.csv %/order.csv %/eight_adapters.csv,$(wildcard _build/$(PROFILE)/results/*.csv)) data/results/  # those only check what is published
	$(BIN)/python book/_ext/status.py record _build/$(PROFILE)/executed

quick: $(BIN)/.ready  ## the fast tests, under 90 seconds
	$(PYTEST) --numprocesses $(CORES) -m "not slow and not browser and not nightly"  # these do not wait

mutants: $(BIN)/.ready  ## change the package in N=100 places drawn by SEED=0 (N=0: in all), one at a time: which do the fast tests miss?
	$(BIN)/python tests/mutants.py $(or $(N),100) --seed $(or $(SEED),0) $(if $(LEAST),--least $(LEAST))

adapters: $(BIN)/.ready  ## retrain the shipped adapters that are missing or were trained otherwise
	$(BIN)/python -m lora_opcm.lab.train data/adapters
	@$(BIN)/python tools/cards.py

bench: $(BIN)/.ready  ## time and memory of merging, against the dense algorithm and the floor
	$(BIN)/python -m lora_opcm.lab.experiments.bench

# In ten minutes. Runs go on where they stopped, so that what did not fit is done by another call. No network is needed
# once the base models and the texts are in the cache. All steps are tried, whatever fails.
gpu: $(BIN)/.ready  ## on a machine with a CUDA card: its tests, the bench, adapters and outcomes of MiniLM and of SmolLM2
	@$(BIN)/python -c 'import torch; torch.cuda.is_available() or exit("no CUDA card is found here")'
	@failed=0; try() { echo "$$*"; "$$@" || failed=1; }; \
	try timeout 90 env $(PYTEST) tests/test_scale.py; \
	try timeout 60 $(BIN)/python -m lora_opcm.lab.experiments.bench card; \
	try $(BIN)/python -m lora_opcm.lab.evidence.run _build/gpu/evidence --seconds 120; \
	try $(BIN)/python -m lora_opcm.lab.evidence.run _build/gpu/elsewhere --base smollm2 --seconds 150; \
	try $(BIN)/python -m lora_opcm.lab.generation.run _build/gpu/puzzles --deadline 180; exit $$failed

pdf: book  ## the book as one file, _build/book.pdf
	@$(BIN)/python book/_ext/chromium.py
	$(BIN)/python book/_ext/press.py pdf

figures: $(BIN)/.ready _build/paper/numbers.tex  ## from data/results: pictures of README and link previews, figures one takes hold of, the paper's panels
	@$(BIN)/python book/_ext/chromium.py
	$(BIN)/python book/_ext/press.py figures
	$(BIN)/python -m lora_opcm.site.explore

paper: $(BIN)/.ready  ## the paper, _build/paper/main.pdf (needs of Debian's TeX latexmk and texlive-latex-recommended)
	@latexmk -version >/dev/null 2>&1 && kpsewhich booktabs.sty >/dev/null || \
	  { echo "no TeX found: install Debian's packages latexmk and texlive-latex-recommended"; exit 1; }
	@$(MAKE) --no-print-directory _build/paper/numbers.tex
	@cd _build/paper && TEXINPUTS=.:$(CURDIR)/book/paper: latexmk -pdf -silent -halt-on-error -interaction=nonstopmode main.tex
	@echo "The paper: $(CURDIR)/_build/paper/main.pdf"

_build/paper/numbers.tex: book/paper/main.tex book/references.bib $(wildcard book/_ext/*.py data/results/*) | $(BIN)/.ready
	@echo "Numbers, tables and panels of the paper"
	@$(BIN)/python book/_ext/chromium.py
	@$(BIN)/python book/_ext/press.py panels && touch $@

cards: $(BIN)/.ready  ## the model cards of the shipped adapters, from their manifest and results
	$(BIN)/python tools/cards.py

release: $(BIN)/.ready  ## wheel and sdist in dist/, built, installed from nothing and tried
	$(BIN)/python tools/release.py

address: $(BIN)/.ready  ## move the repository's address: make address URL=https://github.com/OWNER/NAME
	$(BIN)/python tools/address.py $(URL)

lint: $(BIN)/.ready  ## ruff, mypy, and zizmor for the workflows
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/zizmor --offline --quiet .github/workflows

clean:  ## remove what was built; keeps .venv and the downloads
	rm -rf _build

$(BIN)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv (a minute or two the first time)"  # not compiled: most modules are never imported
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

# The site serves the wheel that its notebooks install on Colab.
_build/wheels/.built: $(shell find lora_opcm -name '*.py') data/adapters/manifest.json $(wildcard data/results/*) pyproject.toml | $(BIN)/.ready
	@rm -rf $(@D)
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(@D) .
	@touch $@

# The model that a page computes with, read only when a reader asks for it.
_build/live/.built: lora_opcm/site/live.py $(wildcard lora_opcm/merging/*.py lora_opcm/merging/rules/*.py) data/adapters/manifest.json | $(BIN)/.ready
	@$(BIN)/python -m lora_opcm.site.live _build
	@touch $@

# Experiments are executed out of tree, so `git status` stays clean; the site is built from that copy.
_build/site/index.html: $(PAGES) $(EXECUTED) _build/wheels/.built _build/live/.built | $(BIN)/.ready
	@echo "Building the site"
	@rm -rf _build/source && mkdir -p _build/source
	@cp -r book _config.yml _toc.yml _build/source/ && cp $(EXECUTED) _build/source/book/experiments/
	@mkdir _build/source/book/_static/wheels && cp _build/wheels/*.whl _build/source/book/_static/wheels/
	@cp -r _build/live _build/source/book/_static/explore/
	@$(BIN)/python book/_ext/status.py _build/quick/executed _build/source/book
	@$(BIN)/jupyter-book build --warningiserror --nitpick --keep-going --quiet --path-output _build/jb _build/source
	@rm -rf _build/site && mv _build/jb/_build/html _build/site
