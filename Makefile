# make lab      the course: JupyterLab opens on its index
# make app      all explorers without code, as one page
# make site     the planner as static pages, in build/site: no server, no install for whoever opens them
# make docs     the reference, from the docstrings, in build/docs
# make test     everything CI runs: lint, unit, browser, notebooks
# make soak     the long forms of the tests, and half an hour of random models
# make places   every notebook on one core with 2 GB, as on Binder
# make bench    side by side against Accelerate and Transformers
# make lint | format | unit | browser | notebooks | clean
#
# All of them share .venv, and install only when pyproject.toml or constraints.txt have changed.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first Python on PATH that is new enough; `make lab PYTHON=/path/to/python` overrules it.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10,\
            $(shell $(p) -c '$(NEW_ENOUGH)' 2>/dev/null && echo $(p))))

test unit browser notebooks soak bench: export HF_HUB_OFFLINE = 1
# Tests run in as many processes as there are cores, each with a thread of its own.
test unit notebooks soak: export OMP_NUM_THREADS = 1
PYTEST := $(BIN)/python -m pytest -q $(AGAIN)
# A file at a time, in the order of tests/conftest.py: the long ones first.
EACH   := -n logical --dist loadfile --no-loadscope-reorder

.PHONY: lab app site docs test lint format unit browser notebooks places soak bench clean
.NOTPARALLEL:

lab: $(STAMP)
	@$(BIN)/python scripts/lab.py

app: $(STAMP)
	@$(BIN)/python -m bigkit.widgets.app

site: $(STAMP)
	@$(BIN)/python scripts/make_site.py build/site

docs: $(STAMP)
	@$(BIN)/python scripts/make_docs.py build/docs

test: lint # unit, browser and notebooks in one pool, so that no core waits for another
	$(PYTEST) $(EACH) --nbval tests/browser notebooks tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

unit: $(STAMP)
	$(PYTEST) $(EACH) tests --ignore=tests/browser

browser: $(STAMP)
	$(PYTEST) tests/browser

notebooks: $(STAMP)
	$(PYTEST) $(EACH) --nbval notebooks

places: $(STAMP)
	$(BIN)/python scripts/try_places.py binder

soak: $(STAMP)
	$(PYTEST) -n logical --dist worksteal -m soak tests
	$(BIN)/python scripts/soak.py --minutes 30

bench: $(STAMP)
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf $(VENV) build dist screenshots .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamp comes last, so an interrupted install is taken up again by the next make.
$(STAMP): pyproject.toml constraints.txt
	@$(if $(PYTHON),$(PYTHON),false) -c '$(NEW_ENOUGH)' || \
	  { echo "bigkit needs Python 3.10 or newer: install one, or say which with make PYTHON=/path/to/python"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[torch,lab,app,docs,quant,diffusers,peft,test]'
	@$(BIN)/python -m pip check
	@touch $(STAMP)
