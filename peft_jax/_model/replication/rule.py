"""How a model runs on shared stacks: how they are read, and how gradients keep no copy of them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import jax
from flax import linen as nn
from flax.core import meta

from peft_jax._layers import NORMS
from peft_jax._numerics import as_stored, takes_a_slice, weight_shape
from peft_jax._surgery import STORAGE, Call, Init, Rule, Transparent, Wrapper, lifts_around
from peft_jax._trees import LayerSlice, Path, shared_in, slashed

__all__ = [
    "reading_rules",
]


def reading_rules(params: Any, path: Path) -> tuple[Any, ...]:
    """Rules for `ModuleInterceptor` by which the model at a path runs on these parameters."""
    return (_Reading(path), _Recomputing()) if shared_in(params) else ()


# --- Reading -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _SliceRule(Rule):
    """Parameters that other rules read in their boxes are checked by what is in the box."""

    order: ClassVar[int] = STORAGE
    name = "layers of shared stacks"
    covers_children: ClassVar[bool] = True

    def at_weight(self, call: Call) -> bool:
        return True

    def concerns(self, call: Call) -> bool:
        params = call.module.scope.variables().get("params", {})
        return any(isinstance(value, LayerSlice) for value in params.values())

    def read(self, call: Call, name: str, make: Init, read: Any) -> Any:
        kept = call.module.get_variable("params", name)
        if not isinstance(kept, LayerSlice):
            return read(make)
        value = meta.unbox(kept)
        if as_stored(value) is not None:  # which is checked by the rule that reads it
            return read(make)
        made = jax.eval_shape(lambda key: meta.unbox(make(key)), jax.random.key(0))
        if weight_shape(value) != made.shape:
            raise ValueError(
                f"'{call.path}/{name}' is a layer of a shared stack, of shape "
                f"{weight_shape(value)}, but {type(call.module).__name__} needs {made.shape}. Give "
                "the parameters of this model."
            )
        return read(lambda key: kept)


class _SliceReader(Wrapper):
    @nn.nowrap
    def rule(self) -> Rule:
        return _SliceRule()


@dataclasses.dataclass(frozen=True)
class _Reading:
    path: Path

    def __call__(self, module: nn.Module) -> nn.Module:
        assert module.scope is not None
        if isinstance(module, NORMS) and _slices(module.layer_instance):
            raise ValueError(
                f"'{slashed(module.layer_instance.scope.path)}' is a layer of a shared stack, and "
                f"{type(module).__name__} normalises parameters without taking them out of their "
                "boxes. Write out the stack, by `flax.linen.meta.unbox(params)`."
            )
        return _SliceReader(wrapped=module) if module.scope.path == self.path else module


# --- Gradients -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _AllButSlices:
    """A policy for ``jax.checkpoint``: layers are sliced off their stack again.

    JAX keeps what a loop slices by itself as it is, once; what the loop's body slices, it would
    keep for each turn of the loop.
    """

    shapes: frozenset[tuple[int, ...]]

    def __call__(self, prim: Any, *avals: Any, **params: Any) -> bool:
        return not (takes_a_slice(prim) and avals[0].shape in self.shapes)


class _Recomputed(Transparent):
    """A module inside the loop over layers, whose layer is not kept for the backward pass."""

    shapes: frozenset[tuple[int, ...]]

    @nn.nowrap
    def _forward(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def run(module: Any) -> Any:
            return getattr(module, method)(*args, **kwargs)

        leaves = jax.tree.leaves((args, kwargs))
        if any(isinstance(leaf, nn.Module) for leaf in leaves):
            return run(self.wrapped)
        policy = _AllButSlices(self.shapes)
        return nn.remat(run, policy=policy, prevent_cse=False)(self.wrapped)


@dataclasses.dataclass(frozen=True)
class _Recomputing:
    def __call__(self, module: nn.Module) -> nn.Module:
        if module.is_initializing() or _is_recomputed(module):
            return module
        slices = _slices(module)
        if not slices:
            return module
        shapes = frozenset[tuple[int, ...]]().union(*(layer.slices for layer in slices))
        return _Recomputed(wrapped=module, shapes=shapes)


def _slices(module: nn.Module) -> list[LayerSlice]:
    shared = shared_in(module.variables.get("params", {}))
    return [layer for layer in shared if isinstance(layer, LayerSlice)]


def _is_recomputed(module: nn.Module) -> bool:
    """Whether the module runs under ``nn.remat`` inside the innermost loop over layers."""
    assert module.scope is not None
    inside_loop = itertools.takewhile(lambda lift: lift != "scan", lifts_around(module.scope))
    return "remat" in inside_loop
