"""Tests against peers: `torch_peers` and `jax_peers` run in environments of their own."""

import pytest


@pytest.fixture(autouse=True)
def peers_promotion(relaxed_promotion):
    """Peers do not keep to strict promotion, so their tests run with JAX's own rules."""
