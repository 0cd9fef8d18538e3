"""Training all adapters of a bank in one step, each with its own loss and optimizer state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from peft_jax.adapters._selection import Selection

Array = jax.Array


def per_adapter(
    optimizer: optax.GradientTransformation, axes: Any
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that treats each adapter of a bank by itself.

    What an optimizer computes over a whole tree (a norm to clip by, a count of steps) it computes
    for each adapter. The state has an axis of adapters in front of every array. The zeros by which
    a smaller rank is padded count where an optimizer takes means over an array (Adafactor, Muon,
    ``clip_by_block_rms``), and it must not change what has no gradient (as ``add_noise`` does): for
    such optimizers stack adapters of one rank.

    Example::

      optimizer = peft.per_adapter(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
                                   bank.axes)
      state = optimizer.init(bank.params)

    Args:
      optimizer: for one adapter.
      axes: `AdapterBank.axes`.
    """
    single = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Any:
        return jax.vmap(single.init, in_axes=(axes,))(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        def one(updates: Any, state: Any, params: Any) -> Any:
            return single.update(updates, state, params, **extra)

        placed = None if params is None else axes
        return jax.vmap(one, (axes, 0, placed), (axes, 0))(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def adapter_value_and_grad(
    losses: Callable[..., Array], axes: Any, *, at_once: int | None = None
) -> Callable[..., tuple[Array, Any]]:
    """A function that gives the loss of each adapter of a bank, and each loss's own gradient.

    Example::

      def losses(params, chosen, batch):  # of the adapters that are computed at once
          variables = {"params": peft.merge_params(base, params)}
          x = batch.reshape(-1, *batch.shape[2:])  # adapters' batches in a row
          y = model.apply(variables, x, adapters=chosen)
          return jnp.mean(jnp.square(y).reshape(len(batch), -1), axis=1)

      gradients_of = peft.adapter_value_and_grad(losses, bank.axes, at_once=2)
      values, gradients = gradients_of(bank.params, bank.each(group_size=examples), batches)

    Adapters that are computed at once share the base's products, which pays where each has few
    tokens; the others wait their turn inside one program, which takes less memory.

    Args:
      losses: of ``(params, selection, *batches)``, a loss for each adapter: ``(adapters,)``. The
        loss of one adapter must not depend on another's.
      axes: `AdapterBank.axes`.
      at_once: how many adapters are computed at once; None: all.

    Returns:
      A function of ``(params, selection, *batches)``: the bank's arrays, `AdapterBank.each`, and
      trees with an axis of adapters in front. It returns the losses ``(adapters,)`` and a tree like
      ``params``.

    Raises:
      ValueError: where the selection is not that of each adapter, batches do not number the
        adapters, or ``losses`` gives another shape.
    """
    if at_once is not None and (not isinstance(at_once, int) or at_once < 1):
        raise ValueError(f"adapter_value_and_grad: at_once is a positive integer, got {at_once!r}.")

    def all_of(params: Any, selection: Selection, batches: Any) -> tuple[Array, Any]:
        def total(params: Any) -> tuple[Array, Array]:
            values = losses(params, selection, *batches)
            number = selection.slots.shape
            is_array = isinstance(values, jax.Array) and jnp.issubdtype(values.dtype, jnp.floating)
            if not is_array or values.shape != number:
                raise ValueError(
                    f"adapter_value_and_grad: losses gives one number for each adapter, "
                    f"floats of shape {number}, and nothing else; got {values!r:.200}."
                )
            return jnp.sum(values), values

        gradients, values = jax.grad(total, has_aux=True)(params)
        return values, gradients

    def value_and_grad(params: Any, selection: Selection, *batches: Any) -> tuple[Array, Any]:
        if not isinstance(selection, Selection) or not selection.is_each:
            raise ValueError("adapter_value_and_grad takes the selection bank.each(group_size).")
        number = selection.slots.shape[0]
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
        if lengths - {(number,)}:
            raise ValueError(
                f"adapter_value_and_grad: batches have an axis of {number} adapters in front, got "
                f"lengths {sorted(lengths)}."
            )
        count = number if at_once is None else min(at_once, number)
        if count == number:
            return all_of(params, selection, batches)
        first = jax.tree.map(lambda leaf, axis: jnp.moveaxis(leaf, axis, 0), params, axes)
        given = (first, selection.traits, batches)

        def some(given: Any) -> tuple[Array, Any]:
            first, traits, batches = given
            params = jax.tree.map(lambda leaf, axis: jnp.moveaxis(leaf, 0, axis), first, axes)
            length = jax.tree.leaves(traits)[0].shape[0]
            slots = jnp.arange(length, dtype=jnp.int32)
            chosen = selection.replace(slots=slots, traits=traits)
            values, gradients = all_of(params, chosen, batches)
            return values, jax.tree.map(lambda g, axis: jnp.moveaxis(g, axis, 0), gradients, axes)

        values, gradients = _in_turns(some, given, number, count)
        return values, jax.tree.map(lambda g, axis: jnp.moveaxis(g, 0, axis), gradients, axes)

    return value_and_grad


def _in_turns(function: Callable[[Any], Any], given: Any, number: int, count: int) -> Any:
    """What a function of some entries along axis 0 gives for all, ``count`` of them at once."""
    whole = number - number % count
    parts = jax.tree.map(lambda x: x[:whole].reshape((-1, count, *x.shape[1:])), given)
    found = jax.lax.map(function, parts)
    found = jax.tree.map(lambda x: x.reshape((whole, *x.shape[2:])), found)
    if whole == number:
        return found
    rest = function(jax.tree.map(lambda x: x[whole:], given))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), found, rest)
