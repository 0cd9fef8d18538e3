"""The way back from fused weights: to the base, or to adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from peft_jax._numerics import MatrixView, is_traced, padded, widest
from peft_jax._spec import LoraSpec
from peft_jax._trees.fuse import Specs, check_specs, layer_changes, merge_params, rounded_sum
from peft_jax._trees.paths import (
    Layer,
    Path,
    adapter_paths,
    children,
    is_branch,
    map_layers,
    rebuild,
    slashed,
    stored_paths,
)

__all__ = [
    "unfuse_params",
]


def unfuse_params(
    fused: Any,
    *,
    original: Any = None,
    lora: Any = None,
    specs: Specs | None = None,
    rank: int | None = None,
) -> Any:
    """Undoes `fuse_params`: returns a tree with adapters beside the weights.

    With ``lora`` the base is computed as ``fused - scaling * a·b``, in float32 and rounded once.
    Where ``original`` is given too, the base is exactly the original wherever that gives ``fused``.

    A change that depends on the weight (DoRA, rows of tokens) cannot be taken off: ``original``
    must be given then, and fuse to ``fused``.

    With ``original`` alone, adapters are recovered from ``fused - original`` by a singular value
    decomposition: the best of their rank (Eckart and Young, 1936). They are float32, and
    ``fuse_params`` of the result gives ``fused`` again where the rank suffices.

    Args:
      fused: what `fuse_params` returned, or any fine-tuned parameters.
      original: the base's parameters.
      lora: a tree of adapters (`split_params`).
      specs: from `lora_specs`; without them every kernel is read as that of a Dense layer with a
        scaling of 1.
      rank: of the adapters that are recovered; None: the numerical rank of each difference, and at
        least the rank of its spec, which needs arrays (no tracers). Layers without a difference get
        no adapter, or one of zeros where ``specs`` name them.

    Returns:
      The merged tree, as `fuse_params` takes it.

    Raises:
      ValueError: where neither ``original`` nor ``lora`` is given, trees do not fit, or a parameter
        differs that no adapter can express (a bias).
    """
    if original is None and lora is None:
        raise ValueError(
            "unfuse_params needs `lora`, the adapters that were fused, or `original`, the weights "
            "that they were fused into (or both)."
        )
    for name, tree in (("fused", fused), ("original", original)):
        paths = adapter_paths(tree) if is_branch(tree) else []
        if paths:
            raise ValueError(
                f"unfuse_params: {name} holds adapters ({paths[:3]}); it is a tree for the plain "
                "model. Take them off by `split_params`."
            )
        stored = stored_paths(tree)
        if stored:
            raise ValueError(
                f"unfuse_params: {name} holds values stored in few bits at '{slashed(stored[0])}'. "
                "Turn it back by `peft.dequantize_checkpoint`."
            )
    if lora is None:
        return _recover(fused, original, specs, rank)
    if rank is not None:
        raise ValueError(
            f"unfuse_params: rank={rank} is that of adapters to be recovered, but `lora` gives "
            "them. Leave one out."
        )
    return _take_off(fused, original, lora, specs)


def _take_off(fused: Any, original: Any, lora: Any, specs: Specs | None) -> Any:
    merged = merge_params(fused, lora)
    check_specs(merged, specs, "unfuse_params")
    kept = None if original is None else _leaves(original, ())

    def unfuse(path: Path, layer: Layer, adapters: Layer) -> Layer:
        if kept is None:
            _refuse_magnitudes(path, adapters, specs)
            changes = layer_changes(path, layer, adapters, specs)
            return layer | {p: rounded_sum(layer[p], changes[p], -1) for p in changes} | adapters
        leaves = [name for name, value in layer.items() if not is_branch(value)]
        before = layer | {name: _kept(kept, (*path, name), layer[name]) for name in leaves}
        changes = layer_changes(path, before, adapters, specs)
        if _has_magnitude(adapters):
            for param in changes:
                _check_kept((*path, param), before[param], layer[param], changes[param])
            return before | adapters
        bases = {p: _prefer((*path, p), before[p], layer[p], changes[p]) for p in changes}
        return layer | bases | adapters

    return map_layers(merged, unfuse)


def _has_magnitude(adapters: Layer) -> bool:
    """Whether what the adapters change depends on the weight."""
    return any({"magnitude", "rows"} & set(adapter) for adapter in adapters.values())


def _refuse_magnitudes(path: Path, adapters: Layer, specs: Specs | None) -> None:
    if _has_magnitude(adapters):
        raise ValueError(
            f"unfuse_params: the adapters {[slashed((*path, name)) for name in sorted(adapters)]} "
            "have a magnitude (DoRA) or rows of tokens, which cannot be taken off a fused weight. "
            "Give the weights that they were fused into, as `original`."
        )


def _kept(kept: Mapping[Path, Any], path: Path, fused: Any) -> Any:
    """The original of a fused parameter."""
    if path not in kept or jnp.shape(meta.unbox(kept[path])) != jnp.shape(meta.unbox(fused)):
        raise ValueError(
            f"unfuse_params: the original has no '{slashed(path)}' of shape "
            f"{jnp.shape(meta.unbox(fused))}. Give the weights that the adapters were fused into."
        )
    return kept[path]


def _prefer(path: Path, original: Any, fused: Any, change: jax.Array) -> Any:
    """The original weight, wherever fusing it gives the fused one, up to the last bits.

    Those may differ between two programs that compute the same sum.
    """
    base = rounded_sum(fused, change, -1)
    kept, dtype = meta.unbox(original), widest(meta.unbox(original).dtype)
    again, given = (
        meta.unbox(leaf).astype(dtype) for leaf in (rounded_sum(original, change, 1), fused)
    )
    size = jnp.abs(kept.astype(dtype)) + jnp.abs(change.astype(dtype))
    same = jnp.abs(again - given) <= 2 * float(jnp.finfo(kept.dtype).eps) * size
    return meta.replace_boxed(base, jnp.where(same, kept, meta.unbox(base)))


def _check_kept(path: Path, original: Any, fused: Any, change: jax.Array) -> None:
    """Where the change depends on the weight, the original is the base, if it fuses to ``fused``.

    Inside ``jax.jit``, where numbers are not known, it is taken at its word.
    """
    again, fused = (
        meta.unbox(leaf).astype(jnp.float32) for leaf in (rounded_sum(original, change, 1), fused)
    )
    if is_traced(again) or is_traced(fused):
        return
    scale = jnp.maximum(jnp.max(jnp.abs(fused)), 1e-30)
    precision = float(jnp.finfo(meta.unbox(original).dtype).eps)
    if float(jnp.max(jnp.abs(again - fused)) / scale) > 16 * precision:
        raise ValueError(
            f"unfuse_params: the original of '{slashed(path)}' does not fuse to what is given, and "
            "a magnitude (DoRA) or rows cannot be taken off otherwise. Give the weights that the "
            "adapters were fused into."
        )


def _recover(fused: Any, original: Any, specs: Specs | None, rank: int | None) -> Any:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"unfuse_params: rank is a positive integer or None, got {rank!r}.")
    before, after = _leaves(original, ()), _leaves(fused, ())
    if before.keys() != after.keys():
        raise ValueError(
            "unfuse_params: the trees have different leaves: only in fused "
            f"{[slashed(p) for p in sorted(after.keys() - before.keys())]}, only in original "
            f"{[slashed(p) for p in sorted(before.keys() - after.keys())]}."
        )
    decomposed = [path for path, spec in (specs or {}).items() if spec.variant != "lora"]
    if decomposed:
        raise ValueError(
            f"unfuse_params: the specs of {decomposed[:5]} are of DoRA, and adapters are recovered "
            "as plain LoRA. Give specs of the variant 'lora', or the adapters (`lora`)."
        )
    wanted = _wanted(specs, before) if specs is not None else _differing(before, after)
    adapters: dict[Path, dict[str, Any]] = {}
    for path, spec in wanted.items():
        if spec.alpha is not None and rank not in (None, spec.rank):
            raise ValueError(
                f"unfuse_params: rank={rank}, but the spec of '{slashed(path)}' has rank "
                f"{spec.rank}, from which its scaling was made (alpha {spec.alpha}). Leave rank "
                "out, or give specs without alpha."
            )
        adapters[path] = _factors(path, before, after, spec, rank)
    _refuse_other_differences(before, after, wanted)
    return _insert(original, adapters, ())


def _wanted(specs: Specs, leaves: Mapping[Path, Any]) -> dict[Path, LoraSpec]:
    wanted = {tuple(name.split("/")): spec for name, spec in specs.items()}
    for path, spec in wanted.items():
        if spec.param is None or (*path[:-1], spec.param) not in leaves:
            raise ValueError(
                f"unfuse_params: there is no weight {spec.param!r} for the spec of "
                f"'{slashed(path)}'. Give the specs of this model."
            )
    return wanted


def _differing(before: Mapping[Path, Any], after: Mapping[Path, Any]) -> dict[Path, LoraSpec]:
    """A Dense layer's spec for each two-axis weight that differs."""
    wanted: dict[Path, LoraSpec] = {}
    for path, value in before.items():
        if not _differs(value, after[path]):
            continue
        where = (*path[:-1], "lora")
        if jnp.ndim(meta.unbox(value)) != 2 or where in wanted:
            raise ValueError(
                f"unfuse_params: '{slashed(path)}' of shape {jnp.shape(meta.unbox(value))} "
                "differs, and is not plainly the kernel of one Dense layer. Pass "
                "specs=peft.lora_specs(model, *inputs), or equal weights."
            )
        wanted[where] = LoraSpec(path[-1], "ir,ro->io", 1)
    return wanted


def _refuse_other_differences(
    before: Mapping[Path, Any], after: Mapping[Path, Any], wanted: Mapping[Path, LoraSpec]
) -> None:
    adapted = {(*path[:-1], spec.param) for path, spec in wanted.items()}
    others = [
        path
        for path in before
        if path not in adapted
        and not is_traced(meta.unbox(after[path]))
        and _differs(before[path], after[path])
    ]
    if others:
        raise ValueError(
            f"unfuse_params: {[slashed(path) for path in others[:5]]} differ too, but no adapter "
            "stands for them. Give specs that cover them, or take them from one tree."
        )


def _differs(one: Any, other: Any) -> bool:
    one, other = meta.unbox(one), meta.unbox(other)
    if is_traced(one) or is_traced(other):
        raise ValueError(
            "unfuse_params under jit must be told which layers differ, and the rank: pass specs "
            "and rank."
        )
    return not np.array_equal(np.asarray(one), np.asarray(other))


def _factors(
    path: Path,
    before: Mapping[Path, Any],
    after: Mapping[Path, Any],
    spec: LoraSpec,
    rank: int | None,
) -> dict[str, Any]:
    """``a`` and ``b`` of the best adapter for one weight."""
    where = (*path[:-1], str(spec.param))
    old, new = meta.unbox(before[where]), meta.unbox(after[where])
    depth = len(spec.stack_axes) if spec.stack_axes else old.ndim - len(spec.letters[2])
    is_stacked = spec.equation.startswith("...")
    if (
        old.shape != new.shape
        or len(spec.letters[2]) + depth != old.ndim
        or (depth and not is_stacked)
    ):
        raise ValueError(
            f"unfuse_params: '{slashed(where)}' has shape {old.shape} in the original and "
            f"{new.shape} in fused; the spec's equation is '{spec.equation}' (stack axes "
            f"{spec.stack_axes}). Give the specs and the trees of one model."
        )
    for tree, value in (("the original", old), ("fused", new)):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"unfuse_params: '{slashed(where)}' is {value.dtype} in {tree}; adapters are "
                "recovered from floating-point weights. Dequantize them first."
            )
    if spec.scaling == 0:
        raise ValueError(f"unfuse_params: a scaling of 0 at '{slashed(path)}' has no inverse.")
    dtype = widest(old.dtype)
    view = MatrixView.of(spec, old.shape)
    matrices = view.matrices(new.astype(dtype) - old.astype(dtype))
    u, s, v = jnp.linalg.svd(matrices, full_matrices=False)
    if rank is None:
        rank = _numerical_rank(s, new, matrices.shape[-2:], slashed(where))
        rank = max(rank, spec.rank)  # of zeros beyond, so that the spec's scaling still holds
    kept = min(rank, s.shape[-1])
    root = jnp.sqrt(s[..., :kept])
    a = padded(u[..., :kept] * root[..., None, :], rank, -1)
    b = padded(v[..., :kept, :] * root[..., :, None] / spec.scaling, rank, -2)
    return dict(zip(("a", "b"), view.factors(a, b), strict=True))


def _numerical_rank(s: jax.Array, weight: jax.Array, shape: tuple[int, ...], where: str) -> int:
    """How many singular values exceed what rounding the weight alone leaves in the difference."""
    if is_traced(s):
        raise ValueError(
            f"unfuse_params: the numerical rank of '{where}' is not known under jit. Pass rank."
        )
    if not bool(jnp.all(jnp.isfinite(s))):
        raise ValueError(
            f"unfuse_params: '{where}' holds NaN or infinity in one of the trees. Repair it first."
        )
    noise = float(jnp.finfo(weight.dtype).eps) * float(jnp.max(jnp.abs(weight.astype(s.dtype))))
    floor = noise * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    return max(1, int(jnp.max(jnp.sum(s > floor, axis=-1))))


def _leaves(tree: Any, path: Path) -> dict[Path, Any]:
    if not is_branch(tree):
        return {path: tree}
    return {
        where: leaf
        for key, value in children(tree)
        for where, leaf in _leaves(value, (*path, str(key))).items()
    }


def _insert(tree: Any, adapters: Mapping[Path, Any], path: Path) -> Any:
    """The tree with each adapter at its path."""
    if not is_branch(tree):
        return tree
    inner = {key: _insert(value, adapters, (*path, str(key))) for key, value in children(tree)}
    inner |= {where[-1]: value for where, value in adapters.items() if where[:-1] == path}
    return rebuild(tree, inner)
