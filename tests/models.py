"""Models that several test files use."""

from flax import linen as nn


class Doubled(nn.Module):
    """A wrapper of a user's own."""

    wrapped: nn.Module

    def __call__(self, x):
        return 2 * self.wrapped(x)
