# Python 3.11 or 3.12 and make are all that a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo demo_rn test test-slow test-reliability test-network examples lint clean

help:  ## this list
	@grep -E '^[a-z-]+[a-z_]*:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z_-]+):[^#]*## */  make \1\t/' | expand -t 22

$(VENV)/installed: requirements.txt requirements-prompts.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-prompts.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

demo: $(VENV)/installed  ## train a small CLIP, classify zero-shot, write a page with pictures
	$(BIN)/python train.py --config demo --workdir $(DEMO)
	$(BIN)/python evaluate.py --config demo --weights $(DEMO) --output $(DEMO)/results.json --report $(DEMO)/report.html

demo_rn: $(VENV)/installed  ## the same with a ModifiedResNet image tower
	$(BIN)/python train.py --config demo_rn --workdir $(DEMO)_rn
	$(BIN)/python evaluate.py --config demo_rn --weights $(DEMO)_rn --output $(DEMO)_rn/results.json --report $(DEMO)_rn/report.html

test: $(VENV)/installed-test  ## lint and the test suite (about 13 minutes on 2 cores)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed-test  ## the longer tests: all nine models at full size, more texts, more mutations
	$(BIN)/python -m pytest -m slow --ignore tests/reliability

test-reliability: $(VENV)/installed-test  ## runs that are killed at every moment, on a full disk, in a bucket: about 25 minutes
	$(BIN)/python -m pytest -n 0 -m "slow or not slow" tests/reliability

test-network: $(VENV)/installed-test  ## OpenAI's published values with the real weights (downloads gigabytes)
	$(BIN)/python -m pytest -m network

examples: $(VENV)/installed-test  ## run the notebooks of examples/ and write their pages, docs/examples
	$(BIN)/python -m examples.pages

clean:  ## remove the virtual environment and the demo's run
	rm -rf $(VENV) runs
