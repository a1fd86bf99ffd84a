# make train [ARGS="+ablation=uniform_ref"]   make test   make test-all   make quick   make test-gpu   make check   (all in one venv)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# one more than two cores: many tests wait for processes that they started
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: train test test-all quick test-gpu check clean
train: $(STAMP)
	$(BIN)/python -m dpo_lab.train $(ARGS)

test: $(STAMP)
	$(PYTEST) -m "not extended" $(ARGS)

test-all: $(STAMP)
	$(PYTEST) $(ARGS)

quick: $(STAMP)
	$(PYTEST) -m "not (slow or ranks or browser or imdb or gpu or extended)" $(ARGS)

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
