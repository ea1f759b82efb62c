# make          lists the targets
# make demo     installs, prepares text, trains and samples: needs python3 and a package index, takes some minutes
SHELL := /bin/bash
PYTHON ?= python3
MODEL ?= gpt2
DATASET ?= stdlib
TOKENIZER ?= bpe:4096
ARGS ?=
SCALE ?= full
NANOGPT ?=
PROMPT ?= def main(
RUNS ?= $(patsubst %/log.csv,%,$(wildcard out/*/log.csv))
PY := .venv/bin/python
export DATASET TOKENIZER NANOGPT PROMPT # the shell quotes them: "$$PROMPT" may hold any character

help:
	@echo 'make demo PROMPT="def main("     prepare text, train a small GPT-2 on it, print a sample of every decoder'
	@echo 'make data DATASET=... TOKENIZER=...   token files in data/ (stdlib, tinystories, a .txt, ...; bpe:4096, gpt2, ...)'
	@echo 'make train MODEL=gpt2 ARGS=...  train a model file; ARGS are its options: ARGS="--preset report --device cuda"'
	@echo 'make compare                    all models on the same tokens, three seeds: results/compare.md; SCALE=quick'
	@echo 'make plot RUNS="out/a out/b"    validation loss of your own runs, over tokens and over time: out/plot.svg'
	@echo "make march                      MARCH's encoder-decoders at equal parameters: results/march.md; two hours"
	@echo 'make bench NANOGPT=DIR          speed beside nanoGPT (DIR is a clone of it), transformers, tokenizers and tiktoken'
	@echo 'make test                       run the tests'
	@echo 'make soak                       run the long tests: killed runs'
	@echo 'make lint                       check the code with ruff'
	@echo 'make clean                      remove .venv and caches, but not data/ and out/'

# Stamps: packages are installed again only when their list changes.
.venv/installed: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@echo 'Installed in .venv. To use its python in this shell: source .venv/bin/activate'
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: .venv/installed
	test -f data/stdlib/meta.json || $(PY) prepare_data.py stdlib
	$(PY) gpt2.py --preset demo --out out/demo $$(test -f out/demo/ckpt.pt && echo --resume)
	$(PY) sample.py --ckpt out/demo/ckpt.pt --decode all --prompt "$$PROMPT"
	@echo 'To continue by yourself: source .venv/bin/activate; python sample.py --ckpt out/demo/ckpt.pt --prompt "import"'

data: .venv/installed
	$(PY) prepare_data.py "$$DATASET" --tokenizer "$$TOKENIZER" $(ARGS)

train: .venv/installed
	$(PY) $(MODEL).py $(ARGS)

compare: .venv/installed-dev
	$(PY) bench/compare.py '$(SCALE)'

plot: .venv/installed-dev
	$(foreach run,$(RUNS),$(if $(wildcard $(run)/log.csv),,$(error $(run): no log.csv in this folder)))
	$(PY) bench/runs.py $(or $(RUNS),$(error no run in out/ yet. Try make demo))
	@echo 'Drawn: out/plot.svg'

march: .venv/installed-dev
	$(PY) bench/march.py

bench: .venv/installed-dev
	$(PY) bench/train.py $${NANOGPT:+--nanogpt "$$NANOGPT"}
	$(PY) bench/decode.py
	$(PY) bench/growth.py
	$(PY) bench/data.py

test: .venv/installed-dev
	$(PY) -m pytest -n auto

soak: .venv/installed-dev
	$(PY) tests/soak.py

lint: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv __pycache__ bench/__pycache__ tests/__pycache__ .pytest_cache .ruff_cache

.PHONY: help demo data train compare plot march bench test soak lint clean
