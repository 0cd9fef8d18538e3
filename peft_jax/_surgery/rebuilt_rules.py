"""Tells users whose rules make `jax.jit` trace anew in each step."""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any

import jax

from peft_jax._numerics import is_traced
from peft_jax._surgery.rules import Call

_ALLOWED = 3


@dataclasses.dataclass
class _Seen:
    """Functions made by one piece of code that were traced with one model and inputs."""

    alive: weakref.WeakSet[Callable[..., Any]] = dataclasses.field(default_factory=weakref.WeakSet)
    number: int = 0


_SEEN: weakref.WeakKeyDictionary[CodeType, dict[Any, _Seen]] = weakref.WeakKeyDictionary()


def warn_of_rebuilt_rule(rule: Callable[..., Any], call: Call) -> None:
    """Warns when the same code has made a fourth function that the same call is traced with.

    Counted are calls of a model under jit (or another transform), by the model's class and the
    shapes of its inputs. Rules that compare by value never get here twice.
    """
    function = rule
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    inputs = jax.tree.leaves((call.args, dict(call.kwargs)))
    traced = [*inputs, *jax.tree.leaves(call.module.variables)]
    if code is None or not any(is_traced(leaf) for leaf in traced):
        return
    shapes = tuple(getattr(leaf, "shape", None) for leaf in inputs)
    seen = _SEEN.setdefault(code, {}).setdefault((type(call.module), call.method, shapes), _Seen())
    if rule in seen.alive:
        return
    seen.alive.add(rule)
    seen.number += 1
    if seen.number == _ALLOWED + 1:
        warnings.warn(
            f"{type(call.module).__name__} was traced under {seen.number} different rules made by "
            f"the same code ({code.co_qualname}, line {code.co_firstlineno}): jax.jit compares "
            "rules by ==, and each function object is a rule, and a program, of its own. Build the "
            "rule once, or make it a frozen dataclass with a `__call__`.",
            UserWarning,
            stacklevel=2,
        )
