"""A bank of adapters on a layer: each example of a batch is computed with the adapter of its own.

A bank lies where an adapter of the name ``bank`` would: ``lora.bank/{a, b, ...}``, arrays with an
axis of slots in front of the layer's own (and behind those of a stack). What is chosen lies beside
them while a model runs: as arrays among the parameters, so that every lifted transform of Flax
brings each layer of a stack its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.typing import Array

from peft_jax._layers import BesideRule, adapter_fields, stored_weight, weight_alone
from peft_jax._numerics import adapted_norms, gains, weight_shape
from peft_jax._spec import BATCH_IN_B, parse_equation
from peft_jax._surgery import Call, Layer, Rule, Wrapper, require_layer
from peft_jax._trees import BANK, adapter_name, is_bank

# What lies in a bank beside the adapters' own leaves, while a model runs. Without slots each
# adapter is for a group of its own, in order.
SLOTS, GROUP, SCALING = "slots", "group", "scaling"
DECOMPOSED, BIASED = "decomposed", "biased"
_CHOSEN = frozenset({SLOTS, GROUP, SCALING, DECOMPOSED, BIASED})


@dataclasses.dataclass(frozen=True)
class BankRule(BesideRule):
    """``y_i + scaling_n * x_i·a_n·b_n`` for the examples ``i`` of a batch, with ``n = slots[i]``.

    Examples lie along axis 0 of the layer's input and output. Those of ``n = -1`` pass as they are.
    """

    wrapper: str = "A bank of adapters"
    name: ClassVar[str] = "bank of adapters"  # type: ignore[misc]
    per_example: ClassVar[bool] = True

    def at_weight(self, call: Call) -> bool:
        layer = require_layer(call.module, f"{self.wrapper} is beside")
        if not layer.beside(call):
            self._refuse(call, "is adapted at its weight, of which there is one for all examples")
        if layer.bias is None and self.has(call, "magnitude"):
            self._refuse(
                call, "is registered without its `bias`, which DoRA beside a layer has to know"
            )
        return False

    def has(self, call: Call, leaf: str) -> bool:
        return leaf in _bank(call).leaves

    def delta(self, call: Call, layer: Layer, y: Array, x: Array) -> Array:
        if call.simulated is not None:
            self._refuse(call, "is simulated by `peft_jax.quantsim`, which knows no banks")
        bank = _bank(call)
        x = self._examples(call, layer, jnp.asarray(x), bank)
        shape = weight_shape(meta.unbox(stored_weight(call, layer)))
        cls, fields = adapter_fields(call, layer, shape)
        adapter: Any = cls(
            **fields,
            rank=bank.rank(layer.equation(call), layer.kind),
            deterministic=True,
            dtype=y.dtype,
            precision=getattr(call.module, "precision", None),
            parent=None,
        )

        def one(x: Array, a: Array, b: Array) -> Array:
            return adapter.apply({"params": {"a": a, "b": b}}, x, method=call.method)

        if bank.groups == 1:  # the program of one adapter
            delta = one(x, *(factor[0] for factor in bank.factors))
        else:
            grouped = x.reshape((bank.groups, bank.group_size, *x.shape[1:]))
            delta = jax.vmap(one)(grouped, *bank.factors)
        delta = delta.reshape((x.shape[0], *y.shape[1:]))
        if bank.slots is not None:
            delta = jnp.where(_against(bank.each(bank.slots != -1), delta), delta, 0)
        return delta.astype(y.dtype)

    def gain(self, call: Call, layer: Layer) -> Array:
        """1 for the examples whose adapter has no magnitude."""
        bank, weight = _bank(call), weight_alone(call)
        equation = parse_equation(layer.equation(call))
        delta = equation.low_rank(batch_in_b=layer.kind in BATCH_IN_B).delta
        magnitude = bank.leaves["magnitude"]

        def one(a: Array, b: Array, magnitude: Array) -> Array:
            return gains(magnitude, adapted_norms(weight, a, b, delta, 1.0, equation.kept))

        if magnitude.shape[0] <= bank.groups:  # fewer adapters than groups
            # Free slots hold NaN: numbers in their place keep it out of their gradients.
            scaled = jnp.nan_to_num(_times(bank.leaves["b"], bank.trait(SCALING)))
            gain = bank.taken(jax.vmap(one)(bank.leaves["a"], scaled, magnitude))
        else:
            gain = jax.vmap(one)(*bank.factors, bank.taken(magnitude))
        decomposed = _against(bank.taken(bank.trait(DECOMPOSED)), gain)
        return bank.each(jnp.where(decomposed, gain, 1))

    def shift(self, call: Call, layer: Layer, dtype: Any) -> Array:
        """0 for the examples whose adapter has no bias."""
        bank = _bank(call)
        shift = _times(bank.taken(bank.leaves["bias"]), bank.scaling)
        biased = _against(bank.taken(bank.trait(BIASED)), shift)
        return bank.each(jnp.where(biased, shift, 0))

    def _examples(self, call: Call, layer: Layer, x: Array, bank: _Bank) -> Array:
        """The layer's input, with one entry along axis 0 for each example."""
        count = bank.groups * bank.group_size
        if not _has_examples(call, layer, x):
            equation = layer.equation(call)
            self._refuse(call, f"has no axis of examples in front ('{equation}' of {x.shape})")
        if x.shape[0] not in (1, count):
            self._refuse(
                call,
                f"has an input of shape {x.shape}, whose axis 0 does not number the {count} "
                "examples that adapters were chosen for",
            )
        return jnp.broadcast_to(x, (count, *x.shape[1:]))

    def _refuse(self, call: Call, reason: str) -> None:
        raise ValueError(
            f"The layer at '{call.path}' {reason}, so that its examples cannot have adapters of "
            "their own. Stack adapters without this layer, or run them one after the other."
        )


def _has_examples(call: Call, layer: Layer, x: Array) -> bool:
    """Whether axis 0 of the input goes through to the output, beside the weight."""
    equation = parse_equation(layer.equation(call))
    if layer.kind == "embed":
        return x.ndim >= (2 if call.method == "attend" else 1)
    if layer.kind == "conv":
        return x.ndim >= len(equation.kernel)
    first = equation.input_axes(x.ndim)[:1]
    return first not in equation.kernel and equation.outputs.replace("...", ".").startswith(first)


@dataclasses.dataclass(frozen=True)
class _Bank:
    """The bank of a layer, and what is chosen of it.

    Attributes:
      leaves: the adapters' arrays, with an axis of slots in front.
      chosen: what lies beside them; laid out for lifted transforms.
    """

    leaves: Mapping[str, Array]
    chosen: Mapping[str, Array]

    @functools.cached_property
    def slots(self) -> Array | None:
        """Of each group of examples; None: the groups are those of the adapters, in order."""
        return self.chosen[SLOTS].reshape(-1) if SLOTS in self.chosen else None

    @property
    def group_size(self) -> int:
        """How many examples in a row share an adapter."""
        return self.chosen[GROUP].size

    @property
    def groups(self) -> int:
        """How many groups of examples there are."""
        return self.chosen[SLOTS if SLOTS in self.chosen else SCALING].size

    def trait(self, name: str) -> Array:
        """What is known of each adapter."""
        return self.chosen[name].reshape(-1)

    def taken(self, leaf: Array) -> Array:
        """Of each group; zeros, without a gradient, where there is no such slot."""
        if self.slots is None:
            return leaf
        slots = jnp.where(self.slots < 0, leaf.shape[0], self.slots)
        return jnp.take(leaf, slots, axis=0, mode="fill", fill_value=0)

    @functools.cached_property
    def scaling(self) -> Array:
        """Of each group; NaN where there is no such slot."""
        every = self.trait(SCALING)
        scaling = self.taken(every)
        if self.slots is None:
            return scaling
        return jnp.where((self.slots >= every.size) | (self.slots < -1), jnp.nan, scaling)

    @functools.cached_property
    def factors(self) -> tuple[Array, Array]:
        """``a`` and ``scaling * b`` of each group."""
        scaled = _times(self.taken(self.leaves["b"]), self.scaling)
        return self.taken(self.leaves["a"]), scaled

    def each(self, values: Array) -> Array:
        """What is known of each group, for each example."""
        return jnp.repeat(values, self.group_size, axis=0)

    def rank(self, equation: str, kind: str) -> int:
        """The rank of all adapters, with their padding."""
        letters = parse_equation(equation).low_rank(batch_in_b=kind in BATCH_IN_B).a
        (rank,) = set(letters) - set(parse_equation(equation).kernel)
        return self.leaves["a"].shape[1 + letters.index(rank)]


def _bank(call: Call) -> _Bank:
    """The bank of a layer that has one."""
    layer = require_layer(call.module, "A bank of adapters is beside")
    found = call.module.scope.get_variable("params", adapter_name(call.module, layer.param, BANK))
    if SCALING not in found:
        raise ValueError(
            f"The layer at '{call.path}' has a bank of adapters, of which none is chosen. Run "
            "`peft.MultiAdapterModel(wrapped=model).apply(..., adapters=bank.select(names))`; a "
            "model that is bound, or inside another, takes `bank.select(names).insert(params)`."
        )
    chosen = {name: value for name, value in found.items() if name in _CHOSEN}
    return _Bank({name: found[name] for name in found if name not in chosen}, chosen)


def _against(values: Array, array: Array) -> Array:
    return values.reshape(values.shape + (1,) * (array.ndim - values.ndim))


def _times(array: Array, scaling: Array) -> Array:
    return array * _against(scaling, array).astype(array.dtype)


class _Banked(Wrapper):
    @nn.nowrap
    def rule(self) -> Rule:
        return BankRule()


def banked(module: nn.Module) -> nn.Module:
    """A rule for `ModuleInterceptor`: layers beside whose weight a bank lies are adapted by it."""
    assert module.scope is not None
    names = module.scope.variables().get("params", {})
    banks = [name for name, branch in names.items() if is_bank(name, branch)]
    if not banks:
        return module
    path = "/".join(module.scope.path)
    layer = require_layer(module, f"The bank {banks[0]!r} at '{path}' adapts")
    others = sorted({*banks} - {adapter_name(module, layer.param, BANK)})
    if others:
        raise ValueError(
            f"The bank {others[0]!r} at '{path}' is of another parameter than {layer.param!r}, by "
            "which the layer's product is told: it cannot act beside the layer. Stack adapters "
            "without it, or run them one after the other."
        )
    return _Banked(wrapped=module)
