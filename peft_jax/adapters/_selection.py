"""Which adapter of a bank each example of a batch has: `Selection`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from peft_jax._numerics import Slots
from peft_jax.adapters._bank_rule import GROUP, SCALING, SLOTS

Array = jax.Array


class Selection(struct.PyTreeNode):
    """Which adapter each example has, and what of the adapters is not trained; a pytree.

    Made by `AdapterBank.select`. It passes through ``jax.jit`` as an argument, and no value in it,
    name or scaling, belongs to the program. It is of the bank as it was: select anew when adapters
    come and go.

    Attributes:
      slots: ``(examples / group_size,)`` int32; -1: the plain base.
      traits: for each layer of the bank, arrays ``(slots,)``: ``scaling`` in float32, and as
        booleans which adapters have a magnitude (``decomposed``) and a bias (``biased``).
      group_size: how many examples in a row share an entry of ``slots``.
      layers: how each layer lies in the bank.
      is_each: whether ``slots`` are all of the bank's, in order.
    """

    slots: Array
    traits: dict[str, dict[str, Array]]
    group_size: int = struct.field(pytree_node=False)
    layers: tuple[tuple[str, Slots], ...] = struct.field(pytree_node=False)
    is_each: bool = struct.field(pytree_node=False, default=False)

    def insert(self, params: Any) -> Any:
        """The parameters of a model and a bank, with the choice beside each layer of the bank.

        They are for one call of the model; `MultiAdapterModel.apply` makes them.

        Raises:
          ValueError: where the parameters lack a layer of the bank.
        """
        for path, layer in self.layers:
            values = {GROUP: jnp.zeros(self.group_size, jnp.int8), **self.traits[path]}
            if not self.is_each:
                values[SLOTS] = self.slots
            chosen = {name: layer.everywhere(value) for name, value in values.items()}
            params = _beside(params, path.split("/"), chosen, path)
            a = jnp.shape(_at(params, path)["a"])
            there, known = a[layer.slot_axis(len(a))], self.traits[path][SCALING].shape[0]
            if there != known:
                raise ValueError(
                    f"The bank at '{path}' has {there} slots, but adapters were chosen of a bank "
                    f"of {known}. Select from the bank whose arrays are among the parameters."
                )
        return params


def _at(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def _beside(tree: Any, parts: list[str], chosen: Mapping[str, Array], path: str) -> Any:
    if not isinstance(tree, Mapping) or (parts and parts[0] not in tree):
        raise ValueError(
            f"The parameters hold no bank at '{path}', for which adapters were chosen. Add it to "
            "the base's by `peft.merge_params(base, bank.params)`."
        )
    if not parts:
        return {**tree, **chosen}
    return {**tree, parts[0]: _beside(tree[parts[0]], parts[1:], chosen, path)}
