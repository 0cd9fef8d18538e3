"""Peers do not keep to strict promotion, so their tests run with JAX's own rules."""

import pytest
import torch


@pytest.fixture(autouse=True)
def peers_promotion(relaxed_promotion):
    """Applies `relaxed_promotion` to every test in this folder."""


@pytest.fixture(autouse=True)
def peers_draws():
    """What peers draw is the same in every run."""
    torch.manual_seed(0)
