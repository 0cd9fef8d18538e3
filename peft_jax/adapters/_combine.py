"""`add_weighted_adapter`: several adapters in one."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from peft_jax._spec import LoraSpec
from peft_jax._trees import (
    Path,
    children,
    containers,
    is_adapter,
    is_branch,
    progress_bar,
    rebuild,
    slashed,
)
from peft_jax.adapters._combine_arguments import check_key, checked_settings, finite_weights
from peft_jax.adapters._combine_layers import CALLER, Member, check_members, combine_members
from peft_jax.adapters._combine_table import COMBINATIONS

Specs = Mapping[str, LoraSpec]


class CombinedLora(NamedTuple):
    """One adapter made of several, and its specs.

    Attributes:
      lora: the tree, for `merge_params`.
      specs: by the slashed paths in the tree.
    """

    lora: Any
    specs: dict[str, LoraSpec]


def add_weighted_adapter(
    adapters: Sequence[Any],
    weights: Sequence[float],
    *,
    specs: Sequence[Specs] | Specs,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    density: float | None = None,
    majority_sign_method: str = "total",
    key: Any = None,
    progress: bool = False,
) -> CombinedLora:
    """Combines adapters of one model into one.

    With the weight ``w_i`` and, of each layer, the scaling ``s_i``, ``a_i (in, r_i)`` and
    ``b_i (r_i, out)``, the result's product ``a·b`` is

    =======================  =====================================================  =============
    combination_type         a·b                                                    rank
    =======================  =====================================================  =============
    ``cat``                  ``sum_i w_i s_i a_i·b_i``, exactly                     ``sum_i r_i``
    ``svd``                  the best of a rank for that sum                        ``svd_rank``
    ``linear``               ``(sum_i c_i a_i)·(sum_i |c_i| b_i)``                  all the same
    ``ties``                 ``ties(a_i, c_i)·ties(b_i, |c_i|)``                    all the same
    ``dare_linear``          ``linear`` of ``dare(a_i)`` and ``dare(b_i)``          all the same
    ``dare_ties``            ``ties`` of ``dare(a_i)`` and ``dare(b_i)``            all the same
    ``magnitude_prune``      ``linear`` of the largest of ``a_i`` and ``b_i``       all the same
    ``ties_svd``, ...        the best for the same of ``s_i a_i·b_i`` and ``w_i``   ``svd_rank``
    =======================  =====================================================  =============

    where ``c_i = sign(w_i s_i) sqrt(|w_i s_i|)``: the sign goes to ``a`` alone, so that one adapter
    of a negative weight is subtracted. The factors' sums have terms ``a_i·b_j`` across adapters,
    those of ``cat`` and of every ``svd`` have none.

    ``ties`` (https://arxiv.org/abs/2306.01708) keeps the ``floor(density * size)`` largest numbers
    of each task vector, elects a sign at each place, and takes the mean of those that have it;
    weights, negative ones too, come after the vote. ``dare`` (https://arxiv.org/abs/2311.03099)
    keeps numbers at random and divides them by the density. A product is best by its singular
    values (Eckart and Young, 1936): ``a`` is orthonormal, and ``b`` carries the values.

    Each layer has its own rank and scaling, from its spec. Each layer of a stack, and each index of
    a batch axis, is combined by itself. An adapter that lacks a layer counts as zero there: it
    adds nothing, and where signs are elected it has no vote and is not counted in the mean. Biases
    ``s_i bias_i`` (``lora_bias``) are task vectors of their own, one for each layer, merged by the
    same rule with the weights ``w_i``: a sum for ``linear``, ``cat`` and ``svd``.

    Args:
      adapters: trees as `split_params` returns them, with nothing but adapters in them.
      weights: one finite number for each adapter; negative ones subtract.
      specs: those of each tree, or one mapping that serves all. Specs of further adapters are
        allowed.
      combination_type: see the table.
      svd_rank: of the results of ``svd`` and ``..._svd``; None: the largest rank among the adapters
        of the layer. A rank beyond ``min(in, out)`` is filled up with zeros.
      svd_clamp: a quantile in (0, 1] of all numbers in ``a`` and ``b``, of both signs, after a
        decomposition; numbers of a larger magnitude are cut to it. Where the quantile is negative
        they are cut to zero.
      svd_full_matrices: allowed for the sake of other libraries; it changes nothing, as no more
        than the rank is kept.
      density: the part of each task vector that is kept, in (0, 1]; ``linear``, ``cat`` and ``svd``
        do not read it.
      majority_sign_method: ``total``, the sign of the sum; or ``frequency``, that of most.
      key: from ``jax.random.key``; the ``dare`` types need it, also under ``jax.jit``, others do
        not read it. Draws depend on it and on the layer's path alone.
      progress: whether to show a bar.

    Returns:
      ``(lora, specs)``. Containers and boxes are those of the first tree that has them; adapters
      lie under the default name, ``lora.french`` at ``lora``. Arrays have the dtype that theirs
      promote to, computed in float32 or wider. Every spec has a scaling of 1 and an alpha that is
      its rank, as a `LoraConfig` without ``use_rslora`` says it by ``lora_alpha`` and
      ``alpha_pattern``.

    Raises:
      ValueError: with the path, where the trees are not of one model, hold more than adapters, or
        adapters of DoRA or of tokens' rows; specs do not fit; ranks differ in a layer and the type
        needs equal ones; or an argument is missing or not allowed.
    """
    row = COMBINATIONS.get(combination_type) if isinstance(combination_type, str) else None
    if row is None:
        close = difflib.get_close_matches(str(combination_type), COMBINATIONS, 3)
        raise ValueError(
            f"{CALLER}: combination_type={combination_type!r} is none of {list(COMBINATIONS)}."
            + (f" Close names: {close}." if close else "")
        )
    settings = checked_settings(svd_rank, svd_clamp, density, majority_sign_method)
    if row.needs_density and density is None:
        raise ValueError(
            f"{CALLER}: {combination_type!r} keeps a part of each task vector, and needs to know "
            "how much: give `density`, in (0, 1]."
        )
    if row.needs_key:
        check_key(key, combination_type)
    groups = _groups(adapters, finite_weights(weights), specs)
    ranks = {
        path: check_members(members, combination_type, settings) for path, members in groups.items()
    }
    combined: dict[Path, tuple[dict[str, Any], LoraSpec]] = {}
    shown = progress_bar(
        groups.items(), f"combine ({combination_type})", shown=progress, leave=False
    )
    with jax.default_matmul_precision("highest"):
        for path, members in shown:
            combined[path] = combine_members(
                slashed(path), members, ranks[path], row, settings, key
            )
    leaves = {path: adapter for path, (adapter, _) in combined.items()}
    return CombinedLora(
        _union(adapters, leaves, ()), {slashed(path): spec for path, (_, spec) in combined.items()}
    )


# --- Which adapters change a weight --------------------------------------------------------------


def _groups(adapters: Any, weights: Sequence[float], specs: Any) -> dict[Path, list[Member]]:
    """The adapters of each weight, by the path of the one that they make."""
    if not isinstance(adapters, list | tuple) or not adapters:
        raise ValueError(
            f"{CALLER}: adapters is a list of one or more trees, got {_described(adapters)}."
        )
    given = [specs] * len(adapters) if isinstance(specs, Mapping) else specs
    if not isinstance(given, list | tuple) or len({len(adapters), len(weights), len(given)}) > 1:
        count = len(given) if isinstance(given, list | tuple) else _described(given)
        raise ValueError(
            f"{CALLER}: each adapter has one weight and one dict of specs (one dict may serve "
            f"all); got {len(adapters)} adapters, {len(weights)} weights, specs: {count}."
        )
    layers: dict[Path, dict[Any, list[tuple[str, Member]]]] = {}
    for source, (tree, weight, own) in enumerate(zip(adapters, weights, given, strict=True)):
        _check_tree(source, tree, own)
        for path, name, adapter in _adapters(tree):
            where, short = slashed((*path, name)), name.partition(".")[0]
            spec = _spec(source, where, own)
            param = short if spec.param is None else spec.param
            member = Member(source, where, adapter, spec, weight)
            layers.setdefault(path, {}).setdefault((spec.param is None, param), []).append(
                (short, member)
            )
    groups = {}
    for path, by_param in layers.items():
        for name, members in _named(by_param).items():
            groups[(*path, name)] = members
    return groups


def _named(
    by_param: Mapping[Any, Sequence[tuple[str, Member]]],
) -> dict[str, list[Member]]:
    """The name of each result in a layer: the one that says most, as a first kernel's is `lora`."""
    names = {param: max((name for name, _ in found), key=len) for param, found in by_param.items()}
    taken = list(names.values())
    return {
        f"{names[at]}_{at[1]}" if taken.count(names[at]) > 1 else names[at]: [
            member for _, member in found
        ]
        for at, found in by_param.items()
    }


def _adapters(tree: Any) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
    """The path of the container, the name and the leaves of each adapter."""
    for path, container in containers(tree):
        for name, value in children(container):
            if isinstance(container, Mapping) and is_adapter(name, value):
                yield path, name, value


def _spec(source: int, path: str, specs: Specs) -> LoraSpec:
    if path not in specs:
        close = difflib.get_close_matches(path, list(specs), 3)
        raise ValueError(
            f"{CALLER}: adapters[{source}] has no spec for '{path}'. Close paths: {close}. Give "
            "the specs of its own model: `peft.lora_specs(model, *inputs)`."
        )
    return specs[path]


def _check_tree(source: int, tree: Any, specs: Any) -> None:
    """A tree of adapters alone, and specs that are ones."""
    if not isinstance(specs, Mapping) or not all(isinstance(s, LoraSpec) for s in specs.values()):
        raise ValueError(
            f"{CALLER}: specs map the slashed path of each adapter to its LoraSpec; of "
            f"adapters[{source}] they are {specs!r:.200}. `peft.lora_specs(model, *inputs)` makes "
            "them; those kept as plain data come back by `peft.LoraSpec.from_dict`."
        )
    if not is_branch(tree):
        raise ValueError(
            f"{CALLER}: adapters[{source}] is {_described(tree)}, no tree of adapters. "
            "`split_params(params).lora` is one."
        )
    others = [
        slashed((*path, key))
        for path, container in containers(tree)
        for key, value in children(container)
        if not is_branch(value)
    ]
    if others:
        raise ValueError(
            f"{CALLER}: adapters[{source}] holds {len(others)} parameters that are no adapters, "
            f"such as {others[:3]}. Trained copies of parameters (`modules_to_save`, biases) are "
            "values, not changes that add up: take them out of the tree by `split_params`, and "
            "choose whose to put into the base."
        )
    if next(_adapters(tree), None) is None:
        raise ValueError(
            f"{CALLER}: adapters[{source}] holds no adapter. Give the second half of "
            "`split_params(params)`, of a model that has adapters."
        )


def _union(trees: Sequence[Any], adapters: Mapping[Path, Any], path: Path) -> Any:
    """The containers of all trees, with the adapters at their paths in place of the trees' own."""
    first = trees[0]
    for tree in trees[1:]:
        fits = isinstance(tree, Mapping) == isinstance(first, Mapping)
        if not fits or not (isinstance(first, Mapping) or len(tree) == len(first)):
            raise ValueError(
                f"{CALLER}: '{slashed(path)}' is {_described(first)} in one adapter and "
                f"{_described(tree)} in another. Combine adapters of one model."
            )
    inner: dict[Any, list[Any]] = {}
    for key, value in itertools.chain.from_iterable(map(children, trees)):
        if not (isinstance(first, Mapping) and is_adapter(key, value)):
            inner.setdefault(key, []).append(value)
    merged = {key: _union(found, adapters, (*path, str(key))) for key, found in inner.items()}
    own = {where[-1]: value for where, value in adapters.items() if where[:-1] == path}
    return rebuild(first, merged | own)


def _described(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
