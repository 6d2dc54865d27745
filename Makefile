# `make demo` and `make test` are each the only command needed on a fresh machine with Python 3.11 or 3.12.
PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
VENV   := .venv
PY     := $(VENV)/bin/python
DEMO   ?= demo
TRAINED ?= runs/demo
WORKERS ?= 3

export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 2

# Resolved for Python 3.11, the oldest supported; the same versions install on 3.12.
LOCK := $(VENV)/bin/uv pip compile --quiet --python-version 3.11 --python-platform linux --no-annotate $(LOCK_FLAGS)

.PHONY: demo demo-train test test-slow docs verify compiler-gpu compiler-tpu lint lock clean

demo: $(VENV)/.demo            ## talking faces by the model in examples/demo_model, and a page with them; a minute on two cores
	$(PY) -m examples.demo --folder=$(DEMO) $(DEMO_FLAGS)

demo-train: $(VENV)/.train     ## trains such a model from nothing, in TRAINED; two hours on two cores, resumable
	$(PY) -m examples.train_demo_model --folder=$(TRAINED) $(DEMO_FLAGS)

test: $(VENV)/.test            ## the test suite, no GPU and no network needed; ten minutes on two cores
	$(PY) -m pytest -q -n $(WORKERS) $(TEST_FLAGS)

test-slow: $(VENV)/.test       ## what the test suite leaves out: see tests/durations.md
	$(PY) -m pytest -q -n $(WORKERS) -m slow $(TEST_FLAGS)

docs: $(VENV)/.docs            ## the documentation as a web site, in site/
	$(VENV)/bin/mkdocs build --strict

# Compiles much and computes little.
verify: export XLA_FLAGS ?= --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true
verify: $(VENV)/.test          ## every golden, up to the whole program and full size; several minutes, 5 GB of memory
	$(PY) -m convert verify tests/goldens

compiler-gpu compiler-tpu: compiler-%: .compiler-%/.done  ## compilers for absent accelerators, in environments of their own; 3 GB for GPUs: see docs/compiled.md

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/mypy

lock: export UV_CUSTOM_COMPILE_COMMAND := make lock
lock: | $(PY)                  ## lock files for what setup.cfg says now; LOCK_FLAGS=--upgrade takes the newest versions
	$(PY) -m pip install --quiet uv
	$(LOCK) --extra dev --extra docs --output-file requirements/dev.lock setup.cfg
	$(LOCK) --constraint requirements/dev.lock --extra cuda12 --extra train --output-file requirements/cuda12.lock setup.cfg
	$(LOCK) --output-file requirements/beam.lock requirements/beam.txt

clean:                         ## leaves what was trained
	rm -rf $(VENV) $(DEMO)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	  { echo "error: Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip

$(VENV)/.demo $(VENV)/.train $(VENV)/.test $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: setup.cfg pyproject.toml requirements/dev.lock | $(PY)
	@echo "installing into $(VENV): a few minutes, once"
	$(PY) -m pip install --quiet --constraint requirements/dev.lock --editable '.[$*]'
	@touch $@

# PyTorch's libraries are other versions of those that the compiler needs.
.compiler-%/.done: requirements/compiler-%.txt setup.cfg requirements/dev.lock
	$(PYTHON) -m venv .compiler-$*
	grep -v '^nvidia' requirements/dev.lock > .compiler-$*/constraints.txt
	.compiler-$*/bin/python -m pip install --quiet --constraint .compiler-$*/constraints.txt --editable . --requirement requirements/compiler-$*.txt
	@touch $@
