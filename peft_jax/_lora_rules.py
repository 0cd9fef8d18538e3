"""What LoRA does to a layer: adapters beside it, or at its weight."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import meta
from flax.typing import Array

from peft_jax._adapter import LoRAAdapter
from peft_jax._einsum import widest
from peft_jax._equation import parse_equation
from peft_jax._low_rank import add_once, scaled_along
from peft_jax._magnitude import along
from peft_jax._names import DEFAULT
from peft_jax._placed import (
    Settings,
    adapter_fields,
    make_adapter,
    refuse_another_equation,
    weight_change,
)
from peft_jax._registry import Call, Layer, embed_input, require_layer
from peft_jax._rules import ADAPTER, Proceed, Rule
from peft_jax._stored import weight_shape


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
        beside = [rule for rule in rules if isinstance(rule, LoRARule)]
        others = [rule for rule in rules if not isinstance(rule, LoRARule)]
        if beside:
            proceed = functools.partial(_run_beside, beside, proceed)
        return Rule.around_together(others, call, proceed)


@dataclasses.dataclass(frozen=True)
class LoRARule(AdapterRule):
    """An adapter on one layer: beside it where the layer is a plain product, else at its weight."""

    wrapper: str
    settings: Settings

    def at_weight(self, call: Call) -> bool:
        layer = require_layer(call.module, f"{self.wrapper} adapts")
        return not layer.beside(call) or (self.settings.use_dora and layer.bias is None)

    def change(self, call: Call, name: str, value: Any) -> Array | None:
        layer = require_layer(call.module, f"{self.wrapper} adapts")
        if name != layer.param:
            return None
        return weight_change(self.settings, call, name, value, layer.equation(call), layer.kind)

    def adapter(self, call: Call, layer: Layer, dtype: Any) -> LoRAAdapter:
        """The adapter beside the layer, which computes in this dtype unless it has one."""
        module = call.module
        stored: Any = module.get_variable("params", layer.param)
        if stored is None:
            raise ValueError(
                f"{type(module).__name__} at '{call.path}' is registered with the parameter "
                f"{layer.param!r}, which it does not have. Correct `peft.register_layer`."
            )
        refuse_another_equation(call, layer.equation(call), layer.kind)
        cls, fields = adapter_fields(call, layer, weight_shape(meta.unbox(stored)))
        settings = dataclasses.replace(self.settings, dtype=self.settings.dtype or dtype)
        fields |= {"kind": layer.kind, "precision": getattr(module, "precision", None)}
        return make_adapter(cls, call, layer.param, stored, settings, **fields)


def _run_beside(rules: list[LoRARule], proceed: Proceed, call: Call) -> Any:
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
        if rule.settings.lora_bias:
            total = total + _shift(rule, call, layer, _array(total, call))
    return total


def _added(rules: list[LoRARule], proceed: Proceed, call: Call, layer: Layer) -> Any:
    """``y + sum(D)``, and for gains ``g``: ``sum(g * (y + D) + (1 - g) * bias) - (k - 1) * y``.

    ``D = scaling * x·a·b``, and ``y = x·W + bias``. One product with each gain, of a sum: its
    derivatives then need one array of the size of ``y``.
    """
    y = proceed(call)
    if not rules:
        return y
    total, gained = _array(y, call), []
    for rule in rules:
        delta = _delta(rule, call, layer, y, layer.input(call))
        if rule.settings.use_dora:
            gained.append(_gained(call, layer, y + delta, _gain(rule, call, layer)))
        else:
            total = total + delta
    if not gained:
        return total
    if len(gained) == len(rules) == 1:
        return gained[0]
    return functools.reduce(operator.add, [g - y for g in gained], total)


def _gained(call: Call, layer: Layer, z: Array, gain: Array) -> Array:
    """``g * (z - bias) + bias``, for the output ``z`` of the layer and its adapter."""
    equation, dtype = parse_equation(layer.equation(call)), widest(z.dtype)
    axes = equation.output_axes(z.ndim)
    total = scaled_along(z.astype(dtype), gain.astype(dtype), axes, equation.kept)
    bias = meta.unbox(call.module.get_variable("params", layer.bias))
    if bias is not None:
        total = total + along((1 - gain) * bias.astype(dtype), equation.kept, axes)
    return total.astype(z.dtype)


def _attended(rules: list[LoRARule], proceed: Proceed, call: Call, layer: Layer) -> Any:
    """The product with a table, whose outputs are what comes in: gains act on the query."""
    name = embed_input(call)
    query = call.argument(0, name)
    queries, surplus = [], None
    for rule in rules:
        queries.append(query)
        if rule.settings.use_dora:
            gain = along(_gain(rule, call, layer), "f", "." * (query.ndim - 1) + "f")
            queries[-1] = query * gain.astype(query.dtype)
            surplus = gain - 1 if surplus is None else surplus + gain - 1
    if surplus is not None:
        call_with = query * (1 + surplus).astype(query.dtype)
        y = proceed(call.with_argument(0, name, call_with))
    else:
        y = proceed(call)
    for rule, scaled in zip(rules, queries, strict=True):
        y = y + _delta(rule, call, layer, _array(y, call), scaled)
    return y


def _array(y: Any, call: Call) -> Array:
    if not isinstance(y, jax.Array):
        raise ValueError(
            f"An adapter adds to the output of a layer, an array, but "
            f"{type(call.module).__name__} at '{call.path}' returned {type(y).__name__}. Adapt "
            "it at the weight, by `peft.LoRAWeight`."
        )
    return y


def _gain(rule: LoRARule, call: Call, layer: Layer) -> Array:
    """The gain of each output, of an adapter with a magnitude."""
    if call.adapted:
        raise ValueError(
            f"The layer at '{call.path}' has an adapter with a magnitude (use_dora) beside it and "
            "another at its weight, from which the norm could not be told. Adapt both at the "
            "weight, by `peft.LoRAWeight`."
        )
    assert call.weight is not None
    return rule.adapter(call, layer, None).gain(call.weight(), layer.equation(call))


def _delta(rule: LoRARule, call: Call, layer: Layer, y: Array, x: Array) -> Array:
    delta = getattr(rule.adapter(call, layer, y.dtype), call.method)(x)
    if delta.shape != y.shape:
        raise ValueError(
            f"The layer at '{call.path}' returned shape {y.shape}, but by its equation "
            f"'{layer.equation(call)}' the shape is {delta.shape}. Correct the registration of "
            f"{type(call.module).__name__}, or adapt it by `peft.LoRAWeight`."
        )
    return delta.astype(y.dtype)


def _shift(rule: LoRARule, call: Call, layer: Layer, y: Array) -> Array:
    """The adapter's own bias, as it joins the output ``y``."""
    text = layer.equation(call)
    equation = parse_equation(text)
    stored: Any = call.module.get_variable("params", layer.param)
    shape = weight_shape(meta.unbox(stored))
    bias = rule.adapter(call, layer, y.dtype).shift(text, shape).astype(y.dtype)
    if call.method == "attend":  # a bias of every row of the table
        query = call.argument(0, embed_input(call)).astype(y.dtype)
        return jnp.einsum("...f,f->...", query, bias)[..., None]
    return along(bias, equation.kept, equation.output_axes(y.ndim))
