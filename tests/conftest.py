"""Settings for every test: strict promotion of dtypes and ranks, and eight virtual CPU devices.

Flax's modules keep to both rules in float32. In bfloat16 its normalisation layers (LayerNorm,
RMSNorm, GroupNorm, InstanceNorm, BatchNorm) and its recurrent cells mix bfloat16 with float32 by
themselves, so a test that runs one of these in bfloat16 asks for `relaxed_promotion`.
"""

import os

# Both are read when JAX is first imported; notebooks and commands that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def relaxed_promotion():
    """JAX's own promotion rules, for tests that step an optimizer (optax's adam needs them)."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
