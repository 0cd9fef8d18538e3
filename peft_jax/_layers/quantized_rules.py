"""What quantized wrappers do to a layer: where its weight is read, and how its product runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from flax.typing import Array

from peft_jax._numerics import (
    Convolution,
    QuantizationMethod,
    Weight,
    as_stored,
    axes_for,
    check_scale,
    dequantize,
    quantize_layer,
    quantized_einsum,
    quantized_product,
    quantized_rows,
    simulate_quantize,
)
from peft_jax._spec import contracted_axes
from peft_jax._surgery import (
    IN_PARTS,
    SIMULATION,
    STORAGE,
    Call,
    Init,
    Layer,
    Proceed,
    Rule,
    layer_type,
    patched,
    recording,
    require_layer,
)
from peft_jax._trees import partitioned_like, reboxed, scale_axes, scale_name, unused_scale_name

# --- Simulation ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SimulationRule(Rule):
    """The layer reads its weight as quantization would leave it."""

    order: ClassVar[int] = SIMULATION
    name = "simulated quantization"
    wrapper: str
    method: QuantizationMethod

    def at_weight(self, call: Call) -> bool:
        return self.method is not QuantizationMethod.NONE

    def transform(self, call: Call, name: str, value: Any) -> Any:
        layer = require_layer(call.module, f"{self.wrapper} wraps")
        if name != layer.param or recording():
            return value
        with _at(call, name):
            contracted = contracted_axes(layer.equation(call))
            return simulate_quantize(value, self.method, axes_for(self.method, contracted))


# --- Storage -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StorageRule(Rule):
    """The layer's weight is stored in few bits."""

    order: ClassVar[int] = STORAGE
    name = "stored values"
    wrapper: str
    method: QuantizationMethod

    def at_weight(self, call: Call) -> bool:
        return True

    def read(self, call: Call, name: str, make: Init, read: Callable[[Init], Any]) -> Any:
        layer, module = require_layer(call.module, f"{self.wrapper} wraps"), call.module
        if name != layer.param or recording():
            return read(make)
        if call.mapped:
            raise ValueError(
                f"The layer at '{call.path}' runs inside `nn.map_variables` (nn.WeightNorm and "
                "nn.SpectralNorm do so), where parameters are not those that are stored. Leave it "
                f"out of the rule of {self.wrapper}."
            )
        if not module.has_variable("params", name):
            return self._store(call, layer, read(make))
        weight = self._stored(call, layer)
        made = jax.eval_shape(lambda key: meta.unbox(make(key)), jax.random.key(0))
        if weight.shape != made.shape:
            raise ValueError(
                f"'{call.path}/{name}' holds stored values of shape {weight.shape}, but "
                f"{type(module).__name__} needs {made.shape}. Give the parameters of this model."
            )
        kept = module.get_variable("params", name)
        box = read(lambda key: kept)
        weight = weight.astype(made.dtype)
        value = weight if module.__dict__.get(IN_PARTS) else weight.dequantized()
        return reboxed(box, value)

    def around(self, call: Call, proceed: Proceed) -> Any:
        layer = require_layer(call.module, f"{self.wrapper} wraps")
        run = None if call.changed or recording() else _product(call, layer)
        if run is None or not call.module.has_variable("params", layer.param):
            return proceed(call)
        return run(call, functools.partial(self._stored, call, layer), proceed)

    def _store(self, call: Call, layer: Layer, drawn: Any) -> Any:
        """Puts the quantized weight in the place of the one that the layer has drawn."""
        scope, value = call.module.scope, meta.unbox(drawn)
        with _at(call, layer.param):
            contracted = contracted_axes(layer.equation(call))
            values, scale = quantize_layer(value, self.method, contracted)
        scale_at = unused_scale_name(layer.param, scope.variables().get("params", {}))
        scale_box = partitioned_like(drawn, scale, scale_axes(value.shape, scale.shape))
        scope.put_variable("params", layer.param, reboxed(drawn, values))
        scope.put_variable("params", scale_at, scale_box)
        return reboxed(drawn, dequantize(values, scale, value.dtype))

    def _stored(self, call: Call, layer: Layer) -> Weight:
        """The stored weight of the layer, if it is what this rule reads."""
        params, at = call.module.scope.variables()["params"], f"{call.path}/{layer.param}"
        stored = as_stored(meta.unbox(params[layer.param]))
        if stored is None:
            raise ValueError(
                f"'{at}' holds {_described(meta.unbox(params[layer.param]))}, but {self.wrapper} "
                f"reads stored {self.method.value} values. Quantize the parameters by "
                f"`peft.quantize_checkpoint(params, method={self.method.value!r})`."
            )
        if stored.method != self.method.value:
            raise ValueError(
                f"'{at}' holds stored {stored.method} values, but {self.wrapper} reads those of "
                f"{self.method.value}. Wrap the layer with method={stored.method!r}."
            )
        name = scale_name(layer.param, params)
        if name is None:
            raise ValueError(
                f"'{at}' holds stored values without their scale: beside them lie "
                f"{sorted(params)}. Keep both, as `peft.quantize_checkpoint` makes them."
            )
        scale = meta.unbox(params[name])
        with _at(call, layer.param):
            check_scale(stored.shape, jnp.shape(scale))
        return Weight(stored, scale, jnp.dtype(jnp.float32))


@contextlib.contextmanager
def _at(call: Call, name: str) -> Iterator[None]:
    """Errors of array functions say which parameter they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"'{call.path}/{name}': {error}") from error


def _described(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else repr(value)


# --- Products of Flax's own layers ---------------------------------------------------------------
# Each runs a call with the weight in parts. Layers of other types, and those with functions of
# their own injected, read the dequantized weight.

Run = Callable[[Call, Callable[[], Weight], Proceed], Any]


def _product(call: Call, layer: Layer) -> Run | None:
    """How the call runs with the weight in parts; None where it reads the weight as a whole."""
    cls = layer_type(call.module)
    if call.method not in layer.methods or not layer.beside(call):
        return None
    for flax_type, run in _PRODUCTS.items():
        own = getattr(flax_type, call.method, None)
        if issubclass(cls, flax_type) and getattr(cls, call.method) is own:
            return run
    return None


def _through(injected: str, function: Callable[..., Any]) -> Run:
    """Has the layer's own forward call ``function`` for its product, with a `Weight`."""

    def run(call: Call, stored: Callable[[], Weight], proceed: Proceed) -> Any:
        with (
            patched(call.module, IN_PARTS, True),
            patched(call.module, "promote_dtype", _promote),
            patched(call.module, injected, function),
        ):
            return proceed(call)

    return run


def _promote(*args: Any, **kwargs: Any) -> list[Any]:
    """Flax's promotion, for weights too."""
    arrays = [jnp.zeros((), arg.dtype) if isinstance(arg, Weight) else arg for arg in args]
    return [
        given.astype(promoted.dtype) if isinstance(given, Weight) else promoted
        for given, promoted in zip(args, promote_dtype(*arrays, **kwargs), strict=True)
    ]


def _dot_general(
    lhs: Array,
    rhs: Weight,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    (left_summed, right_summed), (left_batch, right_batch) = dimension_numbers
    left = string.ascii_letters[: lhs.ndim]
    right = list(string.ascii_letters[lhs.ndim : lhs.ndim + len(rhs.shape)])
    for i, j in zip((*left_summed, *left_batch), (*right_summed, *right_batch), strict=True):
        right[j] = left[i]
    batch = [left[i] for i in left_batch]
    free = [c for c in (*left, *right) if (c in left) != (c in right)]
    equation = f"{left},{''.join(right)}->{''.join(batch + free)}"
    return quantized_einsum(
        equation, lhs, rhs.values, rhs.scale, precision=precision, dtype=preferred_element_type
    )


def _conv_general_dilated(lhs: Array, rhs: Weight, *args: Any, **kwargs: Any) -> Array:
    given = inspect.signature(jax.lax.conv_general_dilated).bind(lhs, rhs, *args, **kwargs)
    options = tuple((name, _hashable(value)) for name, value in list(given.arguments.items())[2:])
    return quantized_product(Convolution(options), lhs, rhs.values, rhs.scale)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _einsum(call: Call, stored: Callable[[], Weight], proceed: Proceed) -> Any:
    """The forward of ``nn.Einsum``, which has no place for a product of ours."""
    module, weight = call.module, stored()
    if weight.shape != tuple(module.shape):
        return proceed(call)  # which says so
    layer = require_layer(module, "Int4Einsum wraps")
    equation, inputs = layer.equation(call).replace(" ", ""), layer.input(call)
    operands, outputs = equation.split("->")
    length = dict(zip(operands.split(",")[1], module.shape, strict=True))
    bias = None
    if module.use_bias:
        shape = [length[c] for c in outputs if c in length]
        bias = module.param("bias", module.bias_init, shape, module.param_dtype)
    inputs, kernel, bias = _promote(
        inputs, weight.astype(module.param_dtype), bias, dtype=module.dtype
    )
    y = quantized_einsum(
        equation,
        inputs,
        kernel.values,
        kernel.scale,
        precision=module.precision,
        dtype=module.preferred_element_type,
    )
    if bias is None:
        return y
    named = outputs.replace("...", "." * (y.ndim - len(outputs.replace("...", ""))))
    return y + bias.reshape([length.get(c, 1) for c in named])


def _embed(call: Call, stored: Callable[[], Weight], proceed: Proceed) -> Any:
    """The forward of ``nn.Embed`` and its ``attend``."""
    module, weight = call.module, stored().astype(call.module.param_dtype)
    layer = require_layer(module, "Int4Embed wraps")
    x = layer.input(call) if call.method == "__call__" else call.argument(0, "query")
    if weight.shape != (module.num_embeddings, module.features) or module.num_embeddings == 1:
        return proceed(call)
    if call.method == "attend":
        x, table = _promote(x, weight, dtype=module.dtype)
        return quantized_einsum("...f,vf->...v", x, table.values, table.scale)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return proceed(call)  # which says so
    (table,) = _promote(weight, dtype=module.dtype, inexact=False)
    return quantized_rows(table.values, table.scale, x, table.dtype)


_PRODUCTS: Mapping[type[nn.Module], Run] = {
    nn.Dense: _through("dot_general", _dot_general),
    nn.DenseGeneral: _through("dot_general", _dot_general),
    nn.Einsum: _einsum,
    nn.Conv: _through("conv_general_dilated", _conv_general_dilated),
    nn.Embed: _embed,
}
