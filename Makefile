# Every target sets up what it needs in .venv: `make verify` or `make test` can be the first command on a fresh clone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt opdtheory/version.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help verify test test-slow lint format typecheck-runtime gallery trainers verl runs mutation fuzz device bench accuracy coverage proofs docs browser wheel release clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' must be Python 3.11 or newer, which the development tools and TRL need." >&2; \
	  echo "       Choose another one:  make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The development environment includes everything that `verify` needs, so either may come first.
$(VENV)/.installed-verify: $(INPUTS) | $(VENV)/.created
	$(PIP) -e ".[cli,plots]"
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(VENV)/.created
	$(PIP) -e ".[dev]"
	@touch $(VENV)/.installed-verify $@

verify: $(VENV)/.installed-verify ## check every identity and refute every false twin; writes reports/verify.html
	$(BIN)/opdtheory verify

lint: $(VENV)/.installed-dev ## run ruff, mypy and the import layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## lint, then run the tests and doctests
	$(BIN)/python -m pytest -n auto --maxprocesses 8

test-slow: $(VENV)/.installed-dev ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

typecheck-runtime: $(VENV)/.installed-dev ## run the tests with every annotation and shape checked at run time
	OPDTHEORY_TYPECHECK=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

format: $(VENV)/.installed-dev ## format the sources with ruff
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# A separate environment: the gallery needs many packages, which are installed without their dependencies.
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

trainers: $(VENV)/.installed-dev ## audit whole trainers of TRL and our own; compares docs/trainers.md with what is found
	$(BIN)/python -W ignore examples/trainers/gallery.py
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/trl_1_0 "trl==1.0.0"
	PYTHONPATH=build/trl_1_0 $(BIN)/python -W ignore examples/trainers/gallery.py --only "TRL 1.0.0"

# Another environment: verl needs an older transformers.
VERL := build/verl
$(VERL)/.installed: $(INPUTS) examples/trainers/requirements-verl.txt
	$(PYTHON) -m venv $(VERL)
	$(VERL)/bin/python -m pip install -q --disable-pip-version-check -r examples/trainers/requirements-verl.txt
	$(VERL)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

verl: $(VERL)/.installed ## audit verl's engine below its rollout, in an environment of its own; writes docs/verl.md
	$(VERL)/bin/python examples/trainers/verl_monitor.py
	$(VERL)/bin/python examples/trainers/verl_engine.py --page docs/verl.md

runs: $(VENV)/.installed-dev ## make the runs that a diagnosis is held to, of two students, and read them in all formats
	$(BIN)/python examples/runs/make.py --out build/runs/first --cache build/runs/models --logits
	$(BIN)/python examples/runs/make.py --out build/runs/second --cache build/runs/models --seed 11 --pair-seed 1
	$(BIN)/python examples/runs/check.py build/runs/first build/runs/second

mutation: $(VENV)/.installed-dev ## break the library term by term; writes docs/mutation.md (about an hour)
	$(BIN)/python -m tests.mutation --log reports/mutation.jsonl --page docs/mutation.md

fuzz: $(VENV)/.installed-dev ## make 100,000 generated calls of the public API: each is right or raises a clear error
	$(BIN)/python -m tests.fuzz --calls 100000

# Triton comes with torch for GPUs. Without a GPU it is installed for this target only and interprets the programs.
DEVICE_TESTS := tests/laws/test_device.py tests/laws/test_device_costs.py tests/kernels/programs tests/kernels/test_few.py
device: $(VENV)/.installed-dev ## run the tests for a GPU; without one, interpret them on the CPU
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m pytest -n auto --maxprocesses 8 $(DEVICE_TESTS); \
	else \
	  $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/device "triton>=3.9" && \
	  PYTHONPATH=build/device OPDTHEORY_TEST_DEVICE=cpu TRITON_INTERPRET=1 \
	    $(BIN)/python -m pytest -n auto --maxprocesses 8 $(DEVICE_TESTS); \
	fi

bench: $(VENV)/.installed-dev ## compare time and memory with TRL (medians of alternated repeats); writes docs/performance.md
	$(BIN)/python benchmarks/fused.py --write docs/performance.md
	$(BIN)/python benchmarks/hidden.py --write docs/performance.md
	$(BIN)/python benchmarks/oracle.py --write docs/performance.md
	$(BIN)/python benchmarks/growth.py --write docs/performance.md

# The ball arithmetic is for this target only, and kept away from sympy, which would use it.
accuracy: $(VENV)/.installed-dev ## measure every function's error in units in the last place; writes docs/accuracy.md
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/accuracy "python-flint>=0.8"
	PYTHONPATH=build/accuracy $(BIN)/python benchmarks/accuracy.py --write docs/accuracy.md

coverage: $(VENV)/.installed-dev ## measure how often sampled audits are wrong; writes docs/coverage.md
	$(BIN)/python benchmarks/coverage.py --write docs/coverage.md

# Neither .venv nor any package is needed.
proofs: ## check the theorems in Coq; says what to install where coqc is missing
	$(PYTHON) proofs/check.py

docs: $(VENV)/.installed-dev ## build the documentation in site/
	$(BIN)/mkdocs build --strict

# Asked first what is missing, so that nothing is installed in vain.
browser: $(VENV)/.installed-dev ## walk every page of the site and the reports in headless Chromium, with the network off
	@$(BIN)/python -m tests.browser.chromium
	$(PIP) -e ".[browser]"
	OPDTHEORY_BROWSER=1 $(BIN)/python -m pytest -q -p no:xdist tests/browser
	$(BIN)/python -m tests.browser

wheel: $(VENV)/.installed-dev ## build a wheel in dist/
	$(BIN)/python -m build --wheel

# Interpreters are found by name, `python3.10` to `python3.13`; each environment holds torch, so have 10 GB of disk.
release: $(VENV)/.installed-dev ## build sdist and wheel, try both on Python 3.10 to 3.13 and at both ends of the ranges
	$(BIN)/python -m tests.release --pythons 3.10,3.11,3.12,3.13 --lowest 3.10 --newest 3.13

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist site reports .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
