"""Where values of a program come from: which products they pass, and whether from its inputs.

An abstract run marks the operand and the result of every product with a lazy weight (`mark`), and
every dense weight that is formed (`mark_dense`). Facts about each use then follow from the program
alone: whether the weight meets what depends on the inputs in a product, and which later products
use the result. Loops are followed until nothing changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from peft_jax._numerics.jax_internals import (
    CALLS,
    Equation,
    Primitive,
    Program,
    branches_of,
    called,
    cond_p,
    define_derivative,
    is_literal,
    new_primitive,
    programs_in,
    scan_body,
    scan_p,
    scan_split,
    while_p,
    while_programs,
    while_split,
)

Array = jax.Array
DOTS = frozenset({"dot_general", "ragged_dot", "ragged_dot_general"})  # matrix products of JAX


# --- Marks ---------------------------------------------------------------------------------------


def mark(value: Any, operand: Any, use: int) -> Any:
    """``value``, the result of the product ``use`` with this operand."""
    return _mark_p.bind(value, operand, use=use)


def _same(value: Any, operand: Any, *, use: int) -> Any:
    return value


def _batch(operands: Any, axes: Any, *, use: int) -> Any:
    value, operand = operands
    if axes[0] is None:  # only what it was multiplied with is batched
        return _mark_p.bind(value, operand, use=use), None
    return _mark_p.bind(value, operand, use=use), axes[0]


def _differentiate(primals: Any, tangents: Any, *, use: int) -> Any:
    return _mark_p.bind(*primals, use=use), tangents[0]


def _transpose(cotangent: Any, value: Any, operand: Any, *, use: int) -> Any:
    return cotangent, None


_mark_p = new_primitive("weight_use", _same, output_type=_same, batch=_batch, lowered=_same)
define_derivative(_mark_p, _differentiate, _transpose)


def mark_dense(value: Any, use: int) -> Any:
    """``value``, a dense weight that the use asked for."""
    return _mark_dense_p.bind(value, use=use)


def _itself(value: Any, *, use: int) -> Any:
    return value


def _batch_itself(operands: Any, axes: Any, *, use: int) -> Any:
    return _mark_dense_p.bind(*operands, use=use), axes[0]


def _differentiate_itself(primals: Any, tangents: Any, *, use: int) -> Any:
    return _mark_dense_p.bind(*primals, use=use), tangents[0]


def _transpose_itself(cotangent: Any, value: Any, *, use: int) -> Any:
    return [cotangent]


_mark_dense_p: Primitive = new_primitive(
    "dense_weight", _itself, output_type=_itself, batch=_batch_itself, lowered=_itself
)
define_derivative(_mark_dense_p, _differentiate_itself, _transpose_itself)


# --- Flow ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Attributes:
      is_input: whether it depends on an input of the program.
      products: the last products on the ways that lead to it.
      weights: the dense weights that it is made of, if it depends on no input.
    """

    is_input: bool = False
    products: frozenset[int] = frozenset()
    weights: frozenset[int] = frozenset()

    def __or__(self, other: Origin) -> Origin:
        is_input = self.is_input or other.is_input
        weights = frozenset() if is_input else self.weights | other.weights
        return Origin(is_input, self.products | other.products, weights)


@dataclasses.dataclass
class Flow:
    """What a program does with the products in it.

    Attributes:
      of_inputs: uses that multiply the weight with what depends on an input.
      followed: pairs of a product, and one whose operand its result reaches.
      last: products whose result reaches an output of the program.
    """

    of_inputs: set[int] = dataclasses.field(default_factory=set)
    followed: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    last: set[int] = dataclasses.field(default_factory=set)


NOTHING = Origin()


def flow_of(program: Program, inputs: Sequence[bool]) -> Flow:
    """Follows the values of a program, given which of its arguments are inputs."""
    flow = Flow()
    outputs = _run(program, [Origin(is_input) for is_input in inputs], flow)
    flow.last = set().union(*(origin.products for origin in outputs))
    return flow


def _run(program: Program, args: Sequence[Origin], flow: Flow) -> list[Origin]:
    known = dict.fromkeys(program.constvars, NOTHING)
    known.update(zip(program.invars, args, strict=True))

    def origin(atom: Any) -> Origin:
        return NOTHING if is_literal(atom) else known[atom]

    for equation in program.eqns:
        is_product = equation.primitive.name in DOTS
        rule = _RULES.get(equation.primitive, _product if is_product else _any)
        results = rule(equation, [origin(atom) for atom in equation.invars], flow)
        known.update(zip(equation.outvars, results, strict=True))
    return [origin(atom) for atom in program.outvars]


def _union(origins: Sequence[Origin]) -> Origin:
    total = NOTHING
    for origin in origins:
        total |= origin
    return total


def _any(equation: Equation, args: Sequence[Origin], flow: Flow) -> list[Origin]:
    """All results depend on all operands.

    A program inside that takes as many is taken for one that is run on them, such as that of
    shard_map.
    """
    everything = _union(args)
    results = [everything] * len(equation.outvars)
    for program in programs_in(equation):
        fits = len(program.invars) == len(args)
        found = _run(program, args if fits else [everything] * len(program.invars), flow)
        if fits and len(found) == len(results):
            results = found
    return results


def _product(equation: Equation, args: Sequence[Origin], flow: Flow) -> list[Origin]:
    """A product of arrays, one of which may be made of dense weights."""
    left, right = args[:2]
    for weight, other in ((left, right), (right, left)):
        if weight.weights and other.is_input:
            flow.of_inputs |= weight.weights
            flow.followed |= {(p, use) for p in other.products for use in weight.weights}
            return [Origin(True, weight.weights)] * len(equation.outvars)
    return [_union(args)] * len(equation.outvars)


def _mark_dense(equation: Equation, args: Sequence[Origin], flow: Flow) -> list[Origin]:
    return [Origin(weights=frozenset([equation.params["use"]]))]


def _mark(equation: Equation, args: Sequence[Origin], flow: Flow) -> list[Origin]:
    value, operand = args
    use = equation.params["use"]
    if operand.is_input:
        flow.of_inputs.add(use)
    flow.followed |= {(product, use) for product in operand.products}
    return [Origin(value.is_input or operand.is_input, frozenset([use]))]


def _call(equation: Equation, args: Sequence[Origin], flow: Flow) -> list[Origin]:
    return _run(called(equation), args, flow)


def _scan(equation: Equation, args: Sequence[Origin], flow: Flow) -> list[Origin]:
    consts, carried = scan_split(equation.params)
    program, _ = scan_body(equation.params)
    end = consts + carried

    def body(carry: Sequence[Origin]) -> list[Origin]:
        return _run(program, [*args[:consts], *carry, *args[end:]], flow)

    return _repeated(body, args[consts:end])


def _repeated(
    body: Callable[[Sequence[Origin]], list[Origin]], carry: Sequence[Origin]
) -> list[Origin]:
    """Runs the body of a loop until what it carries comes from nowhere new."""
    while True:
        results = body(carry)
        more = [a | b for a, b in zip(carry, results, strict=False)]
        if more == list(carry):
            return [*more, *results[len(more) :]]
        carry = more


def _while(equation: Equation, args: Sequence[Origin], flow: Flow) -> list[Origin]:
    condition, program = while_programs(equation)
    first, of_body = while_split(equation)
    end = first + of_body

    def body(carry: Sequence[Origin]) -> list[Origin]:
        _run(condition, [*args[:first], *carry], flow)
        return _run(program, [*args[first:end], *carry], flow)

    return _repeated(body, args[end:])


def _branches(equation: Equation, args: Sequence[Origin], flow: Flow) -> list[Origin]:
    programs, _ = branches_of(equation)
    found = [_run(program, args[1:], flow) for program in programs]
    return [_union(origins) for origins in zip(*found, strict=True)]


_RULES: Mapping[Primitive, Callable[..., list[Origin]]] = {
    **dict.fromkeys(CALLS, _call),
    _mark_p: _mark,
    _mark_dense_p: _mark_dense,
    scan_p: _scan,
    while_p: _while,
    cond_p: _branches,
}
