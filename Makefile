# make          what can be done
# make demo     on a machine with python3 and a package index: everything, in some minutes
SHELL := /bin/bash
PYTHON ?= python3
MODEL ?= gpt2
DATASET ?= stdlib
TOKENIZER ?= bpe:4096
ARGS ?=
SCALE ?= cpu
NANOGPT ?=
PROMPT ?= def main(
PY := .venv/bin/python

help:
	@echo 'make demo                       prepare text, train a small GPT-2 on it, print a sample of every decoder'
	@echo 'make data DATASET=... TOKENIZER=...   token files in data/ (stdlib, tinystories, a .txt, ...; bpe:4096, gpt2, ...)'
	@echo 'make train MODEL=gpt2 ARGS=...  train a model file; ARGS are its options: ARGS="--preset report --device cuda"'
	@echo 'make compare SCALE=cpu          all models on the same tokens, as a table, a plot and samples in assets/; or gpu'
	@echo 'make march                      the same parameters as width, depth, heads or gates: nine shapes of gpt2.py'
	@echo 'make bench NANOGPT=DIR          speed beside nanoGPT (a clone of it), transformers, tokenizers and tiktoken'
	@echo 'make test                       run the tests'
	@echo 'make soak                       the long tests: kill, fill, damage, for twenty minutes'
	@echo 'make lint                       check the code with ruff'
	@echo 'make clean                      remove .venv and caches; data/ and out/ stay'

# Stamps: what is installed is installed again only when the list changes.
.venv/installed: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: .venv/installed
	test -f data/stdlib/meta.json || $(PY) prepare_data.py stdlib
	$(PY) gpt2.py --preset demo --out out/demo $$(test -f out/demo/ckpt.pt && echo --resume)
	$(PY) sample.py --ckpt out/demo/ckpt.pt --decode all --prompt '$(PROMPT)'

data: .venv/installed
	$(PY) prepare_data.py '$(DATASET)' --tokenizer '$(TOKENIZER)' $(ARGS)

train: .venv/installed
	$(PY) $(MODEL).py $(ARGS)

compare: .venv/installed-dev
	$(PY) bench/compare.py --scale '$(SCALE)'

march: .venv/installed-dev
	$(PY) bench/march.py

bench: .venv/installed-dev
	test -z '$(NANOGPT)' || $(PY) bench/train.py --nanogpt '$(NANOGPT)'
	$(PY) bench/decode.py
	$(PY) bench/bpe.py
	$(PY) bench/prepare.py --mb 50 --turns 3

test: .venv/installed-dev
	$(PY) -m pytest -n auto

soak: .venv/installed-dev
	$(PY) tests/soak.py

lint: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv __pycache__ tests/__pycache__ .pytest_cache .ruff_cache

.PHONY: help demo data train compare march bench test soak lint clean
