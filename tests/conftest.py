"""Settings for every test: strict promotion, eight virtual CPU devices, how programs are compiled.

Flax's modules keep to both rules in float32. In bfloat16 its normalisation layers (LayerNorm,
RMSNorm, GroupNorm, InstanceNorm, BatchNorm) and its recurrent cells mix bfloat16 with float32 by
themselves, so a test that runs one of these in bfloat16 asks for `relaxed_promotion`.
"""

import os
from importlib import metadata
from pathlib import Path

# All are read when JAX is first imported; notebooks and commands that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# Every compiled program is kept, however small, for other workers and later runs: most are small.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most programs run once, and compile three times as fast where LLVM optimizes little. Tests whose
# outcome depends on it are marked `optimized`; with 0 here, all programs are compiled as for users.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

COMPILES_QUICKLY = jax.config.read("jax_disable_most_optimizations")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_report_header() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "flax"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # At the end, one worker would be left alone with them.
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    quickly = COMPILES_QUICKLY and item.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", quickly)


@pytest.fixture
def relaxed_promotion():
    """JAX's own promotion rules, for tests that step an optimizer (optax's adam needs them)."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
