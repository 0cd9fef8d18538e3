"""Many adapters in arrays of one shape, of which each example of a batch has its own."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax._numerics import Slots, is_traced
from peft_jax._spec import LoraSpec
from peft_jax._trees import check_adapter_name, merge_params
from peft_jax.adapters._bank_entries import (
    Leaves,
    Specs,
    at_bank,
    bank_path,
    checked_adapter,
    entry_of,
    fitting,
    leaves_of,
    nested,
)
from peft_jax.adapters._bank_rule import BIASED, DECOMPOSED, SCALING
from peft_jax.adapters._selection import Selection

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterBank:
    """Adapters of different ranks, targets and variants in arrays of one shape.

    Made by `stack_adapters`. The arrays are in ``params``, which is a pytree and is what trains;
    the bank itself lives outside of ``jax.jit``.

    Attributes:
      params: for each layer ``lora.bank/{a, b}``, with ``magnitude`` and ``bias`` where an adapter
        has one: the adapters' arrays along an axis of slots (in front of the layer's own axes),
        padded with zeros to the largest rank. Padding gets no gradient.
      names: of the adapter in each slot; None where it is free.
      specs: of the adapter in each slot.
      layers: from the path of each layer's bank to how it lies there.
    """

    params: Any
    names: tuple[str | None, ...]
    specs: tuple[Specs, ...]
    layers: Mapping[str, Slots]

    @property
    def capacity(self) -> int:
        """How many adapters there is room for."""
        return len(self.names)

    @property
    def axes(self) -> Any:
        """For each array of ``params`` its axis of slots: ``in_axes`` for ``jax.vmap``."""
        return nested(
            {
                path: {leaf: layer.slot_axis(array.ndim) for leaf, array in self._at(path).items()}
                for path, layer in self.layers.items()
            }
        )

    def __repr__(self) -> str:
        used = [name for name in self.names if name is not None]
        rank = max(layer.spec.rank for layer in self.layers.values())
        shown = ", ".join(used[:6]) + (", ..." if len(used) > 6 else "")
        return (
            f"AdapterBank({len(used)} of {self.capacity} slots: {shown}; {len(self.layers)} "
            f"layers, rank {rank})"
        )

    def slot(self, name: str) -> int:
        """Where the adapter of a name lies.

        Raises:
          ValueError: where there is none, with close names.
        """
        if name is None or name not in self.names:
            known = [other for other in self.names if other is not None]
            close = difflib.get_close_matches(str(name), known, 3)
            raise ValueError(
                f"The bank holds no adapter named {name!r}. Close names: {close or known[:10]}."
            )
        return self.names.index(name)

    def select(self, adapters: Iterable[str | None] | Array, *, group_size: int = 1) -> Selection:
        """Chooses an adapter for each example of a batch.

        Args:
          adapters: names, None for the plain base; or slots ``(examples,)``, integers, -1 for the
            plain base. Slots may be traced; where they are concrete they are checked, and a slot
            that holds no adapter otherwise makes its examples NaN.
          group_size: how many examples in a row each entry is for: of a batch of
            ``len(adapters) * group_size`` examples.

        Raises:
          ValueError: on an unknown name, or a slot without an adapter.
        """
        if isinstance(adapters, str) or not isinstance(adapters, Iterable):
            raise ValueError(f"select takes a name for each example, got one: {adapters!r}.")
        if not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f"select: group_size is a positive integer, got {group_size!r}.")
        layers = tuple(self.layers.items())
        return Selection(self._slots(adapters), self._traits, group_size, layers)

    @functools.cached_property
    def _traits(self) -> dict[str, dict[str, Array]]:
        """What is known of the adapters and not trained: by layer, an entry for each slot."""
        by_slot = [at_bank(specs) for specs in self.specs]
        traits = {}
        for path in self.layers:
            found = [specs.get(path) for specs in by_slot]
            scaling = [
                np.nan if name is None else 0.0 if spec is None else spec.scaling
                for name, spec in zip(self.names, found, strict=True)
            ]
            traits[path] = {
                SCALING: np.asarray(scaling, np.float32),
                DECOMPOSED: np.asarray([s is not None and s.variant == "dora" for s in found]),
                BIASED: np.asarray([s is not None and s.bias is not None for s in found]),
            }
        with jax.ensure_compile_time_eval():  # kept, wherever the first choice is made
            return jax.tree.map(jnp.asarray, traits)

    def each(self, group_size: int = 1) -> Selection:
        """Chooses every adapter once, in the order of their slots, for ``group_size`` examples.

        Raises:
          ValueError: where a slot is free.
        """
        free = [slot for slot, name in enumerate(self.names) if name is None]
        if free:
            raise ValueError(
                f"AdapterBank.each: the slots {free[:10]} hold no adapter. Stack the adapters with "
                "a capacity of their number."
            )
        chosen = self.select(np.arange(self.capacity), group_size=group_size)
        return chosen.replace(is_each=True)

    def _slots(self, adapters: Any) -> Array:
        if not hasattr(adapters, "dtype"):
            given = list(adapters)
            if all(name is None or isinstance(name, str) for name in given):
                slots = [-1 if name is None else self.slot(name) for name in given]
                return jnp.asarray(slots, jnp.int32)
            adapters = np.asarray(given)
        if np.ndim(adapters) != 1 or not jnp.issubdtype(adapters.dtype, jnp.integer):
            raise ValueError(
                "select takes names, or integers with one axis, got an array of shape "
                f"{np.shape(adapters)} and dtype {adapters.dtype}."
            )
        if not is_traced(adapters):
            filled = {slot for slot, name in enumerate(self.names) if name is not None}
            empty = sorted({int(slot) for slot in np.asarray(adapters)} - filled - {-1})
            if empty:
                raise ValueError(
                    f"The bank's slots {empty[:10]} hold no adapter; filled are {sorted(filled)}, "
                    "and -1 stands for the plain base."
                )
        limits = jnp.iinfo(adapters.dtype)  # of a wider type, numbers would wrap around
        lowest, highest = max(limits.min, -2), min(limits.max, self.capacity)
        return jnp.clip(jnp.asarray(adapters), lowest, highest).astype(jnp.int32)

    def merge(self, base: Any) -> Any:
        """The parameters for `MultiAdapterModel`: the base's, with the bank beside its layers."""
        return merge_params(base, self.params)

    def with_params(self, params: Any) -> AdapterBank:
        """The bank with other arrays, such as trained ones.

        Raises:
          ValueError: where their structure or shapes differ.
        """
        own, given = (jax.tree_util.tree_flatten_with_path(tree) for tree in (self.params, params))
        shapes, others = ({str(p): jnp.shape(v) for p, v in tree[0]} for tree in (own, given))
        if shapes != others:
            differing = sorted(set(shapes.items()) ^ set(others.items()))
            raise ValueError(
                f"AdapterBank.with_params takes arrays like its own; these differ: {differing[:4]}."
            )
        return dataclasses.replace(self, params=params)

    def adapter(self, name: str) -> tuple[dict[str, Any], dict[str, LoraSpec]]:
        """One adapter and its specs, by the arrays that are there now, in the bank's dtypes."""
        slot = self.slot(name)
        found: dict[str, Leaves] = {}
        for path, spec in self.specs[slot].items():
            layer, arrays = self.layers[bank_path(path)], self._at(bank_path(path))
            found[path] = {
                leaf: layer.taken(leaf, arrays[leaf], slot, spec.rank) for leaf in leaves_of(spec)
            }
        return nested(found), dict(self.specs[slot])

    def with_adapter(self, name: str, lora: Any, specs: Specs) -> AdapterBank:
        """The bank with one more adapter, in a free slot, or in place of the one of this name.

        The arrays keep their shapes and dtypes, to which the adapter's are rounded: no program
        that takes them is traced anew. What was selected before is of the bank as it was: select
        anew.

        Raises:
          ValueError: where no slot is free, or the adapter has a layer, a rank, a magnitude or a
            bias that the bank has no room for. `stack_adapters` makes room: ``capacity``,
            ``rank``, and ``room_for``, the specs of adapters to come.
        """
        check_adapter_name("AdapterBank.with_adapter", name)
        entries = checked_adapter(name, lora, specs)
        slot, new = self._slot_for(name), {}
        for path, (spec, _) in entries.items():
            room = self.layers.get(path)
            missing = [] if room is None else sorted({*leaves_of(spec)} - {*self._at(path)})
            if room is None or missing or spec.rank > room.spec.rank:
                held = f"rank {room.spec.rank}, lacking {missing}" if room else "none"
                raise ValueError(
                    f"The bank has no room for {name!r} at '{path}' (rank {spec.rank}, "
                    f"{leaves_of(spec)}): there is {held}. Stack the adapters anew, with "
                    "rank= and room_for= the specs of adapters to come."
                )
        for path, layer in self.layers.items():
            spec, leaves = entries.get(path, (layer.spec, {}))
            fitting(name, path, layer, spec)
            new[path] = {
                leaf: layer.replaced(array, slot, entry_of(name, path, layer, leaf, leaves))
                for leaf, array in self._at(path).items()
            }
        return self._with(slot, name, dict(specs), nested(new))

    def without(self, name: str) -> AdapterBank:
        """The bank without an adapter, whose slot is free then.

        What was selected of it before, and is used with the new arrays, gives NaN.
        """
        slot, new = self.slot(name), {}
        for path, layer in self.layers.items():
            leaves = self._at(path)
            gone = jnp.full(layer.shape("b"), jnp.nan)
            new[path] = leaves | {"b": layer.replaced(leaves["b"], slot, gone)}
        return self._with(slot, None, {}, nested(new))

    def _with(self, slot: int, name: str | None, specs: Specs, params: Any) -> AdapterBank:
        names = (*self.names[:slot], name, *self.names[slot + 1 :])
        all_specs = (*self.specs[:slot], specs, *self.specs[slot + 1 :])
        return dataclasses.replace(self, params=params, names=names, specs=all_specs)

    def _slot_for(self, name: str) -> int:
        if name in self.names:
            return self.names.index(name)
        if None not in self.names:
            raise ValueError(
                f"The bank has no free slot for {name!r} (capacity {self.capacity}). Take one out "
                "(`AdapterBank.without`), or stack anew with a larger capacity=."
            )
        return self.names.index(None)

    def _at(self, path: str) -> Leaves:
        tree = self.params
        for part in path.split("/"):
            tree = tree[part]
        return dict(tree)
