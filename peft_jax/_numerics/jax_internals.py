"""What this package knows of JAX beyond its documentation: primitives and traced programs.

JAX exports all of this (`jax.extend`, `jax.interpreters`, `jax.core`) and may change it in any
release. Each fact stands here once, with why it is needed; tests/numerics/test_jax_internals.py
fails when it no longer holds.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax
from jax.extend.core import (
    JaxprEqn,
    Literal,
    Primitive,
    jaxpr_as_fun,
    jaxprs_in_params,
    set_current_trace,
    take_current_trace,
)
from jax.extend.core.primitives import (
    call_p,
    closed_call_p,
    cond_p,
    custom_jvp_call_p,
    custom_vjp_call_p,
    jit_p,
    remat_p,
    scan_p,
    while_p,
)
from jax.extend.linear_util import WrappedFun, wrap_init
from jax.interpreters import ad, batching, mlir

__all__ = [
    "CALLS",
    "Equation",
    "Primitive",
    "Program",
    "ShapedArray",
    "Trace",
    "Tracer",
    "branches_of",
    "called",
    "cond_p",
    "consts_of",
    "current_trace",
    "define_bilinear",
    "define_derivative",
    "is_literal",
    "is_recomputed",
    "is_subfunction",
    "is_traced",
    "is_unknown",
    "is_zero",
    "jit_context",
    "jit_p",
    "new_primitive",
    "programs_in",
    "read",
    "remat_p",
    "run_checkpointed",
    "run_equation",
    "run_inside",
    "run_program",
    "scan_body",
    "scan_p",
    "scan_split",
    "set_current_trace",
    "set_jit_context",
    "takes_a_slice",
    "while_p",
    "while_programs",
    "while_split",
]

Array = jax.Array
ShapedArray = jax.core.ShapedArray
Trace = jax.core.Trace
Tracer = jax.core.Tracer

# --- Tracing -------------------------------------------------------------------------------------


def is_traced(x: Any) -> bool:
    """Whether a value is one of a program that is being traced: its numbers are not known."""
    return isinstance(x, jax.core.Tracer)


def current_trace() -> Trace:
    """The trace that operations are bound in: that of the innermost transformation."""
    with take_current_trace() as trace:
        return trace


def is_subfunction(value: Any) -> bool:
    """Whether a value is a function that JAX hands to a trace, to be run inside an operation."""
    return isinstance(value, WrappedFun | types.FunctionType | functools.partial)


def run_inside(function: Any, around: Callable[..., Any]) -> Any:
    """Such a function, run as ``around(run, *args)``; its results are in lists or flat trees."""
    if not isinstance(function, WrappedFun):
        return functools.partial(around, function)
    run = functools.partial(around, function.call_wrapped)
    return wrap_init(run, debug_info=function.debug_info)


def jit_context(default: Hashable) -> Any:
    """A value, one per thread, by which jax.jit keys its caches besides its arguments.

    A function traced under one value is another program under another. ``.value`` is the value.
    """
    return jax.make_user_context(default_value=default)


def set_jit_context(context: Any, value: Hashable) -> None:
    """Sets the value of a `jit_context` until it is set again.

    JAX's context manager puts the old value back when it is left; it is never left here.
    """
    context(value).__enter__()


def takes_a_slice(primitive: Primitive) -> bool:
    """Whether a primitive is one of those by which a loop's body takes a row: ``stack[index]``.

    For policies of jax.checkpoint, which are ``policy(primitive, *types, **params) -> bool``.
    """
    return primitive.name in ("dynamic_slice", "squeeze")


# --- New primitives ------------------------------------------------------------------------------


def new_primitive(
    name: str,
    run: Callable[..., Array],
    *,
    output_type: Callable[..., ShapedArray],
    batch: Callable[..., tuple[Array, int | None]],
    lowered: Callable[..., Array],
    on_cpu: Callable[..., Array] | None = None,
) -> Primitive:
    """A primitive of one result. `define_derivative` or `define_bilinear` gives it derivatives.

    A primitive has a lowering per platform, and derivatives that keep what its author chooses:
    reverse mode through `jax.lax.platform_dependent` keeps the residuals of every branch.

    Args:
      name: shown in traced programs.
      run: what it computes outside of jit, ``run(*operands, **params)``.
      output_type: from the types of the operands to that of the result.
      batch: ``batch(operands, axes, **params) -> (result, axis)``, its rule for jax.vmap.
      lowered: what it computes in compiled programs, in JAX operations.
      on_cpu: the same for CPU, if that differs.
    """
    primitive = Primitive(name)
    primitive.def_impl(run)
    primitive.def_abstract_eval(output_type)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(lowered, multiple_results=False))
    if on_cpu is not None:
        rule = mlir.lower_fun(on_cpu, multiple_results=False)
        mlir.register_lowering(primitive, rule, platform="cpu")
    return primitive


def define_derivative(
    primitive: Primitive, jvp: Callable[..., Any], transpose: Callable[..., Any]
) -> None:
    """Gives a primitive derivatives.

    Args:
      primitive: of `new_primitive`.
      jvp: ``jvp(primals, tangents, **params) -> (result, tangent)``; see `is_zero`.
      transpose: ``transpose(cotangent, *operands, **params)``, a cotangent or None for each
        operand; see `is_unknown`.
    """
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose


def define_bilinear(
    primitive: Primitive, of_left: Callable[..., Array], of_right: Callable[..., Array]
) -> None:
    """Gives a primitive that is linear in each of its two operands its derivatives.

    Args:
      primitive: of `new_primitive`.
      of_left: ``of_left(cotangent, left, right, **params)``, the cotangent of the left operand.
      of_right: the same for the right operand.
    """
    ad.defbilinear(primitive, of_left, of_right)


def is_zero(tangent: Any) -> bool:
    """Whether a tangent or cotangent is zero by its structure: JAX makes no array for it."""
    return isinstance(tangent, ad.Zero)


def is_unknown(operand: Any) -> bool:
    """Whether a transpose rule is asked for the cotangent of this operand, which has no value.

    Such an operand has its type in ``.aval``.
    """
    return ad.is_undefined_primal(operand)


# --- Traced programs -----------------------------------------------------------------------------

Equation: TypeAlias = JaxprEqn


class Program(Protocol):
    """A traced program.

    An open one takes its constants from outside, a closed one carries them. From jax 0.12 on both
    are one class, so nothing may depend on which of the two a program is.
    """

    @property
    def constvars(self) -> Sequence[Any]: ...
    @property
    def invars(self) -> Sequence[Any]: ...
    @property
    def outvars(self) -> Sequence[Any]: ...
    @property
    def eqns(self) -> Sequence[JaxprEqn]: ...


def consts_of(program: Program) -> Sequence[Any]:
    """The values of ``program.constvars``; none for an open program, which JAX gives none here."""
    return getattr(program, "consts", ())


def is_literal(atom: Any) -> bool:
    """Whether an operand is a number in the text of the program."""
    return isinstance(atom, Literal)


def read(atom: Any, known: Mapping[Any, Any]) -> Any:
    """The value of an operand: a literal has it in itself, a variable among the known ones."""
    return atom.val if is_literal(atom) else known[atom]


def run_program(program: Program, args: Sequence[Any]) -> list[Any]:
    """The results of a closed program."""
    closed: Any = program
    return jaxpr_as_fun(closed)(*args)


def run_checkpointed(program: Program, args: Sequence[Any]) -> list[Any]:
    """The results of the program of a ``remat`` operation, an open one until jax 0.12."""
    jaxpr: Any = program
    return jax.core.eval_jaxpr(jaxpr, consts_of(program), *args)


def run_equation(equation: Equation, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation, computed in the context that it was traced in.

    That context holds the mesh, ``jax.default_matmul_precision`` and the like.
    """
    primitive = equation.primitive
    with equation.ctx.manager:
        results = primitive.bind(*operands, **primitive.get_bind_params(equation.params))
    return list(results) if primitive.multiple_results else [results]


def programs_in(equation: Equation) -> Iterator[Program]:
    """The programs among an equation's parameters, whatever these are called."""
    return jaxprs_in_params(equation.params)


_CALLED = {
    jit_p: "jaxpr",
    remat_p: "jaxpr",
    call_p: "call_jaxpr",
    closed_call_p: "call_jaxpr",
    custom_jvp_call_p: "call_jaxpr",
    custom_vjp_call_p: "call_jaxpr",
}
CALLS = frozenset(_CALLED)  # primitives that do nothing but run a program; see `called`


def called(equation: Equation) -> Program:
    """The program that an equation of one of the `CALLS` runs on its operands."""
    return equation.params[_CALLED[equation.primitive]]


def is_recomputed(equation: Equation) -> bool:
    """Whether an equation is what jax.checkpoint computes once more for a backward pass."""
    return equation.primitive is remat_p and equation.params["differentiated"]


def scan_split(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried; the rest is scanned."""
    if "ft_in" in params:  # from jax 0.11 on: a flat tree of (constants, carry, scanned)
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def scan_body(params: Mapping[str, Any]) -> tuple[Program, dict[str, Any]]:
    """The body of a scan, and what else `jax.lax.scan` takes: length, reverse, unroll."""
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    return params["jaxpr"], options


def while_split(equation: Equation) -> tuple[int, int]:
    """How many operands of a while loop only the condition reads, and then only the body."""
    return equation.params["cond_nconsts"], equation.params["body_nconsts"]


def while_programs(equation: Equation) -> tuple[Program, Program]:
    """The condition and the body of a while loop."""
    return equation.params["cond_jaxpr"], equation.params["body_jaxpr"]


def branches_of(equation: Equation) -> tuple[Sequence[Program], Sequence[Any] | None]:
    """The branches of a cond, and the platforms of each where the platform chooses.

    `jax.lax.platform_dependent` is a cond whose index is the platform; the branch for all other
    platforms has None for its platforms.
    """
    return equation.params["branches"], equation.params.get("branches_platforms")
