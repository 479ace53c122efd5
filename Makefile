# Every target sets up what it needs in .venv; `make verify` or `make test` can be the first command on a fresh clone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help verify test test-slow lint format typecheck-runtime gallery mutation fuzz device bench accuracy docs wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is no Python 3.11 or newer, which the development tools and TRL need." >&2; \
	  echo "       Name another one:  make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The development environment holds all that `verify` needs, so either may come first.
$(VENV)/.installed-verify: $(INPUTS) | $(VENV)/.created
	$(PIP) -e ".[cli,plots]"
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(VENV)/.created
	$(PIP) -e ".[dev]"
	@touch $(VENV)/.installed-verify $@

verify: $(VENV)/.installed-verify ## check every identity and refute every false twin; writes reports/verify.html
	$(BIN)/opdtheory verify

lint: $(VENV)/.installed-dev ## ruff, mypy and the import layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## lint, then the tests and doctests
	$(BIN)/python -m pytest -n auto --maxprocesses 8

test-slow: $(VENV)/.installed-dev ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

typecheck-runtime: $(VENV)/.installed-dev ## the tests with every annotation and shape checked at run time
	OPDTHEORY_TYPECHECK=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

format: $(VENV)/.installed-dev ## let ruff rewrite the sources
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# An environment of its own: the packages of the gallery are many, and installed without what they ask for.
GALLERY := build/gallery
$(GALLERY)/.installed: $(INPUTS) examples/published_losses/requirements.txt
	$(PYTHON) -m venv $(GALLERY)
	$(GALLERY)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[testing,trl]"
	$(GALLERY)/bin/python -m pip install -q --disable-pip-version-check --no-deps \
	  -r examples/published_losses/requirements.txt
	@touch $@

gallery: $(GALLERY)/.installed ## audit every published loss; writes docs/gallery.md
	$(GALLERY)/bin/python -W ignore examples/published_losses/gallery.py --page --require-all
	$(GALLERY)/bin/python -W ignore examples/published_losses/gallery.py --write README.md
	$(GALLERY)/bin/python -m pytest -p no:xdist -q tests/laws/test_gallery.py tests/laws/test_published_losses.py

mutation: $(VENV)/.installed-dev ## break the library term by term; writes docs/mutation.md (about an hour)
	$(BIN)/python -m tests.mutation --log reports/mutation.jsonl --page docs/mutation.md

fuzz: $(VENV)/.installed-dev ## 100,000 generated calls of the public border: each is right, or refused by name
	$(BIN)/python -m tests.fuzz --calls 100000

# Triton comes with torch for GPUs; where there is none it interprets the programs, and is for this alone.
device: $(VENV)/.installed-dev ## the tests for a GPU, interpreted on the CPU where there is none
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m pytest -n auto --maxprocesses 8 tests/laws/test_device.py; \
	else \
	  $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/device "triton>=3.9" && \
	  PYTHONPATH=build/device OPDTHEORY_TEST_DEVICE=cpu TRITON_INTERPRET=1 \
	    $(BIN)/python -m pytest -n auto --maxprocesses 8 tests/laws/test_device.py; \
	fi

bench: $(VENV)/.installed-dev ## time and memory beside TRL's, medians of alternated repeats; writes docs/performance.md
	$(BIN)/python benchmarks/fused.py --write docs/performance.md
	$(BIN)/python benchmarks/oracle.py --write docs/performance.md
	$(BIN)/python benchmarks/growth.py --write docs/performance.md

# The ball arithmetic is for this alone, and not where sympy would take it up.
accuracy: $(VENV)/.installed-dev ## errors of every function in units in the last place; writes docs/accuracy.md
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/accuracy "python-flint>=0.8"
	PYTHONPATH=build/accuracy $(BIN)/python benchmarks/accuracy.py --write docs/accuracy.md

docs: $(VENV)/.installed-dev ## the documentation, into site/
	$(BIN)/mkdocs build --strict

wheel: $(VENV)/.installed-dev ## a wheel, into dist/
	$(BIN)/python -m build --wheel

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist site reports .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
