"""Adapters on layers under `nn.WeightNorm` and `nn.SpectralNorm`: they join before normalisation.

Both modules hand the layer inside a normalised view of its parameters, from which the stored
kernel cannot be told. So the adapters act outside: their specs are found by an abstract trace of
the layer, and the norm runs on stored parameters to which their changes have been added.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta

from peft_jax._numerics import adapter_shapes, add_once, spec_changes, spec_norms
from peft_jax._spec import LoraSpec
from peft_jax._surgery import (
    Call,
    Proceed,
    Scope,
    child_scope,
    init_of_copy,
    mute_adapters,
    rngs_of,
    traced_specs,
)
from peft_jax._trees import Layer, Path, adapter_paths, map_layers, slashed, stored_paths

__all__ = [
    "NORMS",
]


NORMS: tuple[type[nn.Module], ...] = (nn.WeightNorm, nn.SpectralNorm)


def around_norm(call: Call, proceed: Proceed) -> Any:
    """Runs a norm whose layer may carry adapters.

    At initialization the output is that of the layer without adapters, which start at zero.
    """
    norm, layer = call.module, call.module.layer_instance
    stored = stored_paths(layer.variables.get("params", {}))
    if stored:
        path = slashed((*layer.scope.path, *stored[0]))
        raise ValueError(
            f"'{path}' holds values stored in few bits, which {type(norm).__name__} at "
            f"'{call.path}' would normalise as if they were the weight. Leave it in floats "
            "(`select=`), or turn it back by `peft.dequantize_checkpoint`."
        )
    kwargs = {name: value for name, value in call.kwargs.items() if name != "update_stats"}
    init = init_of_copy(layer, "__call__")
    specs = traced_specs(
        init, {"params": jax.eval_shape(lambda: jax.random.key(0))}, call.args, kwargs
    )
    if not specs:
        return proceed(call)
    if norm.is_initializing():
        with mute_adapters():
            y = proceed(call)  # which may normalise every array that it finds: they come afterwards
        _store_adapters(layer.scope, init(rngs_of(layer.scope), call.args, kwargs), specs)
        return y

    depth = len(norm.scope.path)
    inside = layer.scope.path[depth:] if layer.scope.path[:depth] == norm.scope.path else ()

    def add_changes(variables: Any) -> Any:
        return {**variables, "params": _at(variables["params"], inside, specs, layer.scope.path)}

    _refuse_missing(layer, specs)
    with mute_adapters():
        return nn.map_variables(
            lambda module, *args, **kwargs: module(*args, **kwargs),
            "params",
            trans_in_fn=lambda v: add_changes(v) if "params" in v else v,
        )(norm, *call.args, **call.kwargs)


def _refuse_missing(layer: Any, specs: dict[str, LoraSpec]) -> None:
    missing = sorted(set(specs) - set(adapter_paths(layer.variables.get("params", {}))))
    if missing:
        path = "/".join((*layer.scope.path, missing[0]))
        raise ValueError(
            f"The parameters hold no adapter at '{path}', where a rule puts one. Initialize the "
            "model under the same rules, or add the adapters by `peft.merge_params`."
        )


def _store_adapters(scope: Scope, params: Any, specs: dict[str, LoraSpec]) -> None:
    """Puts new adapters beside the weights that are there, which magnitudes are those of."""

    def store(path: Path, layer: Layer, adapters: Layer) -> Layer:
        holder = functools.reduce(child_scope, path, scope)
        for name, adapter in adapters.items():
            spec, inner = specs["/".join((*path, name))], child_scope(holder, name)
            for leaf, value in adapter.items():
                if leaf == "magnitude":
                    stored: Any = holder.get_variable("params", str(spec.param))
                    a, b = (meta.unbox(adapter[factor]) for factor in ("a", "b"))
                    norms = spec_norms(meta.unbox(stored), spec, a, b)
                    value = meta.replace_boxed(value, norms.astype(meta.unbox(value).dtype))
                inner.put_variable("params", leaf, value)
        return layer

    map_layers(params, store)


def _at(params: Any, path: Path, specs: dict[str, LoraSpec], layer_path: Path) -> Any:
    """The tree with the adapters below ``path`` added to their weights."""
    if path:
        head, *rest = path
        if head not in params:
            return params
        return {**params, head: _at(params[head], tuple(rest), specs, layer_path)}

    def add(path: Path, layer: Layer, adapters: Layer) -> Layer:
        base = {name: meta.unbox(value) for name, value in layer.items()}
        for name, adapter in adapters.items():
            spec = specs["/".join((*path, name))]
            assert spec.param is not None
            kernel, arrays = (
                base[spec.param],
                {leaf: meta.unbox(value) for leaf, value in adapter.items()},
            )
            a, b = arrays["a"], arrays["b"]
            if not spec.stack_axes and (a.shape, b.shape) != adapter_shapes(spec, kernel.shape):
                raise ValueError(
                    f"The adapter at '{'/'.join((*layer_path, *path, name))}' has arrays of shape "
                    f"{a.shape} and {b.shape}; rank {spec.rank} on this layer needs "
                    f"{adapter_shapes(spec, kernel.shape)}. Use the rank and the layer that the "
                    "parameters were made for."
                )
            for param, change in spec_changes(kernel, arrays, spec).items():
                total = add_once(meta.unbox(layer[param]), change)
                layer[param] = meta.replace_boxed(layer[param], total)
        return layer

    return map_layers(params, add)
