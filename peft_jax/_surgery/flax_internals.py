"""What this package knows of Flax beyond its documentation: scopes, lifts, bound modules.

Each fact stands here once, with why it is needed; tests/surgery/test_flax_internals.py fails when
it no longer holds.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from flax import linen as nn
from flax.core import Scope

__all__ = [
    "Scope",
    "bind_in_place",
    "child_scope",
    "has_returned",
    "inside_lift",
    "is_lifted",
    "is_lifted_function",
    "is_placed_by_context",
    "is_setup_check",
    "lifts_around",
    "method_hook",
    "params_of",
    "patched",
    "rngs_of",
    "root_of",
    "scope_for_init",
    "set_attribute",
]

# --- Scopes --------------------------------------------------------------------------------------


def root_of(scope: Scope) -> Scope:
    """The scope of the ``init`` or ``apply`` that runs, or, inside a lift, that of the lift.

    Roots compare equal where they hold the same variables.
    """
    return scope.root


def has_returned(root: Scope) -> bool:
    """Whether the ``init`` or ``apply`` of a root scope has returned, or failed."""
    return root.invalid


def is_setup_check(scope: Scope) -> bool:
    """Whether Flax only checks a module's ``setup`` here, under a lift, with no variables or keys.

    It does so on a root of a subclass of its own.
    """
    return type(scope.root) is not Scope


def rngs_of(scope: Scope) -> Any:
    """The keys of a scope, as ``init`` and ``apply`` take them."""
    return scope.rngs


def child_scope(scope: Scope, name: str) -> Any:
    """The scope below another, of a name that may be in use: by a call of the same module before.

    A module is put there by ``Module(..., parent=child, name=name)``, as a child of no module;
    Flax takes a scope for a parent, though the types of its arguments do not show it.
    """
    return scope.push(name, reuse=True)


@contextlib.contextmanager
def scope_for_init(like: Scope, rngs: Any) -> Iterator[Scope]:
    """A root scope of the same path in which a copy of a module is initialized; see `params_of`.

    It counts as inside a lift, as its path is that in a model and not its own.
    """
    scope = Scope(
        {},
        rngs=rngs,
        name=like.name,
        mutable=True,
        path=like.path,
        debug_path=(*like.path, "copy"),
        flags={"initializing": True},
    )
    with scope.temporary():
        yield scope


def params_of(scope: Scope) -> Any:
    """The parameters that were made in a mutable scope."""
    return scope.mutable_variables()["params"]


# --- Lifts ---------------------------------------------------------------------------------------
# A lift (nn.scan, nn.remat, ...) runs a module on a root scope of its own. The path of that scope
# for error messages names the lifts: `layers/dense` under nn.scan of nn.remat is
# ("remat(scan(layers))", "dense"). There is no other record of them.


def inside_lift(scope: Scope) -> bool:
    """Whether a module runs inside a lift, on whose root scope the paths begin in mid-model.

    The root of an ``init`` or ``apply`` has no path, not even for error messages.
    """
    return bool(scope.root.debug_path)


def lifts_around(scope: Scope) -> tuple[str, ...]:
    """The lifts that a module runs in, innermost first: ``("remat", "scan")``."""
    return tuple(
        lift
        for part in reversed(scope.debug_path)
        for lift in re.findall(r"(\w+)\(", part[: part.rfind("(") + 1])
    )


def is_lifted(cls: type[nn.Module]) -> bool:
    """Whether a class was made by a lift: ``nn.remat(nn.Dense)`` is a subclass of ``nn.Dense``.

    Flax makes these classes in the file that defines the lifts, whose name they show.
    """
    return cls.__module__ == nn.remat.__module__


def is_lifted_function(cls: type[nn.Module], method: str) -> bool:
    """Whether the method that Flax names to a hook is a function that a lift runs on a module.

    ``nn.remat(function)(module)`` shows as a call of the module's method of the function's name.
    """
    return not hasattr(cls, method)


# --- Bound modules -------------------------------------------------------------------------------


def method_hook(hook: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
    """``nn.intercept_methods``, to be entered and left in any order with others of one function.

    Flax keeps a stack per thread. Leaving takes the last function off, whoever put it there, and
    asserts that it is the one that was put on: so all that may end in another order are the same.
    """
    return nn.intercept_methods(hook)


def is_placed_by_context(module: nn.Module) -> bool:
    """Before ``__post_init__``: whether Flax is to find the parent of a module.

    Otherwise the caller gave a scope, or None for a module that waits for ``init`` or ``apply``.
    """
    return module.parent is not None and not isinstance(module.parent, Scope)


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute of a module, frozen or not.

    A module is a plain object: only ``__setattr__`` refuses changes, and registers children.
    """
    object.__setattr__(module, name, value)


def bind_in_place(module: nn.Module, scope: Scope, name: str) -> None:
    """Binds a module that was made inside another one, and waits for a scope, to this scope.

    ``__post_init__`` binds a module once its parent is there: so Flax binds what modules are given.
    """
    set_attribute(module, "parent", scope)
    set_attribute(module, "name", name)
    module.__post_init__()


@contextlib.contextmanager
def patched(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of a bound module for the length of a call.

    Modules call their own methods by ``self``, so that ``self.param`` is what stands here.
    """
    missing = object()
    before = module.__dict__.get(name, missing)
    set_attribute(module, name, value)
    try:
        yield
    finally:
        if before is missing:
            object.__delattr__(module, name)
        else:
            set_attribute(module, name, before)
