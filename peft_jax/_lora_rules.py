"""What LoRA does to a layer: an adapter beside it, or at its weights."""

from __future__ import annotations

import dataclasses
import difflib
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
from peft_jax._equation import parse_equation, weight_equation
from peft_jax._interceptor import special_call
from peft_jax._low_rank import add_once
from peft_jax._names import adapter_name, is_adapter
from peft_jax._normalised import NORMS, around_norm
from peft_jax._registry import Call, Layer, find_layer, layer_type, require_layer
from peft_jax._rules import ADAPTER, Rule
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
_BATCH_IN_B = frozenset({"dense_general"})


# --- The rule ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LoRARule(Rule):
    """An adapter on one layer: beside it where the layer is a plain product, else at its weight."""

    order: ClassVar[int] = ADAPTER
    name: ClassVar[str] = "lora"
    wrapper: str
    settings: Settings

    def at_weight(self, call: Call) -> bool:
        return not require_layer(call.module, f"{self.wrapper} adapts").beside(call)

    def transform(self, call: Call, name: str, value: Any) -> Any:
        layer = require_layer(call.module, f"{self.wrapper} adapts")
        if name != layer.param:
            return value
        return _with_delta(self.settings, call, name, value, layer)

    def around(self, call: Call, proceed: Callable[[], Any]) -> Any:
        layer = require_layer(call.module, f"{self.wrapper} adapts")
        y = proceed()
        if call.method not in layer.methods or not layer.beside(call):
            return y
        if not isinstance(y, jax.Array):
            raise ValueError(
                f"An adapter adds to the output of a layer, an array, but "
                f"{type(call.module).__name__} at '{call.path}' returned {type(y).__name__}. Adapt "
                "it at the weight, by `peft.LoRAWeight`."
            )
        adapter = self._adapter(call, layer, y.dtype)
        method = getattr(adapter, call.method)
        delta = method(layer.input(call))
        if delta.shape != y.shape:
            raise ValueError(
                f"The layer at '{call.path}' returned shape {y.shape}, but by its equation "
                f"'{layer.equation(call)}' the shape is {delta.shape}. Correct the registration of "
                f"{type(call.module).__name__}, or adapt it by `peft.LoRAWeight`."
            )
        return y + delta.astype(y.dtype)

    def _adapter(self, call: Call, layer: Layer, dtype: Any) -> LoRAAdapter:
        module = call.module
        stored: Any = module.get_variable("params", layer.param)
        if stored is None:
            raise ValueError(
                f"{type(module).__name__} at '{call.path}' is registered with the parameter "
                f"{layer.param!r}, which it does not have. Correct `peft.register_layer`."
            )
        shape = weight_shape(meta.unbox(stored))
        _refuse_another_equation(call, layer)
        cls, fields = _BESIDE[layer.kind](call, layer, shape)
        settings = dataclasses.replace(self.settings, dtype=self.settings.dtype or dtype)
        return _make(
            cls,
            call,
            layer.param,
            stored,
            settings,
            precision=getattr(module, "precision", None),
            **fields,
        )


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
    name = adapter_name(call.module, param)
    taken = scope.get_variable("params", name)
    if taken is not None and not is_adapter(name, taken):
        raise ValueError(
            f"The adapter of '{call.path}' is named {name!r}, but the module has a child or a "
            "parameter of this name. Rename the module's own."
        )
    return cls(
        **{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)},
        **fields,
        adapts=param,
        kernel_metadata=stored if isinstance(stored, meta.AxisMetadata) else None,
        parent=scope.push(name, reuse=True),
        name=name,
    )


def _refuse_another_equation(call: Call, layer: Layer) -> None:
    """One pair of arrays has one delta, whatever equations the layer is called with."""
    batch_in_b = layer.kind in _BATCH_IN_B
    delta = parse_equation(layer.equation(call)).low_rank(batch_in_b=batch_in_b).delta
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


def _with_delta(settings: Settings, call: Call, name: str, value: Any, layer: Any) -> Array:
    """``W + scaling * a·b`` in the dtype of ``W``."""
    shape = jnp.shape(value)
    if layer is not None and layer.param == name:
        _refuse_another_equation(call, layer)
        equation, batch_in_b = layer.equation(call), layer.kind in _BATCH_IN_B
    else:
        equation, batch_in_b = weight_equation(len(shape)), False
    if settings.dropout:
        raise ValueError(
            f"Dropout acts on a layer's input, but the adapter of '{call.path}' joins the weight "
            f"{name!r}. Set dropout=0 (it is {settings.dropout})."
        )
    stored: Any = call.module.get_variable("params", name)
    adapter = _make(
        LoRAWeightAdapter,
        call,
        name,
        stored,
        settings,
        equation=equation,
        shape=shape,
        batch_in_b=batch_in_b,
    )
    return add_once(value, adapter())


@dataclasses.dataclass(frozen=True)
class LoRAWeightRule(Rule):
    """Adapters at the weights of a module and of the modules inside it."""

    order: ClassVar[int] = ADAPTER
    name: ClassVar[str] = "lora"
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

    def transform(self, call: Call, name: str, value: Any) -> Any:
        path = call.module.scope.path
        if not self._names(path, name) or not isinstance(value, jax.Array):
            return value
        if value.ndim < 2:
            if self.params is None:
                return value
            raise ValueError(
                f"LoRAWeight(params={self.params}) names '{'/'.join((*path, name))}', which has "
                f"shape {value.shape}: a low-rank change needs two axes or more. Leave it out."
            )
        return _with_delta(self.settings, call, name, value, find_layer(call.module))

    def around(self, call: Call, proceed: Callable[[], Any]) -> Any:
        try:
            y = proceed()
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
