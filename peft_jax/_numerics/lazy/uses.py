"""What a function does with its weights, found by one abstract run with probes in their place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax

from peft_jax._numerics.lazy.flow import DOTS, Flow, flow_of
from peft_jax._numerics.lazy.frames import Use, frame
from peft_jax._numerics.lazy.products import BATCH, CONTRACTED, LOOKUPS, PRODUCED

__all__ = [
    "Usage",
    "uses_of",
]


@dataclasses.dataclass(frozen=True)
class Usage:
    """How a function uses one parameter.

    Attributes:
      shape: of the parameter.
      roles: for each axis ``batch``, ``contracted`` or ``produced``, as in the product that decides
        how the parameter factors; None if no product takes it apart.
      operation: JAX's name of that product, or of the operation that needs the dense weight.
      dense: the operations that need the dense weight, in order.
      is_lookup: whether the product is a lookup of rows.
      is_multiplied: whether a matrix product contracts it, or an array that is made of it alone,
        with values that depend on the inputs.
      is_last: whether no product with another parameter follows, and the result is an output.
    """

    shape: tuple[int, ...]
    roles: tuple[str, ...] | None
    operation: str
    dense: tuple[str, ...] = ()
    is_lookup: bool = False
    is_multiplied: bool = False
    is_last: bool = False

    def axes(self, role: str) -> tuple[int, ...]:
        """The axes with a role."""
        return tuple(i for i, own in enumerate(self.roles or ()) if own == role)

    @property
    def is_weight(self) -> bool:
        """Whether it has two axes or more and is more than a bias: not added alone."""
        return len(self.shape) >= 2 and (
            self.roles is not None or set(self.dense) - ADDITIONS != set()
        )

    @property
    def width(self) -> int:
        """How many outputs its matrix product has: of a table, rows, if it is multiplied too."""
        role = CONTRACTED if self.is_lookup else PRODUCED
        return math.prod(self.shape[axis] for axis in self.axes(role))


ADDITIONS = {"add", "add_any", "sub"}
MATRIX_PRODUCTS = DOTS | {"reduce_sum"}


def uses_of(run: Callable[..., Any], given: Any, inputs: Any) -> dict[Hashable, Usage]:
    """How ``run(frame, given, inputs)`` uses the weights that it makes lazy in the frame.

    Args:
      run: a function; its result holds what it returns, plain.
      given: a tree of abstract or concrete arrays that are no inputs: parameters, states, keys.
      inputs: a tree of those that are.
    """
    record: list[Use] = []

    def traced(given: Any, inputs: Any) -> Any:
        with frame(record) as opened:
            return opened.plain(run(opened, given, inputs))

    program = jax.make_jaxpr(traced)(given, inputs)
    is_input = [False] * len(jax.tree.leaves(given)) + [True] * len(jax.tree.leaves(inputs))
    flow = flow_of(program, is_input)
    found: dict[Hashable, list[tuple[int, Use]]] = {}
    for number, use in enumerate(record):
        found.setdefault(use.source, []).append((number, use))
    return {source: _usage(uses, flow) for source, uses in found.items()}


def _usage(uses: list[tuple[int, Use]], flow: Flow) -> Usage:
    shape = uses[0][1].shape
    dense = tuple(dict.fromkeys(use.operation for _, use in uses if use.roles is None))
    products = [
        (number, use, roles)
        for number, use in uses
        if use.roles is not None and (roles := _stored_roles(use.roles)) is not None
    ]
    multiplied = [
        number
        for number, use in uses
        if number in flow.of_inputs and (use.roles is None or use.operation in MATRIX_PRODUCTS)
    ]
    own = {number for number, _ in uses}
    followed = {number for number, by in flow.followed if by not in own}
    is_last = bool(multiplied) and set(multiplied) <= flow.last - followed
    if not products:
        operation = dense[0] if dense else "unused"
        return Usage(shape, None, operation, dense, False, bool(multiplied), is_last)

    def preferred(product: tuple[int, Use, Any]) -> tuple[bool, bool, bool]:
        number, use, _ = product
        mixed = any(len(roles) > 1 for roles in use.roles or ())
        # A table factors as a table, whatever else is done with it; and products with activations
        # come before those with a state, as in a power iteration.
        return use.operation not in LOOKUPS, number not in flow.of_inputs, mixed

    _, use, roles = min(products, key=preferred)
    return Usage(
        shape,
        roles,
        use.operation,
        dense,
        use.operation in LOOKUPS,
        bool(multiplied),
        is_last,
    )


def _stored_roles(roles: tuple[frozenset[str], ...]) -> tuple[str, ...] | None:
    """One role for each stored axis; None if a part is contracted and another one produced."""
    found = []
    for axis in roles:
        if {CONTRACTED, PRODUCED} <= axis:
            return None
        # An axis of which each use takes one index is like a batch axis.
        found.append(next((r for r in (CONTRACTED, PRODUCED) if r in axis), BATCH))
    return tuple(found)
