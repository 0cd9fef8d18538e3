"""EVA: the directions in which the inputs of each layer vary most."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from peft_jax._config import EvaConfig, LoraConfig, alpha_of, rank_of, scaling_of
from peft_jax._model import PeftModel, arguments, batches_of, default_forward, get_peft_model
from peft_jax._spec import LoraSpec
from peft_jax._surgery import lora_specs
from peft_jax._trees import merge_params, progress_bar, split_params
from peft_jax.initializers._init import init_lora_weights
from peft_jax.initializers._observe import Observation, Observer

Array = jax.Array
Specs = Mapping[str, LoraSpec]
Mask = Callable[[Any, EvaConfig], Array | None]


class _Components(NamedTuple):
    """Principal components of what was seen; axes of a stack and of batch indices in front.

    Attributes:
      components: ``(..., k, in)``, of falling singular values.
      values: the singular values ``(..., k)``.
      mean: ``(..., in)``.
      seen: how many rows.
      variance: sum of squared distances from the mean.
    """

    components: Array
    values: Array
    mean: Array
    seen: Array
    variance: Array


def get_eva_state_dict(
    model: nn.Module,
    params: Any,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    *,
    specs: Specs | None = None,
    forward_fn: Callable[[nn.Module, Any, Any], Any] | None = None,
    mask_fn: Mask | None = None,
    progress: bool = False,
) -> dict[str, Array]:
    """The components of each adapted layer's inputs, by EVA (https://arxiv.org/abs/2410.07170).

    The rows that a layer multiplies its weight by are decomposed incrementally (Ross et al., 2008,
    section 2), ``rho * r`` components at a time, batch after batch, until all components that are
    needed keep their direction from one batch to the next (cosine of at least ``tau``) or the data
    ends. Larger batches, and a larger ``rho``, lose less. Ranks are then given to the components
    that explain most of the variance of their layer, over all layers: as many as the config has in
    sum, and to one layer at most ``rho`` times its own. Layers of a stack share one rank, by their
    mean.

    Args:
      model: from `get_peft_model`, or a plain model with ``peft_config``.
      params: its parameters, with or without adapters, which take no part.
      dataloader: batches: dicts of the model's arguments (``labels`` are left out), tuples of
        them, or the only one. ``itertools.cycle`` makes it go round until all has converged.
      peft_config: a config whose ``eva_config`` says the rest; None: that of the model.
      specs: from `lora_specs` of the adapted model; None: found by the first batch.
      forward_fn: ``(model, params, batch) -> output``, in place of ``model.apply``; goes with
        ``specs``.
      mask_fn: ``(batch, eva_config) -> mask`` over the leading axes of every layer's input, or
        None. Default: of a dict the ``attention_mask``, without places whose ``labels`` are
        ``label_mask_value`` if ``use_label_mask``.
      progress: whether to show a bar.

    Returns:
      From the path of each adapter to its components ``(rank, in)`` in float32, divided by the
      roots of their singular values if ``whiten``, and with the axes of a stack in front. The state
      can be kept in files, exchanged, and given to `redistribute_ranks`, `init_lora_weights`
      (``statistics=``) and `initialize_lora_eva_weights`. A rank of 0 is ``(0, in)``.

    Raises:
      ValueError: where no data is given, or a layer is not reached, or does not fit the mask.
    """
    peft_model, config = adapted_model(model, peft_config)
    eva = config.eva_config or EvaConfig()
    base = split_params(params).original
    states: dict[str, _Components] = {}
    observer, limits, ranks = None, {}, {}
    specs = dict(specs or {})
    bar = progress_bar(batches_of(dataloader), "eva", shown=progress)
    for batch in bar:
        if observer is None:
            specs = factored(specs or specs_of(peft_model, batch, forward_fn))
            observer = Observer(forward_of(peft_model, forward_fn), base, specs, Observation())
            limits = {path: round(spec.rank * eva.rho) for path, spec in specs.items()}
        mask = (mask_fn or language_mask)(batch, eva)
        before = states
        states = {
            path: _updated(before.get(path), moments, limits[path])
            for path, moments in observer(batch, mask).items()
        }
        ranks = _distributed(states, {path: spec.rank for path, spec in specs.items()}, limits)
        settled = [_settled(before.get(p), states[p], ranks[p], eva.tau) for p in states]
        bar.set_postfix_str(f"{sum(settled)} of {len(settled)} layers converged")
        if all(settled):
            break
    bar.close()
    for path, state in states.items():
        if float(jnp.min(state.seen)) <= ranks[path]:
            raise ValueError(
                f"EVA saw {int(jnp.min(state.seen))} inputs of '{path}', which do not tell "
                f"{ranks[path]} directions around their mean. Give more data."
            )
    return {path: _cut(state, ranks[path], eva.whiten) for path, state in states.items()}


def redistribute_ranks(peft_config: LoraConfig, eva_state_dict: Mapping[str, Array]) -> LoraConfig:
    """The config whose ranks are those of an EVA state; see `get_eva_state_dict`.

    ``rank_pattern`` names every layer whose rank is not ``r``; ``target_modules`` become the paths
    of the layers with a rank above 0. With ``adjust_scaling_factors``, alphas grow as the ranks do,
    so that ``alpha / r`` stays.
    """
    eva = peft_config.eva_config or EvaConfig()
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    modules: list[str] = []
    # A name is a pattern for all that end so: the longer ones come first, and none is left to it.
    ends = {tuple(path.split("/"))[:-1] for path in eva_state_dict}
    suffixes = {end for end in ends if any(end == m[-len(end) :] for m in ends - {end})}
    for path, components in sorted(eva_state_dict.items(), key=lambda item: -item[0].count("/")):
        module = tuple(path.split("/"))[:-1]
        rank, before = int(np.shape(components)[-2]), rank_of(peft_config, module)
        if rank == 0:
            continue
        modules.append(".".join(module))
        alpha = alpha_of(peft_config, module)
        if eva.adjust_scaling_factors and rank != before:
            alpha = alpha * rank / before
        told = any(end == module[-len(end) :] for end in suffixes)
        if told or rank != peft_config.r:
            rank_pattern[modules[-1]] = rank
        if told or alpha != peft_config.lora_alpha:
            alpha_pattern[modules[-1]] = alpha
    return dataclasses.replace(
        peft_config,
        target_modules=modules,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )


class EvaInitialized(NamedTuple):
    """What `initialize_lora_eva_weights` returns.

    Attributes:
      model: adapted by the config with the ranks found.
      params: of that model.
    """

    model: PeftModel
    params: Any


def initialize_lora_eva_weights(
    model: PeftModel,
    params: Any,
    dataloader: Iterable[Any] | None = None,
    *,
    key: Array,
    eva_state_dict: Mapping[str, Array] | None = None,
    specs: Specs | None = None,
    **options: Any,
) -> EvaInitialized:
    """The model with the ranks, and the parameters with the adapters, that EVA gives.

    Args:
      model: from `get_peft_model`.
      params: its parameters; adapters in them are replaced.
      dataloader: as for `get_eva_state_dict`; not needed where there is a state already.
      key: from ``jax.random.key``.
      eva_state_dict: from `get_eva_state_dict`.
      specs: from `lora_specs` of the model; needed where there is no dataloader.
      **options: of `get_eva_state_dict`.

    Raises:
      ValueError: where neither data nor a state is given, or the state does not fit.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"initialize_lora_eva_weights takes a model from `get_peft_model`, got "
            f"{type(model).__name__}."
        )
    if model.peft_config.init_lora_weights != "eva":
        raise ValueError(
            "initialize_lora_eva_weights starts the adapters by EVA, but "
            f"LoraConfig.init_lora_weights = {model.peft_config.init_lora_weights!r}. Set it to "
            "'eva'."
        )
    if (dataloader is None) == (eva_state_dict is None):
        raise ValueError(
            "initialize_lora_eva_weights takes a dataloader, or the state that "
            "`get_eva_state_dict` found: one of them."
        )
    if specs is None and dataloader is not None:
        batches = batches_of(dataloader)  # which may have no end, or be read but once
        first = next(batches)
        specs = specs_of(model, first, options.get("forward_fn"))
        dataloader = itertools.chain([first], batches)
    if specs is None:
        raise ValueError(
            "initialize_lora_eva_weights needs the specs of the adapters with a state: pass "
            "specs=peft.lora_specs(model, *inputs)."
        )
    if eva_state_dict is None:
        assert dataloader is not None
        eva_state_dict = get_eva_state_dict(model, params, dataloader, specs=specs, **options)
    missing = sorted(set(factored(specs)) - set(eva_state_dict))
    if missing:
        raise ValueError(
            f"initialize_lora_eva_weights: the state says nothing of {missing[:5]}. Give the state "
            "of this model."
        )
    config = redistribute_ranks(model.peft_config, eva_state_dict)
    adapted = get_peft_model(model.wrapped, config, model.adapter_name)
    ranked = {
        path: spec if spec.variant == "tokens" else _ranked(path, spec, config)
        for path, spec in specs.items()
        if spec.variant == "tokens" or np.shape(eva_state_dict[path])[-2]
    }
    kept = {path: eva_state_dict[path] for path in factored(ranked)}
    base, lora = init_lora_weights(
        split_params(params).original,
        ranked,
        key,
        method="eva",
        config=config.eva_config,
        statistics=kept,
    )
    return EvaInitialized(adapted, merge_params(base, lora))


def _ranked(path: str, spec: LoraSpec, config: LoraConfig) -> LoraSpec:
    """The spec of an adapter by another config."""
    module = tuple(path.split("/"))[:-1]
    return dataclasses.replace(
        spec,
        rank=rank_of(config, module),
        alpha=alpha_of(config, module),
        scaling=scaling_of(config, module),
    )


def language_mask(batch: Any, config: EvaConfig) -> Array | None:
    """Places of a batch of text that count: attended to, and with a label; None: all."""
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    mask = None if mask is None else jnp.asarray(mask) != 0
    if config.use_label_mask and "labels" in batch:
        labelled = jnp.asarray(batch["labels"]) != config.label_mask_value
        mask = labelled if mask is None else mask & labelled
    return mask


def adapted_model(model: nn.Module, config: LoraConfig | None) -> tuple[PeftModel, LoraConfig]:
    """The adapted model and its config, of a plain model or an adapted one."""
    if isinstance(model, PeftModel):
        return model, model.peft_config if config is None else config
    if config is None:
        raise ValueError(
            "Which layers are adapted is not known of a plain model: pass peft_config, or a model "
            "from `get_peft_model`."
        )
    adapted = get_peft_model(model, config)
    return adapted, adapted.peft_config


def forward_of(model: PeftModel, forward_fn: Any) -> Callable[[Any, Any], Any]:
    """Runs the plain model on a batch, as the user says or by default."""
    if forward_fn is None:
        return default_forward(model.wrapped)
    return lambda params, batch: forward_fn(model.wrapped, params, batch)


def specs_of(model: PeftModel, batch: Any, forward_fn: Any) -> Specs:
    """Specs of the adapters that a batch reaches."""
    if forward_fn is not None:
        raise ValueError(
            "With a forward_fn, the adapters are not known by themselves: pass "
            "specs=peft.lora_specs(model, *inputs)."
        )
    args, kwargs = arguments(batch)
    return lora_specs(model, *args, **kwargs)


def factored(specs: Specs) -> dict[str, LoraSpec]:
    """The specs of adapters that have factors, rather than rows of a table."""
    return {path: spec for path, spec in specs.items() if spec.variant != "tokens"}


# --- Incremental principal components ------------------------------------------------------------


def _updated(state: _Components | None, moments: Mapping[str, Array], count: int) -> _Components:
    """The components after a further batch.

    The right singular vectors of ``[diag(s) V; X - mean; correction]`` are the eigenvectors of its
    Gram matrix, for which the moments of ``X`` suffice.
    """
    return _update(state, moments, min(count, moments["sum"].shape[-1]))


@jax.jit(static_argnums=2)
def _update(state: _Components | None, moments: Mapping[str, Array], count: int) -> _Components:
    rows = moments["count"][..., None]
    mean = moments["sum"] / rows[..., None]
    square = moments["square"] - rows[..., None, None] * mean[..., :, None] * mean[..., None, :]
    variance, total, new_mean = jnp.trace(square, axis1=-2, axis2=-1), rows, mean
    if state is not None:
        total = state.seen + rows
        shift = state.mean - mean
        factor = (state.seen * rows / total)[..., None]
        square = square + factor[..., None] * shift[..., :, None] * shift[..., None, :]
        scaled = state.values[..., None] * state.components
        square = square + jnp.einsum("...ki,...kj->...ij", scaled, scaled)
        change = jnp.sum(jnp.square(shift), -1) * factor[..., 0]
        variance = variance + state.variance + change
        new_mean = mean + shift * (state.seen / total)[..., None]
    values, vectors = jnp.linalg.eigh(square)
    kept = jnp.sqrt(jnp.maximum(values[..., ::-1][..., :count], 0))
    return _Components(vectors[..., ::-1][..., :count].mT, kept, new_mean, total, variance)


def _explained(state: _Components) -> np.ndarray:
    """The share of the variance that each component explains, the mean over a stack."""
    share = jnp.square(state.values) / jnp.maximum(state.variance, 1e-30)[..., None]
    return np.asarray(share).reshape(-1, share.shape[-1]).mean(axis=0)


def _distributed(
    states: Mapping[str, _Components], ranks: Mapping[str, int], limits: Mapping[str, int]
) -> dict[str, int]:
    """Ranks for the components that explain most; a rank of a stack costs one for each layer."""
    layers = {path: int(np.prod(states[path].mean.shape[:-2])) for path in states}
    budget = sum(ranks[path] * layers[path] for path in states)
    listed = [
        (share, path)
        for path, state in states.items()
        for share in _explained(state)[: limits[path]]
    ]
    given = dict.fromkeys(states, 0)
    for _, path in sorted(listed, key=lambda item: -item[0]):
        if layers[path] <= budget:
            given[path] += 1
            budget -= layers[path]
    return given


def _settled(before: _Components | None, after: _Components, rank: int, tau: float) -> bool:
    """Whether the components that are needed have kept their directions."""
    if before is None:
        return False
    cosine = jnp.abs(jnp.sum(before.components * after.components, axis=-1))
    return bool(jnp.all(cosine[..., :rank] >= tau))


def _cut(state: _Components, rank: int, whiten: bool) -> Array:
    components = state.components[..., :rank, :]
    if whiten:
        components = components / jnp.sqrt(state.values[..., :rank, None])
    return components[..., 0, :, :] if components.shape[-3] == 1 else components
