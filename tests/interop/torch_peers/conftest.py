"""Settings for tests against peers that need torch."""

import pytest
import torch


@pytest.fixture(autouse=True)
def peers_draws():
    """What peers draw is the same in every run."""
    torch.manual_seed(0)
