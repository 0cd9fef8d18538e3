# Every target makes the virtual environment that it needs; only Python, pip and make must be there.
#
#   make demo          the demo, on real data, with a picture in out/demo (options: make demo ARGS="--rank 4")
#   make test          formatting, lint, types and the quick tests
#   make test-oldest   the quick tests, on the oldest versions that are supported
#   make test-slow     the tests that take longest: notebooks, large matrices
#   make test-interop  tests against transformers, gemma and other peers, in two environments of their own
#   make test-avx2     the tests of numerics, on a narrower instruction set: sums in another order
#   make benchmark     training steps of this library and of its peers, side by side; another script
#                      of benchmarks/ by name: make benchmark SCRIPT=quantized_matmul ARGS="--repeats 9"
#   make lint, format  what `make test` checks before the tests; the same, mended
#   make clean         removes environments, caches and results
#
# The newest Python that is installed is used, 3.13 at most if there is one; `make test PYTHON=3.12`
# takes another, a version or a command.

WORKERS ?= 2
ARGS ?=
SCRIPT ?= lora_step

export PYTHON
# Without compiled modules, each process of the tests would compile all of JAX's anew: four seconds.
unexport PYTHONDONTWRITEBYTECODE
ENVIRONMENTS := .venv .venv-oldest .venv-interop .venv-interop-jax
# Each worker takes half of the files, so that fixtures and programs are made once, and what the other
# has left when its own are done.
PYTEST = -m pytest -n $(WORKERS) --dist worksteal
UNIT_TESTS := tests --ignore=tests/interop
# The tests of arrays alone, whose numbers depend on the order of sums.
NUMERICS := tests/numerics tests/trees tests/quantsim/test_grid.py tests/quantsim/test_statistics.py
# multi_adapter compares with torch, the others with JAX.
BENCHMARK_ENVIRONMENT := $(if $(filter multi_adapter,$(SCRIPT)),.venv-interop,.venv-interop-jax)

.PHONY: demo test test-oldest test-slow test-interop test-interop-torch test-interop-jax test-avx2
.PHONY: benchmark lint format clean environments $(ENVIRONMENTS)
.DEFAULT_GOAL := test

$(ENVIRONMENTS):
	@scripts/environment.sh $@

environments: $(ENVIRONMENTS)

demo: .venv
	.venv/bin/python -m peft_jax.demo $(ARGS)

lint: .venv
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy

format: .venv
	.venv/bin/python -m ruff format .
	.venv/bin/python -m ruff check --fix .

test: lint
	.venv/bin/python $(PYTEST) $(UNIT_TESTS) -m "not slow"

test-oldest: .venv-oldest
	.venv-oldest/bin/python $(PYTEST) $(UNIT_TESTS) -m "not slow"

# Whole notebooks, and matrices of which `make test` runs a part.
test-slow: .venv
	.venv/bin/python $(PYTEST) $(UNIT_TESTS) -m slow

# The peers raise warnings of their own, which are theirs to mend.
test-interop: test-interop-torch test-interop-jax

test-interop-torch: .venv-interop
	.venv-interop/bin/python $(PYTEST) tests/interop/torch_peers -W default

test-interop-jax: .venv-interop-jax
	.venv-interop-jax/bin/python $(PYTEST) tests/interop/jax_peers -W default

test-avx2: .venv
	XLA_FLAGS="$(XLA_FLAGS) --xla_cpu_max_isa=AVX2" JAX_DISABLE_MOST_OPTIMIZATIONS=0 \
		.venv/bin/python $(PYTEST) $(NUMERICS)

benchmark: $(BENCHMARK_ENVIRONMENT)
	$(BENCHMARK_ENVIRONMENT)/bin/python benchmarks/$(SCRIPT).py $(ARGS)

clean:
	rm -rf $(ENVIRONMENTS) out build dist .jax_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
