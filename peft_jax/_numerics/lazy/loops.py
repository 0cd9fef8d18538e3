"""Loops and checkpoints around lazy weights, rebuilt with a frame in their bodies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics.jax_internals import run_checkpointed, run_program, scan_body, scan_split
from peft_jax._numerics.lazy.dense import without_windows
from peft_jax._numerics.lazy.tracer import is_lazy, weight_of
from peft_jax._numerics.lazy.weight import Factor, LazyWeight, Part, Scaled, has_dropout, with_keys

Nested = Callable[[], contextlib.AbstractContextManager[Any]]


def rebuilt_scan(nested: Nested, args: Sequence[Any], params: Any) -> list[Any] | None:
    """A ``lax.scan`` that closes over lazy weights or scans over them; ``nested`` opens frames.

    Of a weight that is scanned over, the first axis is stacked: factors that have it are scanned,
    the others stay outside. A weight in the carry becomes dense.
    """
    consts_end, carried = scan_split(params)
    carry_end = consts_end + carried
    consts, carry, xs = args[:consts_end], args[consts_end:carry_end], args[carry_end:]
    scanned_lazily = [x for x in xs if is_lazy(x)]
    if any(map(is_lazy, carry)) or any(isinstance(x.lazy, Scaled) for x in scanned_lazily):
        return None
    program, options = scan_body(params)
    stacks = [x.lazy if is_lazy(x) else x for x in xs]
    rows = [_scanned(x) if isinstance(x, LazyWeight) else x for x in stacks]
    steps = jnp.arange(options["length"]) if _draws(consts, xs) else None

    def body(carry: Any, given: Any) -> Any:
        row, step = given
        with nested() as inner:
            here = [inner.lazy(_stepped(x.lazy, step)) if is_lazy(x) else x for x in consts]
            for whole, part in zip(stacks, row, strict=True):
                is_stack = isinstance(whole, LazyWeight)
                here.append(inner.lazy(_stepped(_row(whole, part), step)) if is_stack else part)
            ordered = [*here[: len(consts)], *carry, *here[len(consts) :]]
            results = inner.plain(run_program(program, ordered), "scan")
        return results[:carried], results[carried:]

    last, stacked = jax.lax.scan(body, list(carry), (rows, steps), **options)
    return [*last, *stacked]


def _draws(*groups: Sequence[Any]) -> bool:
    return any(has_dropout(weight_of(x.lazy)) for group in groups for x in group if is_lazy(x))


def _stepped(lazy: Any, step: Any) -> Any:
    """A weight whose dropout draws other masks in each step of a loop."""
    if step is None:
        return lazy
    if isinstance(lazy, Scaled):
        return Scaled(_stepped(lazy.weight, step), lazy.other)
    return with_keys(lazy, lambda key, _: jax.random.fold_in(key, step))


def _scanned(weight: LazyWeight) -> list[Any]:
    """The arrays of a stack that have its first axis, base first."""
    weight = without_windows(weight, (0,))
    return [weight.base, *(f.value for f in _factors(weight) if 0 in f.axes)]


def _factors(weight: LazyWeight) -> list[Factor]:
    factors = [f for part in weight.parts for term in part.terms for f in term.factors]
    return factors if weight.gain is None else [*factors, weight.gain]


def _row(stack: LazyWeight, arrays: Sequence[Any]) -> LazyWeight:
    """One layer of a stack, from one row of what `_scanned` gives."""
    stack = without_windows(stack, (0,))
    given = iter(arrays)
    base = next(given)

    def row(factor: Factor) -> Factor:
        value = next(given) if 0 in factor.axes else factor.value
        return Factor(value, tuple(axis - 1 for axis in factor.axes if axis))

    parts = []
    for part in stack.parts:
        terms = [new for term in part.terms if (new := term.map(row)) is not None]
        parts.append(Part(part.source, part.shape, part.origin[1:], part.window[1:], tuple(terms)))
    gain = None if stack.gain is None else row(stack.gain)
    return LazyWeight(base, tuple(parts), gain)


def rebuilt_checkpoint(nested: Nested, args: Sequence[Any], params: Any) -> list[Any]:
    """A ``jax.checkpoint`` that is given lazy weights: their arrays go in, in their place."""
    given = [x.lazy if is_lazy(x) else x for x in args]
    lazy = [is_lazy(x) for x in args]

    def run(*given: Any) -> Any:
        with nested() as inner:
            here = [
                inner.lazy(x) if was_lazy else x for x, was_lazy in zip(given, lazy, strict=True)
            ]
            return inner.plain(run_checkpointed(params["jaxpr"], here), "checkpoint")

    checkpointed = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return list(checkpointed(*given))
