"""Adapted parameters in a tree: where they lie, and how arrays beside them shall lie."""

from __future__ import annotations

import collections
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax._numerics import (
    StoredValues,
    as_stored,
    is_traced,
    named_sharding,
    widest,
    without_explicit_axes,
)
from peft_jax._spec import LoraSpec
from peft_jax._trees import (
    Path,
    children,
    dequantize_checkpoint,
    is_branch,
    partitioned_like,
    reboxed,
    rebuild,
    scale_name,
    slashed,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A weight in a tree.

    Attributes:
      path: where it lies.
      box: the leaf, in its box.
      scale: where it is stored in few bits, the leaf that holds its scale.
    """

    path: Path
    box: Any
    scale: Any = None

    @property
    def stored(self) -> StoredValues | None:
        """The stored values, where it is stored in few bits."""
        return as_stored(meta.unbox(self.box))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        stored = self.stored
        return np.shape(meta.unbox(self.box)) if stored is None else stored.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weight, which must not be stored in few bits."""
        return meta.unbox(self.box).dtype

    def numbers(self) -> Array:
        """The weight in float32 or wider, where XLA may lay out what is made of it."""
        if self.stored is None:
            weight = jnp.asarray(meta.unbox(self.box))
        else:
            tree = {"weight": self.box, "scale": self.scale}
            weight = meta.unbox(dequantize_checkpoint(tree)["weight"])
        (weight,), _ = without_explicit_axes(weight)
        return weight.astype(widest(weight.dtype))

    def placed(self, value: Array) -> Array:
        """A weight of this shape, on devices as this one is."""
        return self._put(value, range(len(self.shape)))

    def beside(self, value: Array, places: Sequence[int | None]) -> Any:
        """An array of an adapter, boxed and on devices as the axes are that it shares.

        Args:
          value: the array.
          places: for each of its axes the weight's, or None for one of its own.
        """
        value = self._put(value, places)
        fits = len(getattr(self.box, "names", None) or ()) == len(self.shape)
        return partitioned_like(self.box, value, places) if fits else value

    def replaced(self, kernel: Array) -> Any:
        """A new weight in the place and the dtype of this one, rounded once."""
        return reboxed(self.box, self.placed(kernel.astype(self.dtype)))

    def _put(self, value: Array, places: Sequence[int | None]) -> Array:
        stored = self.stored
        sharding = named_sharding(meta.unbox(self.box) if stored is None else stored.array)
        if sharding is None or is_traced(value):
            return value
        names = [*sharding.spec, *[None] * (len(self.shape) - len(sharding.spec))]
        spec = PartitionSpec(*(None if place is None else names[place] for place in places))
        kind = sharding.memory_kind
        return jax.device_put(value, NamedSharding(sharding.mesh, spec, memory_kind=kind))


def adapted_parameter(tree: Any, path: str, spec: LoraSpec, caller: str, name: str) -> Parameter:
    """The weight that the adapter at a slashed path adapts.

    Args:
      tree: the parameters.
      path: of the adapter.
      spec: of the adapter.
      caller: who asks, for errors.
      name: of the tree, for errors.
    """
    if spec.param is None:
        raise ValueError(
            f"{caller}: the adapter at '{path}' stands alone (a LoRA...Adapter without a layer); "
            "there is no weight to start from. Leave its spec out, or wrap the layer."
        )
    where = (*path.split("/")[:-1], spec.param)
    layer = leaf_at(tree, where[:-1])
    box = layer.get(spec.param) if isinstance(layer, Mapping) else None
    parameter = Parameter(where, box)
    if box is None or (parameter.stored is None and is_branch(box)):
        raise _missing(tree, path, where, caller, name)
    if parameter.stored is not None:
        scale = scale_name(spec.param, layer)
        if scale is None:
            raise ValueError(
                f"{caller}: '{slashed(where)}' holds stored values without their scale. Keep "
                "both, as `peft.quantize_checkpoint` makes them."
            )
        return Parameter(where, box, layer[scale])
    value = meta.unbox(box)
    if not isinstance(value, jax.Array | np.ndarray):
        raise ValueError(
            f"{caller}: '{slashed(where)}' is {type(value).__name__}, no array. For shapes alone, "
            "call it inside `jax.eval_shape`."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating) or not value.size:
        raise ValueError(
            f"{caller}: '{slashed(where)}' is {value.dtype}{list(value.shape)}; adapters start "
            "from floating-point weights that are not empty. Give those."
        )
    return parameter


def refuse_shared(weights: Mapping[str, Parameter], what: str) -> None:
    """Each weight gives to one adapter alone.

    Args:
      weights: by the paths of adapters.
      what: the start of the error.
    """
    count = collections.Counter(weight.path for weight in weights.values())
    for weight in weights.values():
        if count[weight.path] > 1:
            shared = [path for path, other in weights.items() if other.path == weight.path]
            raise ValueError(
                f"{what}, and the adapters {shared} share '{slashed(weight.path)}'. Take one after "
                "the other, each from the base that the one before has left."
            )


def leaf_at(tree: Any, path: Path) -> Any:
    """What lies at a path; None where nothing does."""
    for part in path:
        inside = {str(key): value for key, value in children(tree)} if is_branch(tree) else {}
        tree = inside.get(part)
    return tree


def _missing(tree: Any, path: str, where: Path, caller: str, name: str) -> ValueError:
    whole = isinstance(tree, Mapping) and set(tree) == {"params"}
    close = difflib.get_close_matches(slashed(where), [slashed(p) for p in _paths(tree)], 3)
    remedy = (
        "Pass variables['params'], without the name of the collection."
        if whole
        else f"Close names: {close}. Take the specs from the model that made the parameters."
    )
    return ValueError(
        f"{caller}: the spec of '{path}' speaks of '{slashed(where)}', which {name} lacks. {remedy}"
    )


def _paths(tree: Any, path: Path = ()) -> list[Path]:
    if not is_branch(tree):
        return [path]
    inner = [_paths(value, (*path, str(key))) for key, value in children(tree)]
    return [leaf for leaves in inner for leaf in leaves]


def with_leaves(
    tree: Any,
    leaves: Mapping[Path, Any],
    adapters: Mapping[Path, Mapping[str, Any]],
    path: Path = (),
) -> Any:
    """The tree with other leaves, and adapters, at their paths; all else is as it was."""
    if path in leaves:
        return leaves[path]
    if not is_branch(tree):
        return tree
    inner = {
        key: with_leaves(value, leaves, adapters, (*path, str(key)))
        for key, value in children(tree)
    }
    inner |= {where[-1]: value for where, value in adapters.items() if where[:-1] == path}
    return rebuild(tree, inner)
