"""Adapters of any JAX function of parameters: no module, no registration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import jax

from peft_jax._config import (
    LoraConfig,
    alpha_of,
    check_entries,
    is_all_linear,
    rank_of,
    scaling_of,
    selects,
    selects_parameter,
)
from peft_jax._numerics import (
    Term,
    Usage,
    adapted_norms,
    adapter_shapes,
    factor_of,
    frame,
    gains,
    lazy_weight,
    uses_of,
)
from peft_jax._spec import LoraSpec, parse_equation, roles_equation
from peft_jax._trees import DEFAULT, LORA, Path, at, check_adapter_name, slashed, split_arrays

__all__ = [
    "adapt_function",
    "function_specs",
]

Params = Any


def function_specs(
    fn: Callable[..., Any],
    params: Params,
    *args: Any,
    config: LoraConfig,
    adapter_name: str = DEFAULT,
    **kwargs: Any,
) -> dict[str, LoraSpec]:
    """The specs of the adapters that a config asks for, on any function of parameters.

    The function runs abstractly once, with a probe in the place of each parameter: which axes its
    products contract and produce gives the equation of each adapter, ``W + scaling * a·b``.

    Example::

      config = peft.LoraConfig(r=4, target_modules="all-linear")
      specs = peft.function_specs(fn, params, x, config=config)
      _, lora = peft.init_lora_weights(params, specs, jax.random.key(0), config=config)
      y = peft.adapt_function(fn, specs)(params, lora, x)

    Args:
      fn: called as ``fn(params, *args, **kwargs)``.
      params: a tree of arrays or ``jax.ShapeDtypeStruct``. Names of a config match the slashed
        paths of its leaves, or of the containers that hold them.
      *args: arguments. Arrays and ``jax.ShapeDtypeStruct`` are abstract; anything else passes as
        it is.
      config: which parameters are adapted, and how. ``"all-linear"`` is every parameter that a
        matrix product contracts with values that depend on the arguments, except for an output
        layer that is as wide as a table of tokens is long.
      adapter_name: of the adapters.
      **kwargs: further arguments, treated as ``args``.

    Returns:
      From the slashed path of each adapter (``layers/0/lora``) to its `LoraSpec`. An adapter lies
      beside its parameter, at ``lora``, or at ``lora_<parameter>`` beside one of several weights.

    Raises:
      ValueError: if an entry of the config matches nothing, or a parameter that is adapted is no
        entry of a dict.
    """
    _check_config(config, adapter_name)
    leaves = _leaves(params)
    usages = _usages(fn, params, args, kwargs)
    weights = [path for path in leaves if path in usages and usages[path].is_weight]
    output = _output_layers(usages)
    chosen = [path for path in weights if _is_chosen(config, path, usages[path], output)]
    modules = {path[:end] for path in leaves for end in range(len(path))} - {()}
    targeted = {path for path in chosen if selects(config, path)}
    targeted |= {path[:-1] for path in chosen if selects(config, path[:-1])}
    check_entries(config, modules | set(leaves), targeted, leaves)
    _refuse_without_name(params, chosen)
    specs = {}
    for path in chosen:
        alone = sum(other[:-1] == path[:-1] for other in weights) == 1
        own = "" if adapter_name == DEFAULT else f".{adapter_name}"
        name = (LORA if alone else f"{LORA}_{path[-1]}") + own
        specs["/".join((*path[:-1], name))] = _spec(config, path, usages[path])
    return specs


def adapt_function(fn: Callable[..., Any], specs: Mapping[str, LoraSpec]) -> Callable[..., Any]:
    """The function with adapters: ``adapted(params, lora, *args, **kwargs)``.

    A product with an adapted parameter is ``x·W + scaling * (x·a)·b``; no sum ``W + scaling * a·b``
    is formed, except for an operation that has no such form. Works under every transformation of
    JAX, and gives the same numbers as ``fn`` on fused parameters.

    Args:
      fn: called as ``fn(params, *args, **kwargs)``.
      specs: from `function_specs`.

    Returns:
      A function of the parameters, of the adapters (a tree, or a dict from the paths of ``specs``
      to dicts of arrays ``a`` and ``b``), and of the function's other arguments.

    Raises:
      ValueError: if adapters are missing or do not fit; when called.
    """
    specs = dict(specs)

    @functools.wraps(fn)
    def adapted(params: Params, lora: Any, *args: Any, **kwargs: Any) -> Any:
        flat, structure = jax.tree_util.tree_flatten_with_path(params)
        values = {_path_of(key): leaf for key, leaf in flat}
        terms: dict[Path, list[Term]] = {}
        for where, spec in specs.items():
            path = (*where.split("/")[:-1], str(spec.param))
            if path not in values:
                raise ValueError(
                    f"The specs adapt '{slashed(path)}', which the parameters lack. Give the "
                    "parameters that the specs were made for."
                )
            terms.setdefault(path, []).append(_term(where, spec, values[path], lora))
        with frame() as opened:
            given = [
                opened.lazy(lazy_weight(leaf, "/".join(path), terms[path]))
                if path in terms
                else leaf
                for path, leaf in values.items()
            ]
            return opened.plain(fn(jax.tree.unflatten(structure, given), *args, **kwargs))

    return adapted


def _check_config(config: LoraConfig, adapter_name: str) -> None:
    check_adapter_name("function_specs", adapter_name)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"function_specs takes a LoraConfig, got {type(config).__name__}.")
    refused = {
        "lora_dropout": config.lora_dropout,
        "lora_bias": config.lora_bias,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "layer_replication": config.layer_replication,
    }
    for field, value in refused.items():
        if value:
            raise ValueError(
                f"LoraConfig.{field} = {value!r} is not supported for a function of parameters. "
                "Leave it out, or adapt a Linen module by `peft.get_peft_model`."
            )


# --- Parameters and their uses -------------------------------------------------------------------


def _path_of(keys: Iterable[Any]) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _leaves(params: Params) -> dict[Path, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {_path_of(keys): leaf for keys, leaf in flat if hasattr(leaf, "shape")}


def _refuse_without_name(params: Params, chosen: Iterable[Path]) -> None:
    """Adapters lie beside parameters, in dicts."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    last = {_path_of(keys): keys[-1] if keys else None for keys, _ in flat}
    for path in chosen:
        if not isinstance(last[path], jax.tree_util.DictKey):
            raise ValueError(
                f"The parameter '{slashed(path)}' is no entry of a dict, so no adapter can lie "
                "beside it. Give function_specs a function of a tree of dicts, such as "
                "{'w': array}, that builds this one."
            )


def _usages(fn: Callable[..., Any], params: Params, args: Any, kwargs: Any) -> dict[Path, Usage]:
    arrays, filled = split_arrays((args, kwargs))

    def run(opened: Any, params: Params, inputs: list[Any]) -> Any:
        flat, structure = jax.tree_util.tree_flatten_with_path(params)
        lazy = [opened.lazy(lazy_weight(leaf, _path_of(keys))) for keys, leaf in flat]
        args, kwargs = filled(inputs)
        return _arrays(opened.plain(fn(jax.tree.unflatten(structure, lazy), *args, **kwargs)))

    found: dict[Hashable, Usage] = uses_of(run, params, arrays)
    return {path: usage for path, usage in found.items() if isinstance(path, tuple)}


def _arrays(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _output_layers(usages: Mapping[Path, Usage]) -> set[Path]:
    """The products that nothing follows, as wide as a table of tokens is long."""
    lengths = {
        usage.shape[axis]
        for usage in usages.values()
        if usage.is_lookup
        for axis in usage.axes("contracted")
    }
    return {path for path, usage in usages.items() if usage.is_last and usage.width in lengths}


def _is_chosen(config: LoraConfig, path: Path, usage: Usage, output: set[Path]) -> bool:
    if selects_parameter(config, path):
        return True
    if not config.target_modules:
        return False
    if is_all_linear(config):
        return usage.is_multiplied and path not in output and selects(config, path[:-1])
    return selects(config, path) or selects(config, path[:-1])


def _spec(config: LoraConfig, path: Path, usage: Usage) -> LoraSpec:
    roles = usage.roles
    if roles is None:  # nothing takes it apart: the last axis counts as the output
        roles = (*["contracted"] * (len(usage.shape) - 1), "produced")
    equation = parse_equation(roles_equation(roles))
    low_rank = equation.low_rank(batch_in_b=True)
    default = "".join(c for c in equation.kernel if c not in low_rank.a)
    return LoraSpec(
        path[-1],
        low_rank.delta,
        rank_of(config, path),
        scaling_of(config, path),
        alpha_of(config, path),
        variant="dora" if config.use_dora else "lora",
        outputs=None if equation.kept == default else equation.kept,
        kind="embed" if usage.is_lookup else "einsum",
        shape=usage.shape,
    )


# --- Terms ---------------------------------------------------------------------------------------


def _term(where: str, spec: LoraSpec, weight: Any, lora: Any) -> Term:
    """The adapter of a spec, from a tree of adapters."""
    arrays = _adapter_at(lora, where)
    needed = {"a", "b"} | ({"magnitude"} if spec.variant == "dora" else set())
    if not isinstance(arrays, Mapping) or not needed <= set(arrays):
        held = sorted(arrays) if isinstance(arrays, Mapping) else None
        raise ValueError(
            f"The adapter at '{where}' needs the arrays {sorted(needed)}, but has {held}. Make "
            "adapters for these specs by `peft.init_lora_weights`."
        )
    shapes = adapter_shapes(spec, weight.shape)
    given = tuple(jax.numpy.shape(arrays[name]) for name in "ab")
    if given != shapes:
        raise ValueError(
            f"The adapter at '{where}' has arrays of shape {given}, but its spec (rank "
            f"{spec.rank}) and the weight of shape {weight.shape} need {shapes}."
        )
    (a, b), (left, right, kernel) = (arrays[name] for name in "ab"), spec.letters
    gain = None
    if spec.variant == "dora":
        norms = adapted_norms(weight, a, b, spec.equation, spec.scaling, spec.output_letters)
        gain = factor_of(gains(arrays["magnitude"], norms), spec.output_letters, kernel)
    return Term(factor_of(a, left, kernel), factor_of(b, right, kernel), spec.scaling, gain)


def _adapter_at(lora: Any, where: str) -> Any:
    """An adapter in a tree, or in a dict by paths; None if it is missing."""
    if isinstance(lora, Mapping) and where in lora:
        return lora[where]
    try:
        return at(lora, where)
    except (KeyError, AttributeError, TypeError):
        return None
