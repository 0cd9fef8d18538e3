"""Many adapters in one tree, of which each example of a batch has its own: `stack_adapters`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import unflatten_dict

from peft_jax._names import BANK, check_adapter_name
from peft_jax._params import check_specs, merge_params
from peft_jax._specs import LoraSpec
from peft_jax._stacked import adapter_shapes, stack_back, stack_first
from peft_jax._trees import children, is_branch
from peft_jax.adapters._selection import Selection
from peft_jax.adapters._slots import Slots

Array = jax.Array
Specs = Mapping[str, LoraSpec]
Leaves = dict[str, Any]
Entries = dict[str, tuple[LoraSpec, Leaves]]


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
        if isinstance(adapters, str):
            raise ValueError(f"select takes a name for each example, got one: {adapters!r}.")
        if not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f"select: group_size is a positive integer, got {group_size!r}.")
        slots = self._slots(adapters)
        filled = jnp.asarray([name is not None for name in self.names])
        scaling, decomposed = {}, {}
        for path in self.layers:
            found = [_at_bank(specs).get(path) for specs in self.specs]
            values = jnp.asarray([0.0 if s is None else s.scaling for s in found], jnp.float32)
            scaling[path] = jnp.where(filled, values, jnp.nan)
            decomposed[path] = jnp.asarray([s is not None and s.variant == "dora" for s in found])
        return Selection(slots, scaling, decomposed, group_size, tuple(self.layers.items()))

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
        if not isinstance(adapters, jax.core.Tracer):
            filled = {slot for slot, name in enumerate(self.names) if name is not None}
            empty = sorted({int(slot) for slot in np.asarray(adapters)} - filled - {-1})
            if empty:
                raise ValueError(
                    f"The bank's slots {empty[:10]} hold no adapter; filled are {sorted(filled)}, "
                    "and -1 stands for the plain base."
                )
        return jnp.asarray(adapters, jnp.int32)

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
        """One adapter and its specs, as they were stacked, with the arrays that are there now."""
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

        The arrays keep their shapes: no program that takes them is traced anew.

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
        """The bank without an adapter, whose slot is free then."""
        return self._with(self.slot(name), None, {}, self.params)

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


def stack_adapters(
    adapters: Mapping[str, Any] | Sequence[Any],
    *,
    specs: Any,
    capacity: int | None = None,
    rank: int | None = None,
    room_for: Specs | None = None,
    dtype: Any = None,
) -> AdapterBank:
    """Adapters of one base model in one bank, of which each example of a batch chooses one.

    ``y_i = x_i·W + scaling_n * x_i·a_n·b_n`` with ``n`` the adapter of example ``i``: in one
    program, whose products do not grow with the number of adapters.

    Example::

      bank = peft.stack_adapters({"french": french, "german": german}, specs=specs, capacity=16)
      model = peft.MultiAdapterModel(wrapped=base_model)
      params = bank.merge(base)
      y = model.apply({"params": params}, x, adapters=bank.select(["german", None, "french"]))

    Args:
      adapters: from names to trees of adapters (as `split_params` gives them); a list has the
        names ``"0"``, ``"1"``, ....
      specs: of each adapter, under its name (or in a list); or those of all of them.
      capacity: number of slots; default: as many as there are adapters.
      rank: the largest rank that there is to be room for; default: that of the adapters.
      room_for: specs of layers, variants and ranks that later adapters may have, besides these.
      dtype: of the bank's arrays; default: the adapters' own, promoted for each array.

    Raises:
      ValueError: where a tree does not fit its specs, adapters are of different models, or one has
        what is no product: trained token rows, or parameters trained in place.
    """
    trees, all_specs = _named(adapters, specs)
    capacity = len(trees) if capacity is None else capacity
    if not isinstance(capacity, int) or capacity < max(len(trees), 1):
        raise ValueError(
            "stack_adapters: capacity is an integer of at least 1 and the number of adapters "
            f"({len(trees)}), got {capacity!r}."
        )
    entries = {name: checked_adapter(name, tree, all_specs[name]) for name, tree in trees.items()}
    layers, leaves = _layers(entries, rank, room_for)
    params: dict[str, Leaves] = {}
    for path, layer in layers.items():
        own = [entries[name].get(path, (layer.spec, {}))[1] for name in trees]
        params[path] = {}
        for leaf in leaves[path]:
            kinds = [meta.unbox(given[leaf]).dtype for given in own if leaf in given]
            kind = dtype or (jnp.result_type(*kinds) if kinds else jnp.float32)
            pairs = zip(trees, own, strict=True)
            rows = [entry_of(name, path, layer, leaf, given) for name, given in pairs]
            rows += [jnp.zeros(layer.shape(leaf), kind)] * (capacity - len(trees))
            params[path][leaf] = layer.stacked([row.astype(kind) for row in rows])
    free = capacity - len(trees)
    return AdapterBank(
        params=nested(params),
        names=(*trees, *(None,) * free),
        specs=(*(dict(all_specs[name]) for name in trees), *({},) * free),
        layers=layers,
    )


def _named(adapters: Any, specs: Any) -> tuple[dict[str, Any], dict[str, Specs]]:
    """Trees and specs by name."""
    if isinstance(adapters, Mapping):
        trees = dict(adapters)
    elif isinstance(adapters, list | tuple):
        trees = {str(i): tree for i, tree in enumerate(adapters)}
    else:
        raise ValueError(
            "stack_adapters takes a dict from names to trees of adapters, or a list of trees, got "
            f"{type(adapters).__name__}."
        )
    for name in trees:
        check_adapter_name("stack_adapters", name)
    if isinstance(specs, list | tuple) and len(specs) == len(trees):
        return trees, dict(zip(trees, specs, strict=True))
    if isinstance(specs, Mapping) and all(isinstance(s, LoraSpec) for s in specs.values()):
        return trees, dict.fromkeys(trees, specs)
    if isinstance(specs, Mapping) and set(specs) == set(trees):
        return trees, dict(specs)
    raise ValueError(
        f"stack_adapters: specs are those of all adapters, or a dict with the specs of each of "
        f"{list(trees)[:10]}, got {specs!r:.200}."
    )


def _layers(
    entries: Mapping[str, Entries], rank: int | None, room_for: Specs | None
) -> tuple[dict[str, Slots], dict[str, list[str]]]:
    """How each layer lies in the bank, and which arrays it has."""
    layers: dict[str, Slots] = {}
    leaves: dict[str, set[str]] = {}
    wanted = [("room_for", path, spec, _shapes(spec)) for path, spec in _reserved(room_for)]
    for name, layer_entries in entries.items():
        wanted += [(name, path, spec, found) for path, (spec, found) in layer_entries.items()]
    for name, path, spec, found in wanted:
        layer = layers.setdefault(path, Slots.of(spec, found["a"], found["b"]))
        fitting(name, path, layer, spec)
        most = max(layer.spec.rank, spec.rank, rank or 1)
        layers[path] = dataclasses.replace(
            layer, spec=dataclasses.replace(layer.spec, rank=most, alpha=None)
        )
        leaves.setdefault(path, set()).update(leaves_of(spec))
    if not layers:
        raise ValueError("stack_adapters: there are no adapters, and no room_for= any.")
    if rank is not None and any(layer.spec.rank > rank for layer in layers.values()):
        most = max(layer.spec.rank for layer in layers.values())
        raise ValueError(f"stack_adapters: rank={rank}, but there is an adapter of rank {most}.")
    return layers, {path: sorted(names) for path, names in leaves.items()}


def _reserved(room_for: Specs | None) -> list[tuple[str, LoraSpec]]:
    specs = {} if room_for is None else room_for
    unknown = [path for path, spec in specs.items() if spec.shape is None]
    if unknown:
        raise ValueError(
            f"stack_adapters: room_for takes specs that know shapes, as `lora_specs` gives them; "
            f"unknown at {unknown[:5]}."
        )
    return list(_at_bank(specs).items())


def _shapes(spec: LoraSpec) -> Leaves:
    """Arrays of the shapes that an adapter of this spec has, not made."""
    assert spec.shape is not None

    def arrays() -> tuple[Array, Array]:
        first = stack_first(jnp.zeros(spec.shape), spec.stack_axes)
        a, b = (jnp.zeros(shape) for shape in adapter_shapes(spec, first.shape))
        return stack_back(a, spec.stack_axes), stack_back(b, spec.stack_axes)

    return dict(zip("ab", jax.eval_shape(arrays), strict=True))


# --- One adapter, as a bank takes it -------------------------------------------------------------


def bank_path(path: str) -> str:
    """Where the bank of a layer lies: at ``.../lora.bank`` for an adapter at ``.../lora``."""
    parent, slash, name = path.rpartition("/")
    return f"{parent}{slash}{name.partition('.')[0]}.{BANK}"


def _at_bank(specs: Specs) -> dict[str, LoraSpec]:
    return {bank_path(path): spec for path, spec in specs.items()}


def leaves_of(spec: LoraSpec) -> list[str]:
    """Names of the arrays of an adapter."""
    magnitude, bias = spec.variant == "dora", spec.bias is not None
    return ["a", "b"] + ["magnitude"] * magnitude + ["bias"] * bias


def checked_adapter(name: str, lora: Any, specs: Specs) -> Entries:
    """An adapter's specs and arrays, by the path of each layer's bank."""
    check_specs(lora, specs, f"The adapter {name!r}")
    found: Entries = {}
    for path, spec in specs.items():
        if spec.variant == "tokens" or spec.param is None:
            what = (
                "trained token rows" if spec.variant == "tokens" else "an adapter that stands alone"
            )
            raise ValueError(
                f"The adapter {name!r} has {what} at '{path}'; a bank holds products a·b beside "
                "layers. Serve it by a model of its own."
            )
        branch = lora
        for part in path.split("/"):
            branch = branch[part]
        if set(branch) != set(leaves_of(spec)):
            raise ValueError(
                f"The adapter {name!r} holds {sorted(branch)} at '{path}', where its spec speaks "
                f"of {leaves_of(spec)}. Give the specs of this adapter."
            )
        if bank_path(path) in found:
            raise ValueError(
                f"The adapter {name!r} holds two adapters of one weight at '{path}' and beside it. "
                "Stack each as an adapter of its own."
            )
        found[bank_path(path)] = (spec, dict(branch))
    paths = set(specs)
    others = ["/".join(p) for p in _leaf_paths(lora) if "/".join(p[:-1]) not in paths]
    if others:
        raise ValueError(
            f"The adapter {name!r} trained whole parameters ({others[:5]}), of which a model has "
            "one for all examples. Leave them out, or serve it by a model of its own."
        )
    return found


def _leaf_paths(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not is_branch(tree):
        return [path]
    return [
        found for key, value in children(tree) for found in _leaf_paths(value, (*path, str(key)))
    ]


def fitting(name: str, path: str, layer: Slots, spec: LoraSpec) -> None:
    """Refuses an adapter of another layer than the bank's."""
    own, other = ((s.param, parse_pattern(s), s.stack_axes, s.shape) for s in (layer.spec, spec))
    if own[:3] != other[:3] or (own[3] and other[3] and own[3] != other[3]):
        raise ValueError(
            f"The adapter {name!r} is of another model: at '{path}' it adapts {other}, and those "
            f"before it {own} (parameter, equation, stack axes, shape)."
        )


def parse_pattern(spec: LoraSpec) -> tuple[int, ...]:
    """An equation and its outputs, up to the choice of letters."""
    text = f"{spec.equation};{spec.output_letters}"
    return tuple(text.index(letter) for letter in text)


def entry_of(name: str, path: str, layer: Slots, leaf: str, leaves: Leaves) -> Array:
    """One adapter's array in its slot; zeros where the adapter has none."""
    if leaf not in leaves:
        return jnp.zeros(layer.shape(leaf))
    try:
        return layer.put(leaf, leaves[leaf])
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"The adapter {name!r} has {error} at '{path}', where the bank has {layer.shape(leaf)}: "
            "it is of another model, or of another rank than its spec says."
        ) from error


def nested(leaves: Mapping[str, Leaves]) -> dict[str, Any]:
    """A tree of the arrays at these paths."""
    return unflatten_dict(
        {(*p.split("/"), leaf): v for p, own in leaves.items() for leaf, v in own.items()}
    )
