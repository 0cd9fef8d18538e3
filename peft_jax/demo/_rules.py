"""Which layers get an adapter, and which read a weight that is stored in few bits."""

import dataclasses

import flax.linen as nn

import peft_jax as peft


@dataclasses.dataclass(frozen=True)
class LoRARule:
    """Gives an adapter to every Dense and DenseGeneral layer, but not to those named in `skip`.

    A frozen dataclass compares by value: a jitted function that opens an interceptor with an equal
    rule is not traced again, while a lambda written anew for each step would be a new program.

    Attributes:
      rank: rank of every adapter.
      alpha: an adapter is scaled by `alpha / rank`.
      skip: names of layers that stay as they are.
    """

    rank: int
    alpha: float = 16.0
    skip: tuple[str, ...] = ("patch",)

    def __call__(self, module: nn.Module) -> nn.Module:
        """Returns the layer with its adapter, or the module as it is."""
        wrappers = {nn.Dense: peft.LoRADense, nn.DenseGeneral: peft.LoRADenseGeneral}
        wrapper = wrappers.get(type(module))
        if wrapper is None or module.name in self.skip:
            return module
        return wrapper(rank=self.rank, alpha=self.alpha, wrapped=module)


@dataclasses.dataclass(frozen=True)
class StorageRule:
    """Has the layers of some weights read them as values stored in few bits.

    Attributes:
      method: by which they are stored.
      weights: their slashed paths.
    """

    method: str
    weights: frozenset[str]

    def __call__(self, module: nn.Module) -> nn.Module:
        """Returns the layer over stored values, or the module as it is."""
        wrappers = {nn.Dense: peft.Int4Dense, nn.DenseGeneral: peft.Int4DenseGeneral}
        wrapper = wrappers.get(type(module))
        if wrapper is None or "/".join((*module.path, "kernel")) not in self.weights:
            return module
        return wrapper(method=self.method, wrapped=module)
