# make train [ARGS="+ablation=uniform_ref"]   make test   make test-all   make quick   make test-gpu   make check   (all in one venv)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: train test test-all quick test-gpu check clean
train: $(STAMP)
	$(BIN)/python -m dpo_lab.train $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not extended" $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not (slow or ranks or browser or imdb or gpu or extended)" $(ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	-$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib  # pip would do it on one core
	touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache dist
