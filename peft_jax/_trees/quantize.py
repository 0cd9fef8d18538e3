"""Whole checkpoints to few bits and back, one weight at a time."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from peft_jax._numerics import (
    METHODS,
    Layout,
    QuantizationMethod,
    StoredValues,
    as_stored,
    axes_for,
    blocks_of,
    check_range,
    dequantize,
    encode,
    is_known,
    is_traced,
    layer_axes,
    named_sharding,
    packed_axis,
    sharded_like,
    spread_axes,
    without_explicit_axes,
)
from peft_jax._spec import LayerSpec, parse_equation
from peft_jax._trees.adapter_leaves import is_adapter
from peft_jax._trees.boxes import partitioned_like, reboxed, scale_axes
from peft_jax._trees.paths import Path, children, is_branch, slashed, stored_paths
from peft_jax._trees.progress import progress_bar
from peft_jax._trees.quantized_leaves import scales_in, stored_weights, with_stored, without_stored

__all__ = [
    "dequantize_checkpoint",
    "quantize_checkpoint",
]


Array = jax.Array
Select = Callable[[str], bool] | str | re.Pattern[str]


def quantize_checkpoint(
    params: Any,
    *,
    method: QuantizationMethod | str,
    specs: Mapping[str, LayerSpec] | None = None,
    select: Select | None = None,
    progress: bool = False,
    donate: bool = False,
) -> Any:
    """Stores weights in few bits: ``kernel`` becomes `StoredValues`, with its ``scale`` beside it.

    Weights are taken one by one, so that memory holds the input, the output and one weight. Each
    keeps its box and its place on devices. Inverse, up to rounding: `dequantize_checkpoint`.

    Args:
      params: nested dicts, FrozenDicts, lists and tuples. Adapters, and values that are stored
        already, are passed on.
      method: see `QuantizationMethod`; ``NONE`` returns the tree as it is.
      specs: from `layer_specs`: every weight in them is taken, by its equation. Without them,
        every ``kernel`` of two axes is, as ``(in, out)``; a kernel of more axes too by the Q4_0
        pair, while for other methods it raises.
      select: a function of a weight's slashed path, or a regular expression that is searched for
        in it: which of the weights in ``specs`` are taken, or, without specs, which of all
        weights of two or more axes, whatever their names.
      progress: whether to show a bar.
      donate: whether each weight is deleted once it is stored, so that memory holds no more than
        the larger of input and output and one weight. ``params`` is of no use afterwards, not even
        where an error ended the work.

    Returns:
      The tree with stored values. It works under ``jax.jit`` and ``jax.eval_shape`` too.

    Raises:
      ValueError: with the path: where blocks do not divide a weight, equations are needed, a spec
        or ``select`` matches nothing, or numbers are not finite.
    """
    method = QuantizationMethod(method)
    if method is QuantizationMethod.NONE:
        return params
    chosen = _chosen(params, method, specs, select)
    plans = {path: _planned(path, chosen[path], method, specs) for path in chosen}
    with_stored(params, dict.fromkeys(chosen, (None, None)))  # so that errors come first
    spend = _Spender(params, donate)
    done: dict[Path, tuple[Any, Any]] = {}
    for path in _shown(chosen, f"quantize to {method.value}", progress):
        done[path] = _quantized(path, chosen[path], plans[path])
        spend(chosen[path])
    return with_stored(params, done)


def dequantize_checkpoint(
    params: Any, *, dtype: Any = jnp.float32, progress: bool = False, donate: bool = False
) -> Any:
    """Turns stored values back into weights for the plain model: ``value(q) * scale``.

    Args:
      params: a tree with stored values, from `quantize_checkpoint` or read back from a file, where
        they may be plain dicts. Other leaves are passed on.
      dtype: of the weights.
      progress: whether to show a bar.
      donate: as for `quantize_checkpoint`.

    Returns:
      The tree without stored values and without their scales.

    Raises:
      ValueError: with the path, where stored values have no scale or one that does not fit.
    """
    found, spend = dict(stored_weights(params)), _Spender(params, donate)
    done: dict[Path, Any] = {}
    for path in _shown(
        {path: stored for path, (stored, _) in found.items()}, "dequantize", progress
    ):
        box, scale = found[path]
        stored = as_stored(meta.unbox(box))
        assert stored is not None
        try:
            weight = _restore(stored, meta.unbox(scale), dtype)
        except ValueError as error:
            raise ValueError(f"'{slashed(path)}': {error}") from error
        done[path] = reboxed(box, weight)
        spend(stored)
        spend(scale)
    return without_stored(params, done)


# --- Which weights, and how ----------------------------------------------------------------------


def _leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Paths and values of the floats that are neither adapters nor stored already."""
    if not is_branch(tree):
        if hasattr(meta.unbox(tree), "dtype") and as_stored(meta.unbox(tree)) is None:
            yield path, tree
        return
    scales = scales_in(tree)
    for key, value in children(tree):
        skipped = isinstance(tree, Mapping) and (is_adapter(key, value) or key in scales)
        if not skipped and as_stored(value) is None:
            yield from _leaves(value, (*path, str(key)))


def _chosen(
    params: Any, method: QuantizationMethod, specs: Mapping[str, LayerSpec] | None, select: Any
) -> dict[Path, Any]:
    if not is_branch(params):
        raise ValueError(
            f"quantize_checkpoint takes a tree of parameters, got {type(params).__name__}. Store "
            "one array by `peft.quantize`."
        )
    leaves = dict(_leaves(params))
    by_name = {"/".join(path): path for path in leaves}
    if specs is not None:
        _check_specs(specs, by_name, params)
        candidates = [by_name[name] for name in specs]
    elif select is None:
        candidates = [
            path for path, leaf in leaves.items() if path[-1:] == ("kernel",) and _rank(leaf) >= 2
        ]
    else:
        candidates = [path for path, leaf in leaves.items() if _rank(leaf) >= 2]
    if select is not None:
        wanted = _predicate(select)
        candidates = [path for path in candidates if wanted("/".join(path))]
    if not candidates:
        names = ["/".join(path) for path, leaf in leaves.items() if _rank(leaf) >= 2]
        close = difflib.get_close_matches(str(getattr(select, "pattern", select)), names, 5, 0.0)
        stored = ["/".join(path) for path in stored_paths(params)]
        if stored and not names:
            raise ValueError(
                f"quantize_checkpoint: the weights are stored in few bits already ({stored[:3]}). "
                "Turn them back first, by `peft.dequantize_checkpoint`."
            )
        raise ValueError(
            f"quantize_checkpoint: select={select!r} and specs leave nothing to quantize. Weights "
            f"of two or more axes are {close if select is not None else names[:5]}"
            f"{' and others' if len(names) > 5 else ''}."
        )
    return {path: leaves[path] for path in candidates}


def _check_specs(specs: Any, by_name: Mapping[str, Path], params: Any) -> None:
    if not isinstance(specs, Mapping) or not all(
        isinstance(spec, LayerSpec) for spec in specs.values()
    ):
        raise ValueError(
            "quantize_checkpoint: specs map the slashed path of each weight to its LayerSpec, as "
            f"`peft.layer_specs(model, *inputs)` makes them; got {specs!r:.200}."
        )
    missing = sorted(set(specs) - set(by_name))
    if missing:
        whole = isinstance(params, Mapping) and set(params) == {"params"}
        remedy = (
            "Pass variables['params'], without the name of the collection."
            if whole
            else "Take the specs from the model that made the parameters; values that are stored "
            "already have none."
        )
        raise ValueError(
            f"quantize_checkpoint: specs name weights that the tree does not hold: {missing}. "
            f"{remedy}"
        )


def _predicate(select: Any) -> Callable[[str], bool]:
    if isinstance(select, str | re.Pattern):
        try:
            pattern = re.compile(select)
        except re.error as error:
            raise ValueError(f"select={select!r} is no regular expression: {error}.") from error
        return lambda name: pattern.search(name) is not None
    if not callable(select):
        raise ValueError(
            f"select is a function of a slashed path, or a regular expression, got {select!r}."
        )
    return select


def _rank(leaf: Any) -> int:
    return len(np.shape(meta.unbox(leaf)))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How one weight is stored."""

    method: QuantizationMethod
    blocks: tuple[int, ...]
    packed: int | None
    layout: Layout


def _planned(
    path: Path, leaf: Any, method: QuantizationMethod, specs: Mapping[str, LayerSpec] | None
) -> _Plan:
    value, name = meta.unbox(leaf), "/".join(path)
    if isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(
            f"'{name}' is a shape without numbers. For the shapes of stored weights, use "
            "`jax.eval_shape(lambda params: peft.quantize_checkpoint(params, ...), params)`."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating) or not value.size:
        raise ValueError(
            f"'{name}' is {value.dtype}{list(value.shape)}; floating-point weights that are not "
            "empty are quantized. Leave it out (`select=`)."
        )
    spec = None if specs is None else specs[name]
    if spec is None and value.ndim != 2 and not METHODS[method].any_layout:
        raise ValueError(
            f"'{name}' has shape {value.shape}: {method.name} depends on which of its axes the "
            "layer contracts. Pass specs=peft.layer_specs(model, *inputs), or leave it out "
            "(`select=`)."
        )
    if spec is not None:
        _check_rank(name, value.shape, spec)
    stack = () if spec is None else spec.stack_axes
    contracted = None if spec is None else spec.axes
    order = layer_axes(value.ndim, stack)
    shape = [value.shape[i] for i in order]
    try:
        inner = blocks_of(method, shape, axes_for(method, contracted))
        spread = [i for i, place in enumerate(order) if place in _avoided(leaf)]
        stacked = sorted(set(range(value.ndim)) - set(order))
        nameable = [
            i
            for i, place in enumerate(order)
            if not stacked or place > stacked[-1] or place < stacked[0]
        ]
        if spec is None:  # the axes before the last two may be those of a stack
            nameable = nameable[-2:]
        packed = packed_axis(method, shape, contracted, avoid=spread, among=nameable)
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from error
    blocks = [1] * value.ndim
    for i, place in enumerate(order):
        blocks[place] = inner[i]
    if packed is None:
        return _Plan(method, tuple(blocks), None, Layout(method.value))
    place = order[packed]
    from_end = not stacked or place > stacked[-1]
    layout = Layout(method.value, place - value.ndim if from_end else place, shape[packed])
    return _Plan(method, tuple(blocks), place, layout)


def _check_rank(name: str, shape: tuple[int, ...], spec: LayerSpec) -> None:
    """A spec says what every axis of the weight is."""
    own, depth = len(parse_equation(spec.equation).kernel), len(spec.stack_axes)
    reach = all(-own - i <= axis - 1 < own + i for i, axis in enumerate(spec.stack_axes, start=1))
    if len(shape) != own + depth or not reach:
        raise ValueError(
            f"'{name}' has shape {shape}, but its spec tells of {own} axes ('{spec.equation}') and "
            f"of a stack along {list(spec.stack_axes)}. Give the specs of this model "
            "(`peft.layer_specs`)."
        )


def _avoided(leaf: Any) -> list[int]:
    """Axes that are, or by their names may be, spread over devices."""
    names = getattr(leaf, "names", None) or ()
    named = [axis for axis, name in enumerate(names) if name is not None]
    return [*named, *spread_axes(meta.unbox(leaf))]


def _shown(values: Mapping[Path, Any], verb: str, progress: bool) -> Iterator[Path]:
    """The paths, with a bar that counts bytes."""
    total = sum(map(_bytes, values.values()))
    with progress_bar(
        None, verb, shown=progress, total=total, unit="B", unit_scale=True, leave=False
    ) as bar:
        for path, value in values.items():
            bar.set_postfix_str("/".join(path), refresh=False)
            yield path
            bar.update(_bytes(value))


def _bytes(value: Any) -> int:
    return sum(int(leaf.size) * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))


class _Spender:
    """Deletes arrays of a tree, each when the last place where it stands is done with."""

    def __init__(self, tree: Any, donate: bool) -> None:
        self._left = collections.Counter(id(leaf) for leaf in jax.tree.leaves(tree))
        self._donate = donate

    def __call__(self, value: Any) -> None:
        for leaf in jax.tree.leaves(value):
            self._left[id(leaf)] -= 1
            concrete = isinstance(leaf, jax.Array) and not is_traced(leaf)
            if self._donate and concrete and not self._left[id(leaf)]:
                leaf.delete()


# --- One weight ----------------------------------------------------------------------------------


def _quantized(path: Path, box: Any, plan: _Plan) -> tuple[Any, Any]:
    """The stored values of a weight in its box, and their scale in one like it."""
    (x,), back = without_explicit_axes(jnp.asarray(meta.unbox(box)))
    array_at, scale_at = _places(x, plan)
    array, scale, found = _encoder(plan, array_at, scale_at, is_known(x))(x)
    try:
        check_range(plan.method, found)  # waits for the weight: one at a time
    except ValueError as error:
        raise ValueError(f"'{slashed(path)}': {error}") from error
    stored, scale = StoredValues(plan.layout, back(array)), back(scale)
    return reboxed(box, stored), partitioned_like(box, scale, scale_axes(x.shape, scale.shape))


@functools.lru_cache(maxsize=1024)
def _encoder(plan: _Plan, array_at: Any, scale_at: Any, check: bool) -> Callable[[Array], Any]:
    def run(x: Array) -> Any:
        return encode(x, plan.method.value, plan.blocks, plan.packed, check)

    return jax.jit(run, out_shardings=(array_at, scale_at, None))


def _places(x: Array, plan: _Plan) -> tuple[Any, Any]:
    """Where the stored array and its scale lie, if the weight is spread over named axes."""
    sharding = named_sharding(x)
    if sharding is None:
        return None, None
    packed = [n if i != plan.packed else -(-n // 2) for i, n in enumerate(x.shape)]
    scale = [n // block for n, block in zip(x.shape, plan.blocks, strict=True)]
    return sharded_like(sharding, packed), sharded_like(sharding, scale)


def _restore(stored: StoredValues, scale: Any, dtype: Any) -> Array:
    (array, scale), back = without_explicit_axes(stored.array, scale)
    sharding = named_sharding(array)
    at = None if sharding is None else sharded_like(sharding, stored.shape)
    weight = back(_decoder(jnp.dtype(dtype), at)(StoredValues(stored.layout, array), scale))
    return weight if is_traced(weight) else weight.block_until_ready()


@functools.lru_cache(maxsize=256)
def _decoder(dtype: Any, at: Any) -> Callable[[StoredValues, Array], Array]:
    return jax.jit(lambda stored, scale: dequantize(stored, scale, dtype), out_shardings=at)
