"""How a module's parameters are read through rules."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from peft_jax._flax_internals import patched
from peft_jax._registry import Call, require_layer
from peft_jax._rules import IN_PARTS, STORAGE, Init, Rule
from peft_jax._stored import weight_shape


def by_order(rules: list[Rule]) -> list[list[Rule]]:
    """Rules, sorted already, in groups of one order."""
    return [list(group) for _, group in itertools.groupby(rules, key=lambda rule: rule.order)]


@contextlib.contextmanager
def reading_through(call: Call, rules: list[Rule]) -> Iterator[None]:
    """The module's ``self.param`` returns what the rules make of each parameter."""
    module = call.module
    original = module.param

    def param(name: str, init_fn: Any, *init_args: Any, unbox: bool = True, **kwargs: Any) -> Any:
        def make(key: Any) -> Any:
            return init_fn(key, *init_args, **kwargs)

        stored, value = _read(call, rules, name, make, original)
        return value if unbox else meta.replace_boxed(stored, value)

    with patched(module, "param", param):
        yield


def _read(
    call: Call, rules: list[Rule], name: str, make: Init, param: Callable[..., Any]
) -> tuple[Any, Any]:
    """A parameter as it lies in its box, and what the rules make of it."""

    def read(make: Init) -> Any:
        return param(name, make, unbox=False)

    for rule in rules:
        read = functools.partial(rule.read, call, name, read=read)
    stored = read(make)
    value = meta.unbox(stored)
    for group in by_order(rules):
        value = group[0].transform_together(group, call, name, value)
    return stored, value


def weight_beneath(call: Call, rules: list[Rule]) -> Any:
    """The weight of a registered layer, as it is read through rules beneath the adapters."""
    layer, module = require_layer(call.module, "An adapter changes"), call.module
    params = module.scope.variables()["params"]
    if layer.param not in params:
        raise ValueError(
            f"{type(module).__name__} at '{call.path}' is registered with the parameter "
            f"{layer.param!r}, which it does not have. Correct `peft.register_layer`."
        )
    kept = params[layer.param]
    like = jax.ShapeDtypeStruct(weight_shape(meta.unbox(kept)), jnp.float32)

    def make(key: Any) -> Any:
        return jnp.zeros(like.shape, like.dtype)

    with patched(module, IN_PARTS, all(rule.order == STORAGE for rule in rules)):
        _, value = _read(call, rules, layer.param, make, lambda *_, **__: kept)
    return value
