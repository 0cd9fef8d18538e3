"""One layer of `add_weighted_adapter`: from its adapters to one adapter and its spec."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from peft_jax._numerics import (
    MatrixView,
    is_traced,
    matricize,
    named_sharding,
    rank_letter,
    sharded_like,
    stack_first,
    widest,
    without_explicit_axes,
)
from peft_jax._spec import LoraSpec
from peft_jax.adapters._combine_table import (
    COMBINATIONS,
    Combination,
    Settings,
    combined_biases,
    combined_factors,
)

Array = jax.Array
CALLER = "add_weighted_adapter"

# What an adapter of each variant that is refused holds.
_REFUSED = {
    "dora": "is one of DoRA: its change, the weight's new length and direction, is not linear in "
    "a·b. Fuse it by `fuse_params` into a copy of the base, and recover a plain adapter by "
    "`unfuse_params(fused, original=base)`",
    "tokens": "holds rows that stand in place of an embedding's own, not changes that add up. Take "
    "it out of the tree, and fuse one adapter's rows into the base by `fuse_params`",
}


@dataclasses.dataclass(frozen=True)
class Member:
    """One of the adapters that change a weight.

    Attributes:
      source: the position of its tree among those that are combined.
      path: slashed.
      adapter: its leaves, in their boxes.
      spec: of the adapter.
      weight: in the combination.
    """

    source: int
    path: str
    adapter: Mapping[str, Any]
    spec: LoraSpec
    weight: float

    def __str__(self) -> str:
        """How errors name it."""
        return f"adapters[{self.source}], '{self.path}'"

    @functools.cached_property
    def arrays(self) -> dict[str, Array]:
        """The arrays without boxes, where XLA may lay out what is made of them."""
        values = [jnp.asarray(meta.unbox(leaf)) for leaf in self.adapter.values()]
        moved, _ = without_explicit_axes(*values)
        return dict(zip(self.adapter, moved, strict=True))

    @functools.cached_property
    def view(self) -> MatrixView:
        """The change as matrices ``(stack, batch, in, out)``."""
        a, b, kernel = self.spec.letters
        stack_a, sizes = self._lengths("a", a)
        stack_b, others = self._lengths("b", b)
        agree = all(sizes.get(c, n) == n for c, n in others.items()) and stack_a == stack_b
        if not agree or sizes[rank_letter(self.spec)] != self.spec.rank:
            raise self._misfit()
        sizes |= others
        return MatrixView(self.spec, stack_a, tuple(sizes[c] for c in kernel))

    def factors(self, dtype: Any) -> tuple[Array, Array]:
        """``a (stack * batch, in, r)`` and ``b (stack * batch, r, out)``."""
        a, b, kernel = self.spec.letters
        rank = rank_letter(self.spec)

        def matrices(name: str, letters: str) -> Array:
            own = sorted((c for c in letters if c != rank), key=kernel.index)
            batch = tuple(letters.index(c) for c in own if c in a and c in b)
            rest = tuple(letters.index(c) for c in own if not (c in a and c in b))
            ranks = (letters.index(rank),)
            rows, columns = (rest, ranks) if name == "a" else (ranks, rest)
            flat = self._layers(name, len(letters)).astype(dtype)
            found = jax.vmap(lambda one: matricize(one, rows, columns, batch))(flat)
            return found.reshape(-1, *found.shape[-2:])

        return matrices("a", a), matrices("b", b)

    def bias(self, dtype: Any) -> Array:
        """``scaling * bias (stack, size)``."""
        stack, sizes = self._lengths("bias", self.spec.output_letters)
        if stack != self.view.stack or any(self.view.sizes[c] != n for c, n in sizes.items()):
            raise self._misfit()
        flat = self._layers("bias", len(sizes)).astype(dtype) * self.spec.scaling
        return flat.reshape(flat.shape[0], -1)

    def check(self) -> None:
        """Refuses what cannot be combined, or is not what the spec speaks of."""
        if self.spec.variant in _REFUSED:
            raise ValueError(f"{CALLER}: {self} {_REFUSED[self.spec.variant]}.")
        for name, leaf in self.adapter.items():
            if not isinstance(meta.unbox(leaf), jax.Array | np.ndarray):
                raise ValueError(
                    f"{CALLER}: {name} of {self} is {type(meta.unbox(leaf)).__name__}, no array. "
                    "For shapes alone, call it inside `jax.eval_shape`."
                )
        wanted = {"a", "b"} | (set() if self.spec.bias is None else {"bias"})
        floats = all(
            jnp.issubdtype(np.dtype(array.dtype), jnp.floating) for array in self.arrays.values()
        )
        if set(self.adapter) != wanted or not floats:
            held = {name: str(array.dtype) for name, array in self.arrays.items()}
            raise ValueError(
                f"{CALLER}: {self} holds {held}, but its spec (variant {self.spec.variant!r}, bias "
                f"{self.spec.bias!r}) needs floating-point arrays {sorted(wanted)}. Give the specs "
                "of this model (`peft.lora_specs`)."
            )

    def _layers(self, name: str, ndim: int) -> Array:
        """An array with one axis of layers in front of ``ndim`` of its own."""
        array = stack_first(self.arrays[name], self._stack_axes(name, ndim))
        return array.reshape(-1, *array.shape[array.ndim - ndim :])

    def _lengths(self, name: str, letters: str) -> tuple[tuple[int, ...], dict[str, int]]:
        """Lengths of the stack, outermost first, and of the array's own axes by their letters."""
        array = self.arrays[name]
        axes = self._stack_axes(name, len(letters))
        depth = array.ndim - len(letters)
        if depth < 0 or depth != len(axes):
            raise self._misfit()
        shape = stack_first(array, axes).shape
        return shape[:depth], dict(zip(letters, shape[depth:], strict=True))

    def _stack_axes(self, name: str, ndim: int) -> tuple[int, ...]:
        stacked = self.spec.equation.startswith("...") and not self.spec.stack_axes
        return (0,) * (self.arrays[name].ndim - ndim) if stacked else self.spec.stack_axes

    def _misfit(self) -> ValueError:
        shapes = {name: array.shape for name, array in self.arrays.items()}
        return ValueError(
            f"{CALLER}: {self} has the shapes {shapes}, which do not fit its spec: equation "
            f"'{self.spec.equation}', rank {self.spec.rank}, stack axes {self.spec.stack_axes}. "
            "Give the specs of this model (`peft.lora_specs`)."
        )


def check_members(members: Sequence[Member], combination_type: str, settings: Settings) -> int:
    """Judges whether adapters of one weight can be combined.

    Returns:
      The rank of the result.

    Raises:
      ValueError: where they cannot.
    """
    for member in members:
        member.check()
    first = members[0]
    for member in members[1:]:
        if member.source == first.source:
            raise ValueError(
                f"{CALLER}: '{first.path}' and '{member.path}' of adapters[{first.source}] change "
                "one weight. Give each as a tree of its own, with a weight of its own."
            )
        for name, ours, theirs in (
            ("equation", first.spec.equation, member.spec.equation),
            ("stack axes", first.view.stack_axes, member.view.stack_axes),
            (
                "lengths",
                (first.view.stack, first.view.sizes),
                (member.view.stack, member.view.sizes),
            ),
            ("outputs", first.spec.output_letters, member.spec.output_letters),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{CALLER}: {first} and {member} are of different models: the {name} of the "
                    f"weight are {ours} and {theirs}. Combine adapters of one model."
                )
    biases = sorted({member.spec.bias for member in members if member.spec.bias is not None})
    if len(biases) > 1:
        raise ValueError(
            f"{CALLER}: the biases of {' and '.join(map(str, members))} join different "
            f"parameters, {biases}. Combine adapters of one model."
        )
    ranks = [member.view.spec.rank for member in members]
    rank = COMBINATIONS[combination_type].operands.rank(ranks, settings.svd_rank)
    if rank is None:
        svd = "svd" if combination_type == "linear" else f"{combination_type}_svd"
        raise ValueError(
            f"{CALLER}: {combination_type!r} combines a with a and b with b, of one rank; "
            f"{' and '.join(map(str, members))} have the ranks {ranks}. Use {svd!r} or 'cat', "
            "which take adapters of different ranks."
        )
    return rank


def combine_members(
    path: str,
    members: Sequence[Member],
    rank: int,
    row: Combination,
    settings: Settings,
    key: Any,
) -> tuple[dict[str, Any], LoraSpec]:
    """One adapter in place of all that change a weight.

    Args:
      path: slashed, of the result.
      members: as `check_members` finds them right.
      rank: what it returned.
      row: of `COMBINATIONS`.
      settings: of the combination.
      key: for all layers, where something is drawn.

    Returns:
      Its leaves, and its spec.
    """
    first = members[0]
    dtype = widest(*(array.dtype for member in members for array in member.arrays.values()))
    own = jax.random.fold_in(key, zlib.crc32(path.encode())) if row.needs_key else None
    keys = (None, None) if own is None else tuple(jax.random.split(own))
    a, b = combined_factors(
        row,
        settings,
        rank,
        tuple(member.factors(dtype) for member in members),
        jnp.asarray([member.weight for member in members], dtype),
        jnp.asarray([member.spec.scaling for member in members], dtype),
        keys[0],
    )
    matrices = first.view.matrix_shape[:2]
    a, b = first.view.factors(a.reshape(matrices + a.shape[1:]), b.reshape(matrices + b.shape[1:]))
    adapter = {name: _leaf(value, name, members) for name, value in {"a": a, "b": b}.items()}
    biased = [member for member in members if member.spec.bias is not None]
    if biased:
        merged = combined_biases(
            row,
            settings,
            tuple(member.bias(dtype) for member in biased),
            jnp.asarray([member.weight for member in biased], dtype),
            keys[1],
        )
        sizes = tuple(first.view.sizes[c] for c in first.spec.output_letters)
        merged = first.view.restacked(merged.reshape(-1, *sizes))
        adapter["bias"] = _leaf(merged, "bias", biased)
    spec = dataclasses.replace(
        first.spec,
        rank=rank,
        scaling=1.0,
        alpha=float(rank),
        bias=biased[0].spec.bias if biased else None,
    )
    return adapter, spec


def _leaf(value: Array, name: str, members: Sequence[Member]) -> Any:
    """An array in the dtype, the box and the place of those that it is made of."""
    leaves = [member.adapter[name] for member in members]
    boxed = [leaf for leaf in leaves if isinstance(leaf, meta.AxisMetadata)]
    with jax.numpy_dtype_promotion("standard"):
        dtype = functools.reduce(
            jnp.promote_types, [member.arrays[name].dtype for member in members]
        )
    value = value.astype(dtype)
    sharding = named_sharding(meta.unbox(leaves[0]))
    if sharding is not None and not is_traced(value):
        value = jax.device_put(value, sharded_like(sharding, value.shape))
    return meta.replace_boxed([*boxed, leaves[0]][0], value)
