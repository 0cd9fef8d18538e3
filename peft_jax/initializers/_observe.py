"""Second moments of what layers are given, gathered while a model runs.

Values cannot leave the body of a scan by themselves, but gradients by parameters do. So each
observed layer gets further parameters, the probes, whose gradients are, by a rule of their own, the
moments of the layer's inputs. Whatever lifts the model's parameters (scan, vmap, remat) lifts the
probes with them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.typing import Array

from peft_jax._layers import adapter_fields
from peft_jax._model import Forward
from peft_jax._numerics import weight_shape
from peft_jax._spec import BATCH_IN_B, LoraSpec, parse_equation
from peft_jax._surgery import (
    STORAGE,
    Call,
    Layer,
    ModuleInterceptor,
    Proceed,
    Rule,
    Wrapper,
    require_layer,
)
from peft_jax._trees import Path, children, is_branch, rebuild, slashed

_PROBE = "_peft_jax_probe"
Moments = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Observation:
    """What is gathered of a layer's inputs, and how.

    Attributes:
      normalised: whether the inputs of each call are divided by their largest number, and a call
        counts as one; else a row counts as one.
      dtype: of the squares.
    """

    normalised: bool = False
    dtype: Any = jnp.float32


# --- The rows of a layer -------------------------------------------------------------------------


def input_rows(call: Call, layer: Layer, shape: tuple[int, ...], x: Array) -> Array:
    """What a layer multiplies the matrices of its weight by: ``(batch, rows, in)``.

    That is the first product of an adapter whose ``a`` is an identity: patches of a convolution,
    one-hot rows of a lookup.

    Args:
      call: of the layer.
      layer: what is known of it.
      shape: of its weight.
      x: its input.
    """
    if layer.kind == "embed":
        return jax.nn.one_hot(x.reshape(1, -1), shape[0], dtype=jnp.float32)
    equation = parse_equation(layer.equation(call))
    low_rank = equation.low_rank(batch_in_b=layer.kind in BATCH_IN_B)
    sizes = equation.sizes(shape)
    batch = [c for c in low_rank.b if c in low_rank.batch]
    inputs = [c for c in low_rank.a if c not in low_rank.b]
    length = math.prod(sizes[c] for c in inputs)
    eye = jnp.eye(length, dtype=x.dtype).reshape(*(sizes[c] for c in inputs), length)
    if layer.kind == "conv":
        cls, fields = adapter_fields(call, layer, shape)
        convolution: Any = cls(**fields, rank=length, parent=None)
        return convolution.hidden(x, eye).reshape(1, -1, length)
    hidden_letters = low_rank.first.partition("->")[2]
    letters = f"{equation.inputs},{''.join(inputs)}{low_rank.rank}->{hidden_letters}"
    hidden = jnp.einsum(letters, x, eye)
    axes = dataclasses.replace(equation, outputs=hidden_letters).output_axes(hidden.ndim)
    places = [axes.index(c) for c in batch]
    rest = [i for i in range(hidden.ndim - 1) if i not in places]
    hidden = hidden.transpose((*places, *rest, hidden.ndim - 1))
    return hidden.reshape(math.prod(sizes[c] for c in batch), -1, length)


def _moments(
    call: Call, layer: Layer, shape: tuple[int, ...], mask: Array | None, how: Observation
) -> Moments:
    """``square (batch, in, in)``, ``sum (batch, in)`` and ``count ()`` of a call's inputs."""
    x = layer.input(call)
    kept = jnp.ones((), jnp.float32)
    if mask is not None:
        if x.shape[: mask.ndim] != mask.shape or layer.kind == "conv":
            raise ValueError(
                f"The mask of shape {mask.shape} does not fit the input of '{call.path}', of shape "
                f"{x.shape}. Leave the layer out, or observe without a mask."
            )
        kept = jnp.mean(mask.astype(jnp.float32))
    if layer.kind == "embed":
        rows = input_rows(call, layer, shape, x)
        if mask is not None:
            full = jnp.broadcast_to(_spread(mask, x.ndim), x.shape)
            rows = jnp.where(full.reshape(1, -1, 1), rows, 0)
    else:
        x = x.astype(jnp.float32)
        x = x if mask is None else jnp.where(_spread(mask, x.ndim), x, 0)
        rows = input_rows(call, layer, shape, x)
    count = jnp.float32(rows.shape[1]) * kept
    if how.normalised:
        largest = jnp.abs(jnp.max(rows))
        rows, count = rows / jnp.where(largest > 0, largest, 1), jnp.ones((), jnp.float32)
    square = jnp.einsum("bni,bnj->bij", rows, rows, precision=jax.lax.Precision.HIGHEST)
    return {"square": square.astype(how.dtype), "sum": jnp.sum(rows, axis=1), "count": count}


def _spread(mask: Array, ndim: int) -> Array:
    return mask.astype(bool).reshape(mask.shape + (1,) * (ndim - mask.ndim))


@jax.custom_vjp
def _noted(y: Array, moments: Moments, probe: Moments) -> Array:
    """``y``; the gradient by the probe is the moments."""
    return y


def _noted_forward(y: Array, moments: Moments, probe: Moments) -> tuple[Array, Moments]:
    return y, moments


def _noted_backward(moments: Moments, cotangent: Array) -> tuple[Array, Moments, Moments]:
    return cotangent, jax.tree.map(jnp.zeros_like, moments), moments


_noted.defvjp(_noted_forward, _noted_backward)


# --- The rule ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """One run of the model; compares by identity, as what it holds belongs to one trace.

    Attributes:
      params: names of the weights of the observed modules, by their paths.
      how: what is gathered.
      mask: which rows count.
      shapes: filled with the shapes of the moments, where the run is to find them.
    """

    params: Mapping[Path, str]
    how: Observation
    mask: Array | None
    shapes: dict[Path, tuple[tuple[int, ...], Any]] | None = None


@dataclasses.dataclass(frozen=True)
class _ObserveRule(Rule):
    order: ClassVar[int] = STORAGE
    name = "observation"
    run: _Run

    def around(self, call: Call, proceed: Proceed) -> Any:
        y = proceed(call)
        layer, scope = require_layer(call.module, "Observed are"), call.module.scope
        if call.method != layer.methods[0]:
            return y
        if not layer.beside(call):
            raise ValueError(
                f"The layer at '{call.path}' is no plain product of its input and its weight, so "
                "that nothing is known of what the weight is multiplied by. Leave it out of the "
                "config (exclude_modules)."
            )
        shape = weight_shape(meta.unbox(scope.get_variable("params", layer.param)))
        x = jax.lax.stop_gradient(layer.input(call))
        found = functools.partial(_moments, layer=layer, shape=shape, how=self.run.how)
        moments = jax.lax.stop_gradient(found(_given(call, layer, x), mask=self.run.mask))
        if self.run.shapes is not None:
            types = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), moments)
            self.run.shapes[scope.path] = shape, types
            return y
        return _noted(y, moments, scope.get_variable("params", _PROBE))


def _given(call: Call, layer: Layer, x: Any) -> Call:
    """The call, where its input is found by position, with the input that is a constant."""
    return dataclasses.replace(call, args=(x, *call.args[1:])) if call.args else call


class _Observed(Wrapper):
    run: _Run

    @nn.nowrap
    def rule(self) -> Rule:
        return _ObserveRule(self.run)


@dataclasses.dataclass(frozen=True)
class _Observe:
    run: _Run

    def __call__(self, module: nn.Module) -> nn.Module:
        assert module.scope is not None
        if module.scope.path not in self.run.params:
            return module
        return _Observed(wrapped=module, run=self.run)


# --- Over a model --------------------------------------------------------------------------------


class Observer:
    """Gathers moments of the inputs of adapted layers, batch by batch.

    Args:
      forward: runs the model, from parameters and a batch.
      params: of the plain model.
      specs: of the adapters whose layers are observed.
      how: what is gathered.
    """

    def __init__(
        self, forward: Forward, params: Any, specs: Mapping[str, LoraSpec], how: Observation
    ) -> None:
        self._forward, self._how = forward, how
        self._names = {path: tuple(path.split("/"))[:-1] for path in specs}
        self._weights = {self._names[path]: str(spec.param) for path, spec in specs.items()}
        self._params = params
        self._probes: dict[Path, Moments] = {}
        self._step = jax.jit(self._gather)

    def __call__(self, batch: Any, mask: Array | None = None) -> dict[str, Moments]:
        """Moments by path of adapter, with the axes of a stack in front.

        Raises:
          ValueError: where a layer is not reached, or a mask does not fit.
        """
        if not self._probes:
            self._probes = self._find(batch, mask)
        found = self._step(self._params, self._probes, batch, mask)
        unseen = [path for path, m in found.items() if not float(jnp.min(m["count"])) > 0]
        if unseen:
            raise ValueError(
                f"Nothing was seen of the inputs of {[slashed(path) for path in unseen[:5]]}: this "
                "batch does not reach them, all its rows are masked, or no derivative flows "
                "from the model's output to them."
            )
        return {path: found[where] for path, where in self._names.items()}

    def _find(self, batch: Any, mask: Array | None) -> dict[Path, Moments]:
        """Zeros in the shapes of the moments, stacked as the parameters are."""
        shapes: dict[Path, tuple[tuple[int, ...], Any]] = {}

        def run(params: Any, batch: Any, mask: Any) -> Any:
            with ModuleInterceptor(_Observe(_Run(self._weights, self._how, mask, shapes))):
                return self._forward(params, batch)

        jax.eval_shape(run, self._params, batch, mask)
        missing = sorted(slashed(path) for path in set(self._weights) - set(shapes))
        if missing:
            raise ValueError(
                f"The layers at {missing[:5]} do not run on this batch, so that nothing can be "
                "learned of their inputs. Give batches that reach them, or leave them out of the "
                "config (exclude_modules)."
            )
        return {path: self._zeros(path, *shapes[path]) for path in shapes}

    def _zeros(self, path: Path, shape: tuple[int, ...], types: Any) -> Moments:
        whole = weight_shape(meta.unbox(_at(self._params, (*path, self._weights[path]))))
        stack = whole[: len(whole) - len(shape)]
        if (*stack, *shape) != whole:
            raise ValueError(
                f"The layers at '{slashed(path)}' are stacked along an axis other than the first. "
                "Observe them in a model that stacks along axis 0."
            )
        return jax.tree.map(lambda one: jnp.zeros((*stack, *one.shape), one.dtype), types)

    def _gather(self, params: Any, probes: Any, batch: Any, mask: Any) -> Any:
        def objective(probes: Any) -> Array:
            run = _Run(self._weights, self._how, mask)
            with ModuleInterceptor(_Observe(run)):
                y = self._forward(_with_probes(params, probes), batch)
            floats = [
                leaf for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.inexact)
            ]
            zeros = [jnp.sum(leaf.astype(jnp.float32)) * 0 for leaf in floats]
            return functools.reduce(jnp.add, zeros, jnp.zeros(()))

        return jax.grad(objective)(probes)


def _at(tree: Any, path: Path) -> Any:
    for name in path:
        tree = {str(key): value for key, value in children(tree)}[name]
    return tree


def _with_probes(tree: Any, probes: Mapping[Path, Moments], path: Path = ()) -> Any:
    if not is_branch(tree):
        return tree
    here = {key: _with_probes(value, probes, (*path, str(key))) for key, value in children(tree)}
    if path in probes:
        here[_PROBE] = probes[path]
    return rebuild(tree, here)
