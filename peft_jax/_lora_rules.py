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

from peft_jax._adapters import (
    LoRAAdapter,
)
from peft_jax._einsum import widest
from peft_jax._equation import parse_equation
from peft_jax._low_rank import add_once
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
        return not layer.beside(call) or (self.settings.use_dora and not layer.only_bias)

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
    """A layer with adapters: ``y + sum((g - 1) * x·W) + sum(g * scaling * x·a·b) + biases``.

    ``g`` is the gain of an adapter with a magnitude, and 1 for others.
    """
    layer = require_layer(call.module, f"{rules[0].wrapper} adapts")
    if call.method not in layer.methods:
        return proceed(call)
    rules, all_rules = [rule for rule in rules if not rule.at_weight(call)], rules
    transposed = call.method == "attend"  # the table's outputs are what comes in
    gains = _gains(rules, call, layer) if transposed else []
    inner = _with_gained_query(call, gains) if transposed else call
    y = proceed(inner)
    if (rules or any(rule.settings.lora_bias for rule in all_rules)) and not isinstance(
        y, jax.Array
    ):
        raise ValueError(
            f"An adapter adds to the output of a layer, an array, but "
            f"{type(call.module).__name__} at '{call.path}' returned {type(y).__name__}. Adapt "
            "it at the weight, by `peft.LoRAWeight`."
        )
    if not transposed:
        gains = _gains(rules, call, layer)
        y = _gained(call, layer, y, gains)
    total = y
    for rule, gain in zip(rules, gains, strict=True):
        total = total + _delta(rule, call, layer, y, gain)
    for rule in all_rules:
        if rule.settings.lora_bias:
            total = total + _shift(rule, call, layer, y)
    return total


def _gains(rules: list[LoRARule], call: Call, layer: Layer) -> list[Array | None]:
    """For each adapter with a magnitude, its gain of each output."""
    if call.adapted and any(rule.settings.use_dora for rule in rules):
        raise ValueError(
            f"The layer at '{call.path}' has an adapter with a magnitude (use_dora) beside it and "
            "another at its weight, from which the norm could not be told. Adapt both at the "
            "weight, by `peft.LoRAWeight`."
        )
    assert call.weight is not None
    return [
        rule.adapter(call, layer, None).gain(call.weight(), layer.equation(call))
        if rule.settings.use_dora
        else None
        for rule in rules
    ]


def _surplus(gains: list[Array | None]) -> Array | None:
    """``sum(g - 1)``: how much more of ``x·W`` there is; None: nothing."""
    terms = [gain - 1 for gain in gains if gain is not None]
    return functools.reduce(operator.add, terms) if terms else None


def _with_gained_query(call: Call, gains: list[Array | None]) -> Call:
    surplus, name = _surplus(gains), embed_input(call)
    if surplus is None:
        return call
    query = call.argument(0, name)
    factor = along(1 + surplus, "f", "." * (query.ndim - 1) + "f")
    return call.with_argument(0, name, query * factor.astype(query.dtype))


def _gained(call: Call, layer: Layer, y: Array, gains: list[Array | None]) -> Array:
    """``y + sum((g - 1) * x·W)`` for the output ``y = x·W + bias`` of a layer."""
    surplus = _surplus(gains)
    if surplus is None:
        return y
    equation = parse_equation(layer.equation(call))
    axes, dtype = equation.output_axes(y.ndim), widest(y.dtype)
    total = y.astype(dtype) * along(1 + surplus, equation.kept, axes)
    bias = meta.unbox(call.module.get_variable("params", "bias"))
    if bias is not None:
        total = total - along(surplus * bias, equation.kept, axes)
    return total.astype(y.dtype)


def _delta(rule: LoRARule, call: Call, layer: Layer, y: Array, gain: Array | None) -> Array:
    method = getattr(rule.adapter(call, layer, y.dtype), call.method)
    delta = method(layer.input(call), gain=gain)
    if delta.shape != y.shape:
        raise ValueError(
            f"The layer at '{call.path}' returned shape {y.shape}, but by its equation "
            f"'{layer.equation(call)}' the shape is {delta.shape}. Correct the registration of "
            f"{type(call.module).__name__}, or adapt it by `peft.LoRAWeight`."
        )
    return delta.astype(y.dtype)


def _shift(rule: LoRARule, call: Call, layer: Layer, y: Array) -> Array:
    """The adapter's own bias, as it joins the output ``y``."""
    assert call.weight is not None
    text = layer.equation(call)
    equation = parse_equation(text)
    stored: Any = call.module.get_variable("params", layer.param)
    shape = weight_shape(meta.unbox(stored))
    bias = rule.adapter(call, layer, y.dtype).shift(text, shape).astype(y.dtype)
    if call.method == "attend":  # a bias of every row of the table
        query = call.argument(0, embed_input(call)).astype(y.dtype)
        return jnp.einsum("...f,f->...", query, bias)[..., None]
    return along(bias, equation.kept, equation.output_axes(y.ndim))
