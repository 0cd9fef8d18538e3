"""What each operation of JAX makes of lazy operands: a row for each.

A row is a function of (frame, operands, bind, params): ``bind`` runs the operation on arrays. It
returns a view (`LazyWeight`, `Scaled`, or a list of them), a `Product`, or None if the operation
needs dense weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peft_jax._numerics.lazy.convolutions import conv_general_dilated, ragged_dot
from peft_jax._numerics.lazy.joins import added, complex_, concatenate, stack
from peft_jax._numerics.lazy.products import dot_general, gather, summed
from peft_jax._numerics.lazy.views import (
    broadcast_in_dim,
    carried,
    convert_element_type,
    divided,
    dynamic_slice,
    neg,
    reshape,
    rev,
    slice_,
    split,
    squeeze,
    tile,
    times,
    transpose,
)
from peft_jax._numerics.lazy.weight import LazyWeight, Scaled


def _view(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation whose first operand is lazy and whose others, if any, are not."""

    def run(frame: Any, operands: Sequence[Any], bind: Any, params: Any) -> Any:
        weight, *others = operands
        if not isinstance(weight, LazyWeight) or others:
            return None
        return function(weight, bind, **params)

    return run


def _dynamic_slice(frame: Any, operands: Sequence[Any], bind: Any, params: Any) -> Any:
    weight, *starts = operands
    if not isinstance(weight, LazyWeight):
        return None
    return dynamic_slice(weight, starts, bind, **params)


def _pair(operands: Sequence[Any]) -> tuple[LazyWeight, Any, bool] | None:
    """Of two operands the weight, the other one, and whether the weight is the first."""
    left, right = operands
    if isinstance(left, LazyWeight) and not isinstance(right, LazyWeight | Scaled):
        return left, right, True
    if isinstance(right, LazyWeight) and not isinstance(left, LazyWeight | Scaled):
        return right, left, False
    return None


def _times(frame: Any, operands: Sequence[Any], bind: Any, params: Any) -> Any:
    if (pair := _pair(operands)) is None:
        return None
    weight, other, first = pair
    return times(
        weight,
        other,
        lambda base: bind(base, other) if first else bind(other, base),
        frame.spread(other),
    )


def _divided(frame: Any, operands: Sequence[Any], bind: Any, params: Any) -> Any:
    pair = _pair(operands)
    if pair is None or not pair[2]:
        return None
    weight, other, _ = pair
    return divided(weight, other, lambda base: bind(base, other), frame.spread(other))


def _added(frame: Any, operands: Sequence[Any], bind: Any, params: Any) -> Any:
    left, right = operands
    return added(left, right, bind)


def _subtracted(frame: Any, operands: Sequence[Any], bind: Any, params: Any) -> Any:
    left, right = operands
    return added(left, right, bind, subtract=True)


def _complex(frame: Any, operands: Sequence[Any], bind: Any, params: Any) -> Any:
    if any(isinstance(operand, Scaled) for operand in operands):
        return None
    left, right = operands
    return complex_(left, right, bind)


def _joined(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation on any number of weights and arrays."""

    def run(frame: Any, operands: Sequence[Any], bind: Any, params: Any) -> Any:
        if any(isinstance(operand, Scaled) for operand in operands):
            return None
        return function(operands, bind, **params)

    return run


def _dot_general(frame: Any, operands: Sequence[Any], bind: Any, params: Any) -> Any:
    if (pair := _pair(operands)) is None:
        return None
    weight, x, first = pair
    return dot_general(
        weight,
        x,
        lambda x, base: bind(base, x) if first else bind(x, base),
        weight_first=first,
        **params,
    )


def _summed(frame: Any, operands: Sequence[Any], bind: Any, params: Any) -> Any:
    (operand,) = operands
    return summed(operand, bind, **params) if isinstance(operand, Scaled) else None


def _conv(frame: Any, operands: Sequence[Any], bind: Any, params: Any) -> Any:
    x, weight = operands
    if not isinstance(weight, LazyWeight) or isinstance(x, LazyWeight | Scaled):
        return None
    return conv_general_dilated(weight, x, bind, **params)


def _gather(frame: Any, operands: Sequence[Any], bind: Any, params: Any) -> Any:
    weight, indices = operands
    if not isinstance(weight, LazyWeight) or isinstance(indices, LazyWeight | Scaled):
        return None
    return gather(weight, indices, bind, **params)


def _ragged(frame: Any, operands: Sequence[Any], bind: Any, params: Any) -> Any:
    x, weight, sizes = operands
    if not isinstance(weight, LazyWeight) or isinstance(x, LazyWeight | Scaled):
        return None
    return ragged_dot(weight, x, sizes, bind, **params)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "transpose": _view(transpose),
    "squeeze": _view(squeeze),
    "broadcast_in_dim": _view(broadcast_in_dim),
    "reshape": _view(reshape),
    "rev": _view(rev),
    "tile": _view(tile),
    "slice": _view(slice_),
    "dynamic_slice": _dynamic_slice,
    "convert_element_type": _view(convert_element_type),
    "neg": _view(neg),
    "mul": _times,
    "div": _divided,
    "add": _added,
    "add_any": _added,
    "sub": _subtracted,
    "complex": _complex,
    "concatenate": _joined(concatenate),
    "stack": _joined(stack),
    "split": _view(split),
    "dot_general": _dot_general,
    "reduce_sum": _summed,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "ragged_dot": _ragged,
    "ragged_dot_general": _ragged,
    **dict.fromkeys(
        (
            "copy",
            "copy_p",
            "optimization_barrier",
            "pvary",
            "reduce_precision",
            "sharding_constraint",
        ),
        _view(carried),
    ),
}
