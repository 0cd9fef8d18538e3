"""The key by which `jax.jit` tells programs apart that were traced under other rules."""

from __future__ import annotations

from collections.abc import Hashable

from peft_jax._numerics import jit_context, set_jit_context

# jax.jit keys its caches by this value: a function traced under other rules is another program.
JIT_KEY = jit_context(None)


def set_jit_key(key: Hashable) -> None:
    # Set, not left again: `with` statements held by generators may end in any order, and the key
    # is always that of the state that holds.
    set_jit_context(JIT_KEY, key)
