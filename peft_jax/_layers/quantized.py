"""Quantized wrappers: layers whose weight is stored in few bits, or trained as if it were."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flax import linen as nn

from peft_jax._layers.quantized_rules import SimulationRule, StorageRule
from peft_jax._numerics import QuantizationMethod
from peft_jax._surgery import PRODUCTS, LayerWrapper, Rule

__all__ = [
    "Int4Conv",
    "Int4Dense",
    "Int4DenseGeneral",
    "Int4Einsum",
    "Int4Embed",
    "SimulateQuantizedConv",
    "SimulateQuantizedDense",
    "SimulateQuantizedDenseGeneral",
    "SimulateQuantizedEinsum",
    "SimulateQuantizedEmbed",
]


class _StoredWrapper(LayerWrapper):
    """The field and the rule that wrappers over stored values share."""

    _: dataclasses.KW_ONLY
    method: QuantizationMethod | str = QuantizationMethod.INT4

    def __post_init__(self) -> None:
        method = QuantizationMethod(self.method)
        if method is QuantizationMethod.NONE:
            raise ValueError(
                f"{type(self).__name__} reads stored values, which the method NONE does not make. "
                "Leave the layer unwrapped."
            )
        object.__setattr__(self, "method", method)
        super().__post_init__()

    @nn.nowrap
    def rule(self) -> Rule:
        return StorageRule(type(self).__name__, QuantizationMethod(self.method))


class Int4Dense(_StoredWrapper):
    """An ``nn.Dense`` whose kernel is stored in few bits: ``y = x·(value(q) * scale) + bias``.

    ``kernel`` holds `StoredValues` and ``scale`` lies beside it, as `quantize_checkpoint` makes
    them; ``init`` quantizes what the layer itself draws. The layer's forward stays its own, with
    its bias, ``precision``, ``dtype`` and ``param_dtype``. Where it computes its product by Flax's
    own function, the weight is dequantized in tiles, and again in the backward pass; with an
    injected ``dot_general``, under simulation, and under an adapter at the weight, it reads the
    dequantized weight as its kernel.

    Attributes:
      wrapped: the layer inside.
      method: how the values are stored, by any method but ``NONE``, whatever the name says.

    Raises:
      ValueError: where the parameters hold a kernel in floats, values of another method, or no
        scale; with the path.

    Example::

      layer = peft.Int4Dense(wrapped=nn.Dense(64), method="q4_0")
    """

    kinds: ClassVar[frozenset[str]] = PRODUCTS


class Int4Einsum(_StoredWrapper):
    """An ``nn.Einsum`` whose kernel is stored in few bits; see `Int4Dense`.

    The scale of an output channel follows from the equation, given to the layer or to the call.
    """

    kinds: ClassVar[frozenset[str]] = PRODUCTS


class Int4DenseGeneral(_StoredWrapper):
    """An ``nn.DenseGeneral`` whose kernel is stored in few bits; see `Int4Dense`."""

    kinds: ClassVar[frozenset[str]] = PRODUCTS


class Int4Conv(_StoredWrapper):
    """An ``nn.Conv`` or ``nn.ConvTranspose`` whose kernel is stored in few bits; see `Int4Dense`.

    The kernel is dequantized as a whole, in the backward pass again.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"conv"})


class Int4Embed(_StoredWrapper):
    """An ``nn.Embed`` whose table is stored in few bits; see `Int4Dense`.

    A lookup dequantizes the rows that it takes, and ``attend`` works in tiles.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"embed"})


class _SimulatingWrapper(LayerWrapper):
    """The field and the rule that simulating wrappers share."""

    _: dataclasses.KW_ONLY
    method: QuantizationMethod | str

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", QuantizationMethod(self.method))
        super().__post_init__()

    @nn.nowrap
    def rule(self) -> Rule:
        return SimulationRule(type(self).__name__, QuantizationMethod(self.method))


class SimulateQuantizedDense(_SimulatingWrapper):
    """An ``nn.Dense`` that computes with the kernel as quantization would leave it.

    ``y = x·simulate_quantize(W) + bias``; gradients pass straight through, so that training finds
    weights that bear quantization. The tree is the plain layer's.

    Attributes:
      wrapped: the layer inside.
      method: as for `simulate_quantize`; ``NONE`` changes nothing.
    """

    kinds: ClassVar[frozenset[str]] = PRODUCTS


class SimulateQuantizedEinsum(_SimulatingWrapper):
    """An ``nn.Einsum`` with simulated quantization; see `SimulateQuantizedDense`."""

    kinds: ClassVar[frozenset[str]] = PRODUCTS


class SimulateQuantizedDenseGeneral(_SimulatingWrapper):
    """An ``nn.DenseGeneral`` with simulated quantization; see `SimulateQuantizedDense`."""

    kinds: ClassVar[frozenset[str]] = PRODUCTS


class SimulateQuantizedConv(_SimulatingWrapper):
    """An ``nn.Conv`` or ``nn.ConvTranspose`` with simulated quantization."""

    kinds: ClassVar[frozenset[str]] = frozenset({"conv"})


class SimulateQuantizedEmbed(_SimulatingWrapper):
    """An ``nn.Embed`` with simulated quantization, in lookups and in ``attend``."""

    kinds: ClassVar[frozenset[str]] = frozenset({"embed"})
