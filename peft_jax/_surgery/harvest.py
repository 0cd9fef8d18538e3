"""Values noted inside a running function, folded into a state, whatever loops they lie in.

`note` is a primitive that changes nothing; `folded` traces a function and runs its equations again,
with a state that each note updates. Loops and branches that hold notes are built anew with the
state beside their values; everything else runs as it was traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics import (
    CALLS,
    Equation,
    Primitive,
    Program,
    branches_of,
    called,
    cond_p,
    consts_of,
    define_derivative,
    is_recomputed,
    new_primitive,
    programs_in,
    read,
    run_equation,
    run_program,
    scan_body,
    scan_p,
    scan_split,
    while_p,
    while_programs,
    while_split,
)

__all__ = [
    "folded",
    "note",
]


Array = jax.Array
State = dict[str, Any]  # for each site, a tree of arrays
Fold = Callable[[str, Any, Array, Array], Any]  # site, its state, index, x -> its new state
Ran = tuple[list[Any], State]  # results and state after an equation, or several


# --- The primitive -------------------------------------------------------------------------------


def note(x: Array, index: Any, site: str) -> Array:
    """``x``; `folded` sees it here.

    Its derivative is the identity. Use the result: a note whose result leads nowhere may be dropped
    by transformations, as any dead code is.

    Args:
      x: an array of any shape and dtype.
      index: an integer, which layer of a stack this is; it may be traced, batched, or scanned over.
      site: the name of the place in the model, one for all layers of a stack.

    Raises:
      ValueError: where the index is not one integer.
    """
    index = jnp.asarray(index)
    if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"The index of a note is one integer, got {index.dtype}{list(index.shape)} at "
            f"{site!r}. Give the number of the layer in its stack, 0 where there is no stack."
        )
    return _note_p.bind(jnp.asarray(x), index.astype(jnp.int32), site=site, lead=0)


def _differentiate(
    primals: tuple[Array, Array], tangents: tuple[Any, Any], **params: Any
) -> tuple[Array, Any]:
    return _note_p.bind(*primals, **params), tangents[0]


def _batch(
    operands: tuple[Array, Array], axes: tuple[int | None, int | None], *, site: str, lead: int
) -> tuple[Array, int | None]:
    (x, index), (x_axis, index_axis) = operands, axes
    if index_axis is None:
        assert x_axis is not None  # JAX batches an equation for the sake of one operand at least
        return _note_p.bind(jnp.moveaxis(x, x_axis, lead), index, site=site, lead=lead), lead
    index = jnp.moveaxis(index, index_axis, 0)
    if x_axis is not None:
        return _note_p.bind(jnp.moveaxis(x, x_axis, 0), index, site=site, lead=lead + 1), 0
    # All layers see the same x, and what follows need not be computed for each.
    x = jax.lax.broadcast(x, index.shape[:1])
    return _note_p.bind(x, index, site=site, lead=lead + 1)[0], None


def _transpose(cotangent: Any, x: Any, index: Array, *, site: str, lead: int) -> tuple[Any, None]:
    return cotangent, None


def _same(x: Any, index: Any, *, site: str, lead: int) -> Any:
    return x


# Parameters: the site, and `lead`, how many leading axes of x the index has (and no others).
_note_p = new_primitive("note", _same, output_type=_same, batch=_batch, lowered=_same)
define_derivative(_note_p, _differentiate, _transpose)


# --- Folding -------------------------------------------------------------------------------------


def folded(function: Callable[..., Any], fold: Fold) -> Callable[..., tuple[Any, State]]:
    """``function`` with a state that each `note` in it updates.

    The state goes through the notes in program order: ``state[site] = fold(site, state[site],
    index, x)``. A loop folds in each iteration, a branch where it is taken. What jax.vmap has run
    is folded as it ran: noted arrays with the new axis before all others, once, or, where the index
    is batched too, one by one; and of a batched condition both branches, of a batched while loop
    the iterations of the longest. Of gradients taken inside the function, the forward pass is
    folded, and not what jax.checkpoint computes again.

    Run it under jax.jit: without, loops that hold notes are compiled anew in each call.

    Args:
      function: from trees of arrays to a tree of arrays.
      fold: from a site, its state, an int32 scalar and the array noted to the new state, of the
        same structure, shapes and dtypes.

    Returns:
      ``run(state, *args) -> (function(*args), state)``. The state is a mapping from sites to trees
      of arrays; a site that is not in it is left alone.

    Raises:
      ValueError: when run, where ``fold`` changes the form of a state, and on notes in the
        condition of a while loop and inside transformations whose values cannot be followed, such
        as jax.shard_map.
    """

    def run(state: Mapping[str, Any], *args: Any) -> tuple[Any, State]:
        # A new function each time: JAX would hold on to what an equal one did in another context.
        program, shapes = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
        start = {site: jax.tree.map(jnp.asarray, tree) for site, tree in state.items()}
        results, end = _run(program, jax.tree.leaves(args), start, fold)
        return jax.tree.unflatten(jax.tree.structure(shapes), results), end

    return run


def _run(program: Program, args: Sequence[Any], state: State, fold: Fold) -> Ran:
    """A program's results, and the state after it."""
    variables = [*program.constvars, *program.invars]
    known = dict(zip(variables, [*consts_of(program), *args], strict=True))
    for equation in program.eqns:
        operands = [read(atom, known) for atom in equation.invars]
        inside = {site: state[site] for site in sorted(_sites(equation)) if site in state}
        if inside:
            rule = _RULES.get(equation.primitive, _refuse)
            results, inside = rule(equation, operands, inside, fold)
            state = {**state, **inside}
        else:
            results = run_equation(equation, operands)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom, known) for atom in program.outvars], state


def _sites(equation: Equation) -> set[str]:
    if equation.primitive is _note_p:
        return {equation.params["site"]}
    if is_recomputed(equation):
        return set()  # the forward pass was seen
    return set().union(*map(_sites_in, programs_in(equation)))


def _sites_in(program: Program) -> set[str]:
    return set().union(*map(_sites, program.eqns))


# --- What becomes of an equation that holds notes ------------------------------------------------


def _fold_note(equation: Equation, operands: Sequence[Any], state: State, fold: Fold) -> Ran:
    (x, index), site = operands, equation.params["site"]
    step = functools.partial(_step, fold, site)
    for _ in range(equation.params["lead"]):
        step = functools.partial(_one_by_one, step)
    return [x], {site: step(state[site], index, x)}


def _step(fold: Fold, site: str, old: Any, index: Array, x: Array) -> Any:
    new = jax.tree.map(jnp.asarray, fold(site, old, index, x))
    before, after = _form(old), _form(new)
    if before != after:
        raise ValueError(
            f"The fold made {after} of the state of {site!r}, which was {before}. Keep the "
            "structure, the shapes and the dtypes."
        )
    return new


def _one_by_one(
    step: Callable[[Any, Array, Array], Any], state: Any, index: Array, x: Array
) -> Any:
    return jax.lax.scan(lambda state, row: (step(state, *row), None), state, (index, x))[0]


def _form(state: Any) -> tuple[list[str], Any]:
    leaves, structure = jax.tree.flatten(state)
    return [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves], structure


def _inline(equation: Equation, operands: Sequence[Any], state: State, fold: Fold) -> Ran:
    """A call of a program: the result is that of running it here.

    What a call says of its compilation (layouts, donated buffers, what to compute again) is left.
    """
    return _run(called(equation), operands, state, fold)


def _scan(equation: Equation, operands: Sequence[Any], state: State, fold: Fold) -> Ran:
    first, carried = scan_split(equation.params)
    end = first + carried
    program, options = scan_body(equation.params)

    def body(carry: tuple[Any, State], row: Sequence[Any]) -> tuple[tuple[Any, State], Any]:
        values, state = carry
        results, state = _run(program, [*operands[:first], *values, *row], state, fold)
        return (results[:carried], state), results[carried:]

    (carry, state), stacked = jax.lax.scan(
        body, (list(operands[first:end]), state), list(operands[end:]), **options
    )
    return [*carry, *stacked], state


def _while(equation: Equation, operands: Sequence[Any], state: State, fold: Fold) -> Ran:
    condition, program = while_programs(equation)
    if refused := _sites_in(condition) & state.keys():
        raise ValueError(
            f"The condition of a while loop notes {sorted(refused)}, and a condition has no "
            "state to give back. Compute it in the body, or leave these layers out of the "
            "simulation: give them a rule with no quantizer."
        )
    first, of_body = while_split(equation)
    end = first + of_body

    def goes_on(carry: tuple[Any, State]) -> Any:
        return run_program(condition, [*operands[:first], *carry[0]])[0]

    def body(carry: tuple[Any, State]) -> Ran:
        values, state = carry
        return _run(program, [*operands[first:end], *values], state, fold)

    return jax.lax.while_loop(goes_on, body, (list(operands[end:]), state))


def _branches(equation: Equation, operands: Sequence[Any], state: State, fold: Fold) -> Ran:
    def branch(program: Program) -> Callable[[State, Sequence[Any]], Ran]:
        return lambda state, args: _run(program, args, state, fold)

    programs, platforms = branches_of(equation)
    branches = [branch(program) for program in programs]
    index, *args = operands
    if platforms is None:
        return jax.lax.switch(index, branches, state, args)
    named = {
        name: branch
        for names, branch in zip(platforms, branches, strict=True)
        for name in names or ("default",)
    }
    return jax.lax.platform_dependent(state, args, **named)


def _refuse(equation: Equation, operands: Sequence[Any], state: State, fold: Fold) -> Ran:
    raise ValueError(
        f"{equation.primitive.name} holds notes of {sorted(state)}, and values inside of it cannot "
        "be followed. Leave these layers out of the simulation: give them a rule with no quantizer."
    )


_Rule = Callable[[Equation, Sequence[Any], State, Fold], Ran]
_RULES: Mapping[Primitive, _Rule] = {
    **dict.fromkeys(CALLS, _inline),
    _note_p: _fold_note,
    scan_p: _scan,
    while_p: _while,
    cond_p: _branches,
}
