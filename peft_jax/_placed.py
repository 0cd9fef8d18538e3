"""An adapter in the scope of the layer that it adapts: which type, under which name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax.core import meta
from flax.typing import Array, Dtype, Initializer

from peft_jax._adapter import LoRAAdapter
from peft_jax._adapters import (
    LoRAConvAdapter,
    LoRADenseAdapter,
    LoRADenseGeneralAdapter,
    LoRAEinsumAdapter,
    LoRAEmbedAdapter,
    LoRAWeightAdapter,
)
from peft_jax._equation import BATCH_IN_B, parse_equation
from peft_jax._flax_internals import child_scope
from peft_jax._names import DEFAULT, adapter_name, is_adapter
from peft_jax._registry import Call, Layer, find_layer, layer_type

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


def make_adapter(
    cls: Any,
    call: Call,
    param: str,
    stored: Any,
    settings: Settings,
    **fields: Any,
) -> Any:
    """The adapter of one parameter, in the scope of the module that holds the parameter."""
    scope = call.module.scope
    if call.mapped:
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
    _refuse_unused(call, name, taken, settings)
    names = [field.name for field in dataclasses.fields(settings)]
    shared = {name: getattr(settings, name) for name in names if name != "adapter_name"}
    return cls(
        **shared,
        **fields,
        adapts=param,
        simulated=call.simulated and functools.partial(call.simulated, name),
        kernel_metadata=stored if isinstance(stored, meta.AxisMetadata) else None,
        parent=child_scope(scope, name),
        name=name,
    )


def _refuse_unused(call: Call, name: str, taken: Any, settings: Settings) -> None:
    """Arrays that this rule would pass over in silence."""
    for leaf, field in {"magnitude": "use_dora", "bias": "lora_bias"}.items():
        if isinstance(taken, Mapping) and leaf in taken and not getattr(settings, field):
            raise ValueError(
                f"The adapter at '{call.path}/{name}' has a {leaf}, which takes no part without "
                f"{field}=True. Set it, or give the parameters that were made for this rule."
            )


def refuse_another_equation(call: Call, equation: str, kind: str) -> None:
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
        refuse_another_equation(call, equation, kind)
    if settings.dropout:
        raise ValueError(
            f"Dropout acts on a layer's input, but the adapter of '{call.path}' joins the weight "
            f"{name!r}. Set dropout=0 (it is {settings.dropout})."
        )
    stored: Any = call.module.get_variable("params", name)
    fields = {"equation": equation, "kind": kind}
    return make_adapter(LoRAWeightAdapter, call, name, stored, settings, **fields)(value)
