"""How a module's parameters are read through rules."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from peft_jax._numerics import weight_shape
from peft_jax._surgery.flax_internals import patched
from peft_jax._surgery.layer_kinds import require_layer
from peft_jax._surgery.rules import IN_PARTS, STORAGE, Call, Init, Rule, Untouched


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


class _Host(nn.Module, Untouched):
    """Where a rule runs: modules that it makes wait to be bound, as they do in any ``setup``.

    Flax would have the module itself for their parent; but it may be past its setup, and a child
    that holds its parent has a `repr` without end.
    """

    make: Callable[[], Any]

    @nn.nowrap
    def sow(self, *args: Any, **kwargs: Any) -> bool:
        """Records nothing: the host is no part of the model."""
        return False

    def setup(self) -> None:
        self.made = _Opaque(self.make())


@dataclasses.dataclass(frozen=True)
class _Opaque:
    """Keeps Flax from taking a module that belongs elsewhere for a child."""

    content: Any


def made(replace_fn: Callable[[Any], Any], call: Call) -> Any:
    """What a rule makes of the module, bound in its scope."""
    module = call.module
    host = _Host(lambda: replace_fn(module), parent=module.scope, name="host")
    replacement = host.made.content
    if isinstance(replacement, nn.Module) and replacement.scope is None:
        return replacement.clone(parent=module.scope, name=module.name or "replacement")
    return replacement
