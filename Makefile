# Every target makes the virtual environment that it needs; only Python, pip and make must be there.
#
#   make demo          the demo, on real data, with a picture in out/demo (options: make demo ARGS="--rank 4")
#   make test          formatting, lint, types and tests
#   make test-slow     the tests that take longest: notebooks, large matrices
#   make test-interop  tests against transformers and other peers, in an environment of their own
#   make benchmark     training steps of this library and of its peers, side by side; another script
#                      of benchmarks/ by name: make benchmark SCRIPT=quantized_matmul ARGS="--repeats 9"
#   make lint, format  what `make test` checks before the tests; the same, mended

PYTHON ?= $(shell command -v python3 || command -v python)
WORKERS ?= 2
ARGS ?=
SCRIPT ?= lora_step

READY := .venv/.ready
READY_INTEROP := .venv-interop/.ready
INSTALL = $(@D)/bin/python -m pip --disable-pip-version-check --no-input install --quiet

# The stamp is the last thing an installation writes and the first thing the next one removes: where it
# is missing, an installation stopped midway, and the environment is built anew.
define begin_installation
@echo "Installing into $(@D); this takes a minute or a few ..."
@test -e $@ || $(PYTHON) -m venv --clear $(@D)
@rm -f $@
@# Old versions of pip search this set of dependencies for a quarter of an hour, new ones for seconds.
$(INSTALL) --upgrade pip
endef

# An environment whose interpreter or link to this package is gone (Python upgraded, checkout moved)
# is built anew as well.
INTACT := import importlib.util as util, pip; assert util.find_spec('peft_jax')
$(foreach stamp,$(wildcard $(READY) $(READY_INTEROP)),$(shell \
    $(dir $(stamp))bin/python -P -c "$(INTACT)" >/dev/null 2>&1 || rm -f $(stamp)))

.PHONY: demo test test-slow test-interop benchmark lint format clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml
	$(begin_installation)
	$(INSTALL) --editable ".[test,demo]"
	@touch $@

# torch comes first and alone, because with it the others would be searched for far longer. What is
# used of gemma and of AIMET needs nothing beyond the extra, while the whole of gemma asks for a
# training stack, and AIMET for another build of torch.
$(READY_INTEROP): pyproject.toml
	$(begin_installation)
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable ".[test,interop]"
	$(INSTALL) --no-deps gemma==3.3.0 aimet-torch==2.42.0
	@touch $@

demo: $(READY)
	.venv/bin/python -m peft_jax.demo $(ARGS)

lint: $(READY)
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy

format: $(READY)
	.venv/bin/python -m ruff format .
	.venv/bin/python -m ruff check --fix .

test: lint
	.venv/bin/python -m pytest tests --ignore=tests/interop -n $(WORKERS) -m "not slow"

# Whole notebooks, and matrices of which `make test` runs a part.
test-slow: $(READY)
	.venv/bin/python -m pytest tests --ignore=tests/interop -n $(WORKERS) -m slow

# The peers raise warnings of their own, which are theirs to mend.
test-interop: $(READY_INTEROP)
	.venv-interop/bin/python -m pytest tests/interop -W default

benchmark: $(READY_INTEROP)
	.venv-interop/bin/python benchmarks/$(SCRIPT).py $(ARGS)

clean:
	rm -rf .venv .venv-interop out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
