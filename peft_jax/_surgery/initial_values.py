"""The first value of a parameter, as another initializer draws it, without the scope noticing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft_jax._surgery.flax_internals import params_of, scope_for_init

__all__ = [
    "init_of_copy",
]


def init_of_copy(layer: Any, method: str) -> Callable[..., Any]:
    """Initializes a copy of a bound module by one of its methods, as a function.

    The copy lies in a scope of the same path but without variables.
    """

    def init(rngs: Any, args: Any, kwargs: Any) -> Any:
        with scope_for_init(layer.scope, rngs) as scope:
            getattr(layer.copy(parent=scope, name=layer.name), method)(*args, **kwargs)
            return params_of(scope)

    return init
