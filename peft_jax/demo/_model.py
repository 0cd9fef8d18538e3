"""The model, which knows nothing of adapters nor of few bits."""

import flax.linen as nn
from jax import Array


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a LayerNorm and beside a residual path."""

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `(batch, tokens, width)` to the same shape."""
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        x = x + attention(nn.LayerNorm(name="attention_norm")(x))
        hidden = nn.Dense(4 * width, name="up")(nn.LayerNorm(name="mlp_norm")(x))
        return x + nn.Dense(width, name="down")(nn.gelu(hidden))


class DigitTransformer(nn.Module):
    """Classifies 8x8 images, of which every 2x2 patch is a token.

    Attributes:
      width: features of a token.
      depth: number of blocks.
      heads: attention heads of a block.
      classes: number of classes.
    """

    width: int = 96
    depth: int = 2
    heads: int = 4
    classes: int = 10

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps images `(batch, 8, 8)` to logits `(batch, classes)`."""
        patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = nn.Dense(self.width, name="patch")(patches)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for index in range(self.depth):
            x = Block(self.heads, name=f"block_{index}")(x)
        x = nn.LayerNorm(name="norm")(x).mean(axis=1)
        return nn.Dense(self.classes, name="head")(x)
