"""A bank of adapters on a layer: each example of a batch is computed with the adapter of its own.

A bank lies where an adapter of the name ``bank`` would: ``lora.bank/{a, b, ...}``, arrays with an
axis of slots in front of the layer's own (and behind those of a stack). What is chosen lies beside
them while a model runs: as arrays among the parameters, so that every lifted transform of Flax
brings each layer of a stack its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.typing import Array

from peft_jax._equation import BATCH_IN_B, parse_equation
from peft_jax._lora_rules import BesideRule, stored_weight, weight_alone
from peft_jax._magnitude import adapted_norms, gains
from peft_jax._names import BANK, adapter_name, is_bank
from peft_jax._placed import adapter_fields
from peft_jax._registry import Call, Layer, find_layer, require_layer
from peft_jax._rules import Rule
from peft_jax._stored import weight_shape
from peft_jax._wrapper import Wrapper

# What lies in a bank beside the adapters' own leaves, while a model runs. Without slots each
# adapter is for a group of its own, in order.
SLOTS, GROUP, SCALING = "slots", "group", "scaling"
DECOMPOSED, BIASED = "decomposed", "biased"


@dataclasses.dataclass(frozen=True)
class BankRule(BesideRule):
    """``y_i + scaling_n * x_i·a_n·b_n`` for the examples ``i`` of a batch, with ``n = slots[i]``.

    Examples lie along axis 0 of the layer's input and output. Those of ``n = -1`` pass as they are.
    """

    wrapper: str = "A bank of adapters"
    name: ClassVar[str] = "bank of adapters"  # type: ignore[misc]
    per_example: ClassVar[bool] = True

    def concerns(self, call: Call) -> bool:
        return bool(_bank(call))

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
        return leaf in _bank(call)

    def delta(self, call: Call, layer: Layer, y: Array, x: Array) -> Array:
        bank = _bank(call)
        x = self._examples(call, layer, jnp.asarray(x), bank)
        cls, fields = adapter_fields(
            call, layer, weight_shape(meta.unbox(stored_weight(call, layer)))
        )
        adapter: Any = cls(
            **fields,
            rank=_rank(bank, layer.equation(call), layer.kind),
            deterministic=True,
            dtype=y.dtype,
            precision=getattr(call.module, "precision", None),
            parent=None,
        )

        def one(x: Array, a: Array, b: Array) -> Array:
            return adapter.apply({"params": {"a": a, "b": b}}, x, method=call.method)

        groups = _groups(bank)
        if groups == 1:  # the program of one adapter
            delta = one(x, *(chosen[0] for chosen in _chosen(bank)))
        else:
            grouped = x.reshape((groups, bank[GROUP].shape[0], *x.shape[1:]))
            delta = jax.vmap(one)(grouped, *_chosen(bank))
        delta = delta.reshape((x.shape[0], *y.shape[1:]))
        if SLOTS in bank:
            adapted = _against(self._each(call, bank[SLOTS] != -1), delta)
            delta = jnp.where(adapted, delta, 0)
        return delta.astype(y.dtype)

    def gain(self, call: Call, layer: Layer) -> Array:
        """1 for the examples whose adapter has no magnitude."""
        bank, weight = _bank(call), weight_alone(call)
        equation = parse_equation(layer.equation(call))
        delta = equation.low_rank(batch_in_b=layer.kind in BATCH_IN_B).delta

        def one(a: Array, b: Array, magnitude: Array) -> Array:
            return gains(magnitude, adapted_norms(weight, a, b, delta, 1.0, equation.kept))

        if bank["a"].shape[0] <= _groups(bank):  # fewer adapters than examples
            # Free slots hold NaN: numbers in their place keep it out of their gradients.
            scaled = jnp.nan_to_num(_times(bank["b"], bank[SCALING]))
            chosen = _taken(jax.vmap(one)(bank["a"], scaled, bank["magnitude"]), bank)
        else:
            chosen = jax.vmap(one)(*_chosen(bank), _taken(bank["magnitude"], bank))
        decomposed = _against(_taken(bank[DECOMPOSED], bank), chosen)
        return self._each(call, jnp.where(decomposed, chosen, 1))

    def shift(self, call: Call, layer: Layer, dtype: Any) -> Array:
        """0 for the examples whose adapter has no bias."""
        bank = _bank(call)
        chosen = _times(_taken(bank["bias"], bank), _scaling(bank))
        biased = _against(_taken(bank[BIASED], bank), chosen)
        return self._each(call, jnp.where(biased, chosen, 0))

    def _each(self, call: Call, chosen: Array) -> Array:
        """What is known of each group of examples, for each example."""
        return jnp.repeat(chosen, _bank(call)[GROUP].shape[0], axis=0)

    def _examples(self, call: Call, layer: Layer, x: Array, bank: Mapping[str, Array]) -> Array:
        """The layer's input, with one entry along axis 0 for each example."""
        count = _groups(bank) * bank[GROUP].shape[0]
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


def _bank(call: Call) -> Mapping[str, Array]:
    """The arrays of the layer's bank; none where it has no bank."""
    layer = find_layer(call.module)
    if layer is None:
        return {}
    found = call.module.scope.get_variable("params", adapter_name(call.module, layer.param, BANK))
    if found is None:
        return {}
    if SCALING not in found:
        raise ValueError(
            f"The layer at '{call.path}' has a bank of adapters, of which none is chosen. Run "
            "`peft.MultiAdapterModel(wrapped=model).apply(..., adapters=bank.select(names))`; a "
            "model that is bound, or inside another, takes `bank.select(names).insert(params)`."
        )
    chosen = [name for name in (SLOTS, GROUP, SCALING, DECOMPOSED, BIASED) if name in found]
    return {**found, **{name: found[name].reshape(-1) for name in chosen}}


def _rank(bank: Mapping[str, Array], equation: str, kind: str) -> int:
    low_rank = parse_equation(equation).low_rank(batch_in_b=kind in BATCH_IN_B)
    rank = (set(low_rank.a) - set(parse_equation(equation).kernel)).pop()
    return bank["a"].shape[1 + low_rank.a.index(rank)]


def _chosen(bank: Mapping[str, Array]) -> tuple[Array, Array]:
    """``a`` and ``scaling * b`` of each group of examples."""
    return _taken(bank["a"], bank), _times(_taken(bank["b"], bank), _scaling(bank))


def _scaling(bank: Mapping[str, Array]) -> Array:
    """Of each group of examples; NaN where there is no such slot."""
    scaling = _taken(bank[SCALING], bank)
    if SLOTS not in bank:
        return scaling
    outside = (bank[SLOTS] >= bank[SCALING].shape[0]) | (bank[SLOTS] < -1)
    return jnp.where(outside, jnp.nan, scaling)


def _groups(bank: Mapping[str, Array]) -> int:
    """How many groups of examples there are."""
    return bank[SLOTS if SLOTS in bank else SCALING].shape[0]


def _taken(leaf: Array, bank: Mapping[str, Array]) -> Array:
    """The entries of the chosen slots; zeros, without a gradient, where there is no such slot."""
    if SLOTS not in bank:
        return leaf
    slots = jnp.where(bank[SLOTS] < 0, leaf.shape[0], bank[SLOTS])
    return jnp.take(leaf, slots, axis=0, mode="fill", fill_value=0)


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
