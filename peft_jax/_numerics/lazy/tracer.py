"""Lazy weights as values of JAX; what operations make of them is the frame's affair."""

from __future__ import annotations

from typing import Any

import jax

from peft_jax._numerics.jax_internals import Tracer
from peft_jax._numerics.lazy.weight import LazyWeight, Scaled

__all__ = [
    "is_lazy",
]


class LazyTracer(Tracer):
    """A lazy weight, as functions of arrays meet it."""

    __slots__ = ("dense", "lazy")

    def __init__(self, trace: Any, lazy: LazyWeight | Scaled) -> None:
        base = lazy.weight.base if isinstance(lazy, Scaled) else lazy.base
        super().__init__(trace, jax.typeof(base))
        self.lazy = lazy
        self.dense: Any = None  # once an operation has needed it

    def full_lower(self) -> Any:
        # What JAX computes with outside of every trace: a weight that outlived its frame is dense
        # there, such as one that `setup` of a bound module has stored.
        return self._trace.plain(self, "eager") if self._trace.is_closed else self

    # Values that Python looks at: as those of the dense weight, which may itself be traced.

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._trace.plain(self, "numpy").__array__(*args, **kwargs)

    def __bool__(self) -> bool:
        return bool(self._trace.plain(self, "bool"))

    def __float__(self) -> float:
        return float(self._trace.plain(self, "float"))

    def __repr__(self) -> str:
        names = [str(part.source) for part in weight_of(self.lazy).parts]
        return f"LazyWeight({self.dtype}{list(self.shape)}, of {', '.join(names)})"


def weight_of(lazy: LazyWeight | Scaled) -> LazyWeight:
    """The weight in a lazy value."""
    return lazy.weight if isinstance(lazy, Scaled) else lazy


def is_lazy(value: Any) -> bool:
    """Whether a value is a lazy weight."""
    return isinstance(value, LazyTracer)
