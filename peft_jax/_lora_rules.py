"""What LoRA does to a layer: an adapter beside it, or at its weights."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.errors import NameInUseError
from flax.typing import Array, Dtype, Initializer

from peft_jax._adapters import (
    LoRAAdapter,
    LoRAConvAdapter,
    LoRADenseAdapter,
    LoRADenseGeneralAdapter,
    LoRAEinsumAdapter,
    LoRAEmbedAdapter,
    LoRAWeightAdapter,
)
from peft_jax._einsum import widest
from peft_jax._equation import BATCH_IN_B, parse_equation, weight_equation
from peft_jax._interceptor import special_call
from peft_jax._low_rank import add_once
from peft_jax._magnitude import along
from peft_jax._names import DEFAULT, adapter_name, is_adapter
from peft_jax._normalised import NORMS, around_norm
from peft_jax._registry import Call, Layer, embed_input, find_layer, layer_type, require_layer
from peft_jax._rules import ADAPTER, Proceed, Rule
from peft_jax._stored import as_stored, weight_shape

_DELTA = "_peft_jax_delta"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields that every LoRA wrapper shares; see `LoRAAdapter`."""

    rank: int
    alpha: float | None
    dropout: float
    deterministic: bool | None
    dtype: Dtype | None
    param_dtype: Dtype
    a_init: Initializer
    b_init: Initializer
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    adapter_name: str = DEFAULT


# --- The adapter beside a layer of each kind -----------------------------------------------------

Build = Callable[[Call, Layer, tuple[int, ...]], tuple[type[LoRAAdapter], dict[str, Any]]]


def _conv(call: Call, layer: Layer, shape: tuple[int, ...]) -> Any:
    module = call.module
    names = ["features", "kernel_size", "strides", "padding", "kernel_dilation"]
    transpose = issubclass(layer_type(module), nn.ConvTranspose)
    if not transpose:
        names += ["input_dilation", "feature_group_count"]
    fields = {name: getattr(module, name) for name in names}
    return LoRAConvAdapter, {**fields, "transpose": transpose}


_BESIDE: Mapping[str, Build] = {
    "dense": lambda call, layer, shape: (LoRADenseAdapter, {"features": shape[-1]}),
    "einsum": lambda call, layer, shape: (
        LoRAEinsumAdapter,
        {"einsum_str": layer.equation(call), "shape": shape},
    ),
    "dense_general": lambda call, layer, shape: (
        LoRADenseGeneralAdapter,
        {
            "features": call.module.features,
            "axis": call.module.axis,
            "batch_dims": call.module.batch_dims,
        },
    ),
    "conv": _conv,
    "embed": lambda call, layer, shape: (
        LoRAEmbedAdapter,
        {"num_embeddings": shape[0], "features": shape[1]},
    ),
}


def adapter_fields(
    call: Call, layer: Layer, shape: tuple[int, ...]
) -> tuple[type[LoRAAdapter], dict[str, Any]]:
    """The type and the fields of the adapter beside a layer with a weight of this shape."""
    return _BESIDE[layer.kind](call, layer, shape)


# --- Rules ---------------------------------------------------------------------------------------


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
        _refuse_another_equation(call, layer.equation(call), layer.kind)
        cls, fields = adapter_fields(call, layer, weight_shape(meta.unbox(stored)))
        settings = dataclasses.replace(self.settings, dtype=self.settings.dtype or dtype)
        fields |= {"kind": layer.kind, "precision": getattr(module, "precision", None)}
        return _make(cls, call, layer.param, stored, settings, **fields)


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


def _make(
    cls: Any,
    call: Call,
    param: str,
    stored: Any,
    settings: Settings,
    **fields: Any,
) -> Any:
    """The adapter of one parameter, in the scope of the module that holds the parameter."""
    scope = call.module.scope
    if any(part.startswith("map_variables(") for part in scope.debug_path):
        raise ValueError(
            f"The layer at '{call.path}' runs inside `nn.map_variables` (or a wrapper is written "
            "inside nn.WeightNorm or nn.SpectralNorm), where parameters are not those that are "
            "stored, so that fused weights would give other answers. Leave it out of the rule; "
            "for layers under a norm, use `peft.ModuleInterceptor` in place of the wrapper."
        )
    name = adapter_name(call.module, param, settings.adapter_name)
    taken = scope.get_variable("params", name)
    if taken is not None and not is_adapter(name, taken):
        raise ValueError(
            f"The adapter of '{call.path}' is named {name!r}, but the module has a child or a "
            "parameter of this name. Rename the module's own."
        )
    names = [field.name for field in dataclasses.fields(settings)]
    shared = {name: getattr(settings, name) for name in names if name != "adapter_name"}
    return cls(
        **shared,
        **fields,
        adapts=param,
        kernel_metadata=stored if isinstance(stored, meta.AxisMetadata) else None,
        parent=scope.push(name, reuse=True),
        name=name,
    )


def _refuse_another_equation(call: Call, equation: str, kind: str) -> None:
    """One pair of arrays has one delta, whatever equations the layer is called with."""
    delta = parse_equation(equation).low_rank(batch_in_b=kind in BATCH_IN_B).delta
    before = call.module.__dict__.setdefault(_DELTA, delta)
    if _pattern(before) != _pattern(delta):
        raise ValueError(
            f"The layer at '{call.path}' is called with equations whose changes of the kernel "
            f"differ ('{before}', then '{delta}'): one adapter cannot serve both. Leave it out of "
            "the rule, or give each use a layer of its own."
        )


def _pattern(equation: str) -> tuple[int, ...]:
    """An equation up to the choice of letters."""
    return tuple(equation.index(c) for c in equation)


def weight_change(
    settings: Settings, call: Call, name: str, value: Any, equation: str, kind: str | None
) -> Array:
    """What an adapter adds to a weight, in float32 or wider."""
    layer = find_layer(call.module)
    if layer is not None and layer.param == name and kind is not None:
        _refuse_another_equation(call, equation, kind)
    if settings.dropout:
        raise ValueError(
            f"Dropout acts on a layer's input, but the adapter of '{call.path}' joins the weight "
            f"{name!r}. Set dropout=0 (it is {settings.dropout})."
        )
    stored: Any = call.module.get_variable("params", name)
    fields = {"equation": equation, "kind": kind}
    return _make(LoRAWeightAdapter, call, name, stored, settings, **fields)(value)


@dataclasses.dataclass(frozen=True)
class LoRAWeightRule(AdapterRule):
    """Adapters at the weights of a module and of the modules inside it."""

    covers_children: ClassVar[bool] = True
    settings: Settings
    params: tuple[str, ...] | None

    def _names(self, path: tuple[str, ...], name: str) -> bool:
        if self.params is None:
            return True
        full = "/".join((*path, name))
        return any(full == entry or full.endswith("/" + entry) for entry in self.params)

    def concerns(self, call: Call) -> bool:
        if self.params is None:
            return True
        layer = find_layer(call.module)
        return layer is None or self._names(call.module.scope.path, layer.param)

    def at_weight(self, call: Call) -> bool:
        return True

    def change(self, call: Call, name: str, value: Any) -> Array | None:
        path = call.module.scope.path
        if not self._names(path, name) or not isinstance(value, jax.Array):
            return None
        if value.ndim < 2:
            if self.params is None:
                return None
            raise ValueError(
                f"LoRAWeight(params={self.params}) names '{'/'.join((*path, name))}', which has "
                f"shape {value.shape}: a low-rank change needs two axes or more. Leave it out."
            )
        layer = find_layer(call.module)
        if layer is None or layer.param != name:
            return weight_change(
                self.settings, call, name, value, weight_equation(value.ndim), None
            )
        return weight_change(self.settings, call, name, value, layer.equation(call), layer.kind)

    def around(self, call: Call, proceed: Proceed) -> Any:
        try:
            y = proceed(call)
        except NameInUseError as error:
            raise ValueError(
                f"{type(call.module).__name__} at '{call.path}' has a child or a parameter named "
                "'lora' or 'lora_<parameter>', as its adapters are. Rename the module's own."
            ) from error
        if call.method == "__call__":
            self._check_used(call)
        return y

    def _check_used(self, call: Call) -> None:
        found = _kernels(call.module.variables.get("params", {}))
        self._check_names(call, found)
        if call.module.is_initializing() and not any(adapted for _, adapted in found):
            raise ValueError(
                f"LoRAWeight found nothing to adapt in {type(call.module).__name__} at "
                f"'{call.path}': its parameters of two or more axes are "
                f"{[path for path, _ in found]}. Wrap the module that reads the parameter, before "
                "it is first used."
            )

    def _check_names(self, call: Call, found: list[tuple[str, bool]]) -> None:
        base = call.module.scope.path
        for entry in self.params or ():
            paths = ["/".join((*base, path)) for path, _ in found]
            if not any(path == entry or path.endswith("/" + entry) for path in paths):
                close = difflib.get_close_matches(entry, [path for path, _ in found], 3, 0.0)
                raise ValueError(
                    f"LoRAWeight(params={self.params}): {entry!r} is no parameter of two or more "
                    f"axes of {type(call.module).__name__} at '{call.path}'. Close names: {close}."
                )


def _kernels(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, bool]]:
    """Paths of the parameters of two or more axes, and whether an adapter lies beside each."""
    found: list[tuple[str, bool]] = []
    adapted = any(is_adapter(name, value) for name, value in params.items())
    for name, value in params.items():
        if is_adapter(name, value):
            continue
        if isinstance(value, Mapping) and as_stored(value) is None:
            found += _kernels(value, f"{prefix}{name}/")
        elif len(weight_shape(meta.unbox(value))) >= 2:
            found.append((prefix + name, adapted))
    return found


for _norm in NORMS:
    special_call(_norm, around_norm)
