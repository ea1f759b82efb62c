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
TORCH ?=
RUNS ?= $(patsubst %/log.csv,%,$(wildcard out/*/log.csv))
VENV := .venv$(TORCH:%=-%)
PY := $(VENV)/bin/python
export DATASET TOKENIZER NANOGPT PROMPT # the shell quotes them: "$$PROMPT" may hold any character

help:
	@echo 'make demo PROMPT="def main("     prepare text, train a small GPT-2 on it, print a sample of every decoder'
	@echo 'make data DATASET=... TOKENIZER=...   token files in data/ (stdlib, tinystories, a .txt, ...; bpe:4096, gpt2, ...)'
	@echo 'make train MODEL=gpt2 ARGS=...  train a model file, with --preset demo or ARGS: ARGS="--preset report --device cuda"'
	@echo 'make compare                    all models on the same tokens, three seeds: results/compare.md; SCALE=quick'
	@echo 'make plot RUNS="out/a out/b"    validation loss of your own runs, over tokens and over time: out/plot.svg'
	@echo 'make ablate                     what each line of gpt2.py is worth: results/ablations.md; three hours; SCALE=quick'
	@echo "make march                      MARCH's encoder-decoders at equal parameters: results/march.md; two hours"
	@echo 'make bench NANOGPT=DIR          speed beside nanoGPT (DIR is a clone of it) and transformers'
	@echo 'make test                       run the tests; TORCH=2.14.1: with that torch, in .venv-2.14.1'
	@echo 'make mutants                    plant 65 faults, one after the other: which does no test notice?'
	@echo 'make soak                       run the long tests: killed runs'
	@echo 'make lint                       check the code with ruff'
	@echo 'make clean                      remove .venv, .venv-* and caches, but not data/ and out/'

# Stamps: packages are installed again only when their list changes.
$(VENV)/installed: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	sed 's/^torch==.*/$(or $(TORCH:%=torch==%),&)/' requirements.txt > $(VENV)/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements.txt
	@echo 'Installed in $(VENV). To use its python in this shell: source $(VENV)/bin/activate'
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	cp requirements-dev.txt $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements-dev.txt
	@touch $@

demo: $(VENV)/installed
	test -f data/stdlib/meta.json || $(PY) prepare_data.py stdlib
	$(PY) gpt2.py --preset demo --out out/demo $$(test -f out/demo/ckpt.pt && echo --resume)
	$(PY) sample.py --ckpt out/demo/ckpt.pt --decode all --prompt "$$PROMPT"
	@echo 'To continue by yourself: source .venv/bin/activate; python sample.py --ckpt out/demo/ckpt.pt --prompt "import"'

data: $(VENV)/installed
	$(PY) prepare_data.py "$$DATASET" --tokenizer "$$TOKENIZER" $(ARGS)

train: $(VENV)/installed
	$(PY) $(MODEL).py $(or $(ARGS),--preset demo)

compare: $(VENV)/installed-dev
	$(PY) bench/compare.py '$(SCALE)'

plot: $(VENV)/installed-dev
	$(foreach run,$(RUNS),$(if $(wildcard $(run)/log.csv),,$(error $(run): no log.csv in this folder)))
	$(PY) bench/runs.py $(or $(RUNS),$(error no run in out/ yet. Try make demo))
	@echo 'Drawn: out/plot.svg'

march: $(VENV)/installed-dev
	$(PY) bench/ablate.py march

ablate: $(VENV)/installed-dev
	$(PY) bench/ablate.py '$(SCALE)'

bench: $(VENV)/installed-dev
	$(PY) bench/train.py $${NANOGPT:+--nanogpt "$$NANOGPT"}
	$(PY) bench/decode.py
	$(PY) bench/growth.py

test: $(VENV)/installed-dev
	env -u TORCH -u MAKEFLAGS $(PY) -m pytest -n auto # some tests call make

mutants: $(VENV)/installed-dev
	$(PY) tests/mutants.py

soak: $(VENV)/installed-dev
	$(PY) tests/soak.py

lint: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv .venv-* __pycache__ bench/__pycache__ tests/__pycache__ .pytest_cache .ruff_cache

.PHONY: help demo data train compare plot ablate march bench test mutants soak lint clean
