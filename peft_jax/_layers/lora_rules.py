"""What LoRA does to a layer: adapters beside it, or at its weight."""

from __future__ import annotations

import abc
import dataclasses
import functools
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import meta
from flax.typing import Array

from peft_jax._layers.adapter_variants import (
    Settings,
    adapter_fields,
    make_adapter,
    refuse_another_equation,
    weight_change,
)
from peft_jax._layers.lora_adapter import LoRAAdapter
from peft_jax._numerics import add_once, along, scaled_along, weight_shape, widest
from peft_jax._spec import parse_equation, unused_letter
from peft_jax._surgery import ADAPTER, Call, Layer, Proceed, Rule, embed_input, require_layer
from peft_jax._trees import DEFAULT

__all__ = [
    "AdapterRule",
    "BesideRule",
    "stored_weight",
    "weight_alone",
]


class AdapterRule(Rule):
    """Base of the rules that adapt: what several adapters do to one layer adds up.

    Each changes the weight ``W`` as it is without the others.
    """

    order: ClassVar[int] = ADAPTER
    settings: Settings

    @property
    def name(self) -> str:  # type: ignore[override]
        own = self.settings.adapter_name
        return "lora" if own == DEFAULT else f"lora ({own})"

    def change(self, call: Call, name: str, value: Any) -> Array | None:
        """What the adapter adds to a parameter, in float32 or wider; None: nothing."""
        raise TypeError(f"{type(self).__name__} changes no weight.")

    @staticmethod
    def transform_together(rules: Any, call: Call, name: str, value: Any) -> Any:
        found = [rule.change(call, name, value) for rule in rules]
        changes = [change for change in found if change is not None]
        return add_once(value, functools.reduce(operator.add, changes)) if changes else value

    @staticmethod
    def around_together(rules: Any, call: Call, proceed: Proceed) -> Any:
        beside = [rule for rule in rules if isinstance(rule, BesideRule)]
        others = [rule for rule in rules if not isinstance(rule, BesideRule)]
        if beside:
            proceed = functools.partial(_run_beside, beside, proceed)
        return Rule.around_together(others, call, proceed)


class BesideRule(AdapterRule):
    """Base of the rules whose adapters act beside a layer, on its input and its output.

    Attributes:
      wrapper: who adapts, in error messages.
      per_example: whether gains and shifts have an axis of examples in front.
    """

    wrapper: str
    per_example: ClassVar[bool] = False

    @abc.abstractmethod
    def has(self, call: Call, leaf: str) -> bool:
        """Whether the layer's adapter has a ``magnitude``, or a ``bias``."""

    @abc.abstractmethod
    def delta(self, call: Call, layer: Layer, y: Array, x: Array) -> Array:
        """``scaling * x·a·b``, which joins the output ``y``."""

    @abc.abstractmethod
    def gain(self, call: Call, layer: Layer) -> Array:
        """``m / ||W + scaling * a·b||`` for each of the outputs that the weight has."""

    @abc.abstractmethod
    def shift(self, call: Call, layer: Layer, dtype: Any) -> Array:
        """``scaling * bias`` for each of the outputs that the weight has."""

    def along(self, values: Array, letters: str, axes: str) -> Array:
        """Gains or shifts, to be broadcast against an array with these axes."""
        return along(values, *self.named(letters, axes))

    def named(self, letters: str, axes: str) -> tuple[str, str]:
        """The axes of gains or shifts, and of an array that they act on, by their letters."""
        if not self.per_example:
            return letters, axes
        example = unused_letter(letters + axes)
        return example + letters, example + axes[1:]


@dataclasses.dataclass(frozen=True)
class LoRARule(BesideRule):
    """An adapter on one layer: beside it where the layer is a plain product, else at its weight."""

    wrapper: str
    settings: Settings

    def at_weight(self, call: Call) -> bool:
        layer = require_layer(call.module, f"{self.wrapper} adapts")
        return not layer.beside(call) or (self.settings.use_dora and layer.bias is None)

    def has(self, call: Call, leaf: str) -> bool:
        return {"magnitude": self.settings.use_dora, "bias": self.settings.lora_bias}[leaf]

    def change(self, call: Call, name: str, value: Any) -> Array | None:
        layer = require_layer(call.module, f"{self.wrapper} adapts")
        if name != layer.param:
            return None
        return weight_change(self.settings, call, name, value, layer.equation(call), layer.kind)

    def adapter(self, call: Call, layer: Layer, dtype: Any) -> LoRAAdapter:
        """The adapter beside the layer, which computes in this dtype unless it has one."""
        refuse_another_equation(call, layer.equation(call), layer.kind)
        stored = stored_weight(call, layer)
        cls, fields = adapter_fields(call, layer, weight_shape(meta.unbox(stored)))
        settings = dataclasses.replace(self.settings, dtype=self.settings.dtype or dtype)
        fields |= {"kind": layer.kind, "precision": getattr(call.module, "precision", None)}
        return make_adapter(cls, call, layer.param, stored, settings, **fields)

    def delta(self, call: Call, layer: Layer, y: Array, x: Array) -> Array:
        delta = getattr(self.adapter(call, layer, y.dtype), call.method)(x)
        if delta.shape != y.shape:
            raise ValueError(
                f"The layer at '{call.path}' returned shape {y.shape}, but by its equation "
                f"'{layer.equation(call)}' the shape is {delta.shape}. Correct the registration of "
                f"{type(call.module).__name__}, or adapt it by `peft.LoRAWeight`."
            )
        return delta.astype(y.dtype)

    def gain(self, call: Call, layer: Layer) -> Array:
        return self.adapter(call, layer, None).gain(weight_alone(call), layer.equation(call))

    def shift(self, call: Call, layer: Layer, dtype: Any) -> Array:
        shape = weight_shape(meta.unbox(stored_weight(call, layer)))
        return self.adapter(call, layer, dtype).shift(layer.equation(call), shape)


def stored_weight(call: Call, layer: Layer) -> Any:
    """The layer's parameter as it lies in the tree, in its box if it has one."""
    stored: Any = call.module.get_variable("params", layer.param)
    if stored is None:
        raise ValueError(
            f"{type(call.module).__name__} at '{call.path}' is registered with the parameter "
            f"{layer.param!r}, which it does not have. Correct `peft.register_layer`."
        )
    return stored


def weight_alone(call: Call) -> Any:
    """The weight that a norm is taken of: without what other adapters make of it."""
    if call.adapted:
        raise ValueError(
            f"The layer at '{call.path}' has an adapter with a magnitude (use_dora) beside it and "
            "another at its weight, from which the norm could not be told. Adapt both at the "
            "weight, by `peft.LoRAWeight`."
        )
    assert call.weight is not None
    return call.weight()


def _run_beside(rules: list[BesideRule], proceed: Proceed, call: Call) -> Any:
    """A layer with adapters, of which each adds what it would make of the layer by itself."""
    layer = require_layer(call.module, f"{rules[0].wrapper} adapts")
    if call.method not in layer.methods:
        return proceed(call)
    beside = [rule for rule in rules if not rule.at_weight(call)]
    if call.method == "attend":
        total = _attended(beside, proceed, call, layer)
    else:
        total = _added(beside, proceed, call, layer)
    for rule in rules:
        if rule.has(call, "bias"):
            total = total + _shift(rule, call, layer, _array(total, call))
    return total


def _added(rules: list[BesideRule], proceed: Proceed, call: Call, layer: Layer) -> Any:
    """``y + sum(D)``, and for gains ``g``: ``sum(g * (y + D) + (1 - g) * bias) - (k - 1) * y``.

    ``D = scaling * x·a·b``, and ``y = x·W + bias``. One product with each gain, of a sum: its
    derivatives then need one array of the size of ``y``.
    """
    y = proceed(call)
    if not rules:
        return y
    total, gained = _array(y, call), []
    for rule in rules:
        delta = rule.delta(call, layer, y, layer.input(call))
        if rule.has(call, "magnitude"):
            gained.append(_gained(rule, call, layer, y + delta))
        else:
            total = total + delta
    if not gained:
        return total
    if len(gained) == len(rules) == 1:
        return gained[0]
    return functools.reduce(operator.add, [g - y for g in gained], total)


def _gained(rule: BesideRule, call: Call, layer: Layer, z: Array) -> Array:
    """``g * (z - bias) + bias``, for the output ``z`` of the layer and its adapter."""
    equation, dtype = parse_equation(layer.equation(call)), widest(z.dtype)
    gain, axes = rule.gain(call, layer), equation.output_axes(z.ndim)
    letters, named = rule.named(equation.kept, axes)
    total = scaled_along(z.astype(dtype), gain.astype(dtype), named, letters)
    bias = meta.unbox(call.module.get_variable("params", layer.bias))
    if bias is not None:
        bias = jnp.broadcast_to(bias.astype(dtype), gain.shape)
        total = total + rule.along((1 - gain) * bias, equation.kept, axes)
    return total.astype(z.dtype)


def _attended(rules: list[BesideRule], proceed: Proceed, call: Call, layer: Layer) -> Any:
    """The product with a table, whose outputs are what comes in: gains act on the query."""
    name = embed_input(call)
    query = call.argument(0, name)
    queries, surplus = [], None
    for rule in rules:
        queries.append(query)
        if rule.has(call, "magnitude"):
            gain = rule.along(rule.gain(call, layer), "f", "." * (query.ndim - 1) + "f")
            queries[-1] = query * gain.astype(query.dtype)
            surplus = gain - 1 if surplus is None else surplus + gain - 1
    if surplus is not None:
        call_with = query * (1 + surplus).astype(query.dtype)
        y = proceed(call.with_argument(0, name, call_with))
    else:
        y = proceed(call)
    for rule, scaled in zip(rules, queries, strict=True):
        y = y + rule.delta(call, layer, _array(y, call), scaled)
    return y


def _array(y: Any, call: Call) -> Array:
    if not isinstance(y, jax.Array):
        raise ValueError(
            f"An adapter adds to the output of a layer, an array, but "
            f"{type(call.module).__name__} at '{call.path}' returned {type(y).__name__}. Adapt "
            "it at the weight, by `peft.LoRAWeight`."
        )
    return y


def _shift(rule: BesideRule, call: Call, layer: Layer, y: Array) -> Array:
    """The adapter's own bias, as it joins the output ``y``."""
    equation = parse_equation(layer.equation(call))
    bias = rule.shift(call, layer, y.dtype).astype(y.dtype)
    if call.method == "attend":  # a bias of every row of the table
        query = call.argument(0, embed_input(call)).astype(y.dtype)
        bias = rule.along(bias, "f", "." * (query.ndim - 1) + "f")
        return jnp.sum(query * bias, -1, keepdims=True)
    return rule.along(bias, equation.kept, equation.output_axes(y.ndim))
