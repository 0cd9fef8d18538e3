"""Calibration: encodings from parameters, and from what flows through a model on given batches."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from peft_jax._model import batches_of, default_forward
from peft_jax._numerics import as_stored, quantize_layer, stack_first
from peft_jax._trees import children
from peft_jax.quantsim._calibration_pass import (
    Form,
    Forward,
    Program,
    gathered,
    gathered_on_mesh,
    range_of,
    settings_of,
    statistic_of,
)
from peft_jax.quantsim._encoding import Encoding, flattened, nested
from peft_jax.quantsim._grid import scale_and_offset
from peft_jax.quantsim._model import SimulatedModel, find_sites
from peft_jax.quantsim._quantizer import Quantizer
from peft_jax.quantsim._ranges import range_of_array
from peft_jax.quantsim._rule import Census, Simulate, naming
from peft_jax.quantsim._sites import Site

Array = jax.Array


def compute_encodings(
    sim: SimulatedModel,
    params: Any,
    batches: Iterable[Any],
    *,
    encodings: Any = None,
    forward_fn: Forward | None = None,
    progress: bool = False,
) -> Any:
    """Encodings of all that is simulated while the model runs on these batches.

    Parameters come first, each from its own values. Then the model runs on every batch: frozen
    encodings and those of parameters act, everything else passes as it is and is watched, so that
    ranges do not depend on how the examples are split into batches (but for ``moving_average``).
    Frozen encodings are kept to the bit, and so are those of sites that do not run, such as the
    adapters' inside ``peft.disable_adapters()``.

    The model runs under ``jax.jit``, forward only. On several devices give parameters or batches
    that are spread over them: the ranges are those of all the data.

    Example::

      with peft.disable_adapters():
        base = quantsim.compute_encodings(sim, params, batches)
      base = quantsim.freeze(base)
      encodings = quantsim.compute_encodings(sim, params, batches, encodings=base)

    Args:
      sim: from `simulate`.
      params: of the model, with adapters if it has any.
      batches: an iterable of batches, each a dict of the model's arguments (``labels`` left out), a
        tuple of them, or the only one. It is run through once.
      encodings: those that are known already. What is not frozen is computed anew.
      forward_fn: ``(model, params, batch)``, which runs ``model.apply({"params": params}, ...)``,
        where a batch is anything else.
      progress: whether a progress bar is shown.

    Returns:
      A tree of `Encoding` under the paths of the parameters.

    Raises:
      ValueError: where there are no batches or nothing to calibrate, on NaN and infinite values
        (with the path and the number of the batch), on a site that a batch should reach and does
        not, on a rule that matches nothing, on frozen encodings that are for another quantizer.
    """
    if not isinstance(sim, SimulatedModel):
        raise ValueError(
            f"compute_encodings takes a model from `quantsim.simulate`, got {type(sim).__name__}."
        )
    if forward_fn is not None and not callable(forward_fn):
        raise ValueError(f"forward_fn is a function (model, params, batch), got {forward_fn!r}.")
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"batches is an iterable of batches, got {type(batches).__name__}. Write [batch]."
        )
    forward = _default_forward if forward_fn is None else forward_fn
    found = iter(batches_of(batches))
    first = next(found)
    sites, census = _surveyed(sim, params, first, forward)
    used = census.used & set(sites)
    if not sites:
        raise ValueError(
            "There is nothing to calibrate: 0 sites are simulated in what runs. Have the "
            "configuration name quantizers, and forward_fn run `apply` of the model that it gets."
        )
    kept = dict(flattened({} if encodings is None else encodings))
    frozen = {path for path in used if path in kept and kept[path].is_frozen}
    for path in sorted(frozen):
        _check_frozen(path, kept[path], sites[path])
    for path, value in census.constants.items():
        if path in frozen:
            _check_covers(path, kept[path], value)
    due = {path: site for path, site in sites.items() if path in used - frozen}
    if not due:
        raise ValueError(
            f"There is nothing to calibrate: of {len(sites)} sites {len(used)} run on these "
            f"batches, and {len(frozen)} of those are frozen. Unfreeze some "
            "(`quantsim.unfreeze`), enable the adapters, or choose sites by the configuration."
        )
    new = {path: encoding for path, site in due.items() if (encoding := _given(path, site, params))}
    for path in set(new) & set(census.constants):
        _check_covers(path, new[path], census.constants[path])
    observed = {path: site for path, site in due.items() if path not in new}
    if observed:
        acting = {**kept, **new}
        acting = {path: acting[path] for path in used if path in acting and path not in observed}
        program = Program.of(sim, forward, acting, observed)
        every = itertools.chain([first], found)
        totals = gathered(program, params, acting, every, progress=progress)
        new |= {
            path: _encoding(site, *range_of(site.quantizer, totals[path]))
            for path, site in observed.items()
        }
    return nested({**kept, **new})


# --- Which sites there are -----------------------------------------------------------------------


def _surveyed(
    sim: SimulatedModel, params: Any, batch: Any, forward: Forward
) -> tuple[dict[str, Site], Census]:
    """All sites of the model, and what of them runs on this batch."""
    census, sites = Census(), dict[str, Site]()
    arrays, form = Form.of(batch)

    def run(params: Any, arrays: Any) -> Any:
        return forward(_Surveyed(sim, census, sites), params, form.filled(arrays))

    jax.eval_shape(run, params, arrays)
    strange = sorted(census.used - set(sites))
    if strange:
        raise ValueError(
            f"{strange[:5]} are simulated when the model is applied, but not when it is "
            "initialized, so that nothing is known of how they are stacked. Leave them out by "
            "`QuantizerRule(path, None)`."
        )
    stored = {path for path, site in sites.items() if _is_stored(path, site, params)}
    return {path: site for path, site in sites.items() if path not in stored}, census


@dataclasses.dataclass(frozen=True)
class _Surveyed:
    """Stands for the model in a first, abstract run, in which sites are found."""

    sim: SimulatedModel
    census: Census
    sites: dict[str, Site]

    def apply(
        self,
        variables: Any,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> Any:
        keys = {"params": jax.random.key(0), **(rngs if isinstance(rngs, Mapping) else {})}
        own = self.sim._own_method(method)
        self.sites.update(find_sites(self.sim, *args, method=own, rngs=keys, **kwargs))
        simulation = Simulate(self.sim.config, census=self.census)
        flax = {"rngs": rngs, "mutable": mutable, "capture_intermediates": capture_intermediates}
        return self.sim.run(simulation, variables, *args, method=method, **flax, **kwargs)


def _default_forward(model: Any, params: Any, batch: Any) -> Any:
    return default_forward(model)(params, batch)


def _check_covers(path: str, encoding: Encoding, value: float) -> None:
    """Refuses a grid that clips a number which is known."""
    low, high, step = (np.asarray(x) for x in (encoding.min, encoding.max, encoding.scale))
    if np.any(value < low - step) or np.any(value > high + step):
        raise ValueError(
            f"'{path}' is {value}, which lies outside its grid, from {low.ravel()[0]} to "
            f"{high.ravel()[0]} ({encoding.quantizer!r}). Give a range that holds it."
        )


def _check_frozen(path: str, encoding: Encoding, site: Site) -> None:
    if encoding.quantizer != site.quantizer or jnp.shape(encoding.scale) != site.shape:
        raise ValueError(
            f"The frozen encoding of '{path}' was made for {encoding.quantizer!r} with scales of "
            f"shape {jnp.shape(encoding.scale)}, but the model simulates {site.quantizer!r} with "
            f"{site.shape}. Unfreeze it, or keep the configuration that it was made for."
        )


def _is_stored(path: str, site: Site, params: Any) -> bool:
    if not site.spec.of_parameter:
        return False
    return as_stored(meta.unbox(_at(params, path))) is not None


def _at(params: Any, path: str) -> Any:
    for name in path.split("/"):
        params = {str(key): value for key, value in children(params)}[name]
    return params


# --- Encodings without data ----------------------------------------------------------------------


def _given(path: str, site: Site, params: Any) -> Encoding | None:
    """The encoding of a parameter, or of a fixed range; None where batches have to say it."""
    quantizer = site.quantizer
    if quantizer.range is not None:
        low, high = (
            np.full((site.layers, site.groups), end, np.float32) for end in quantizer.range
        )
        return _encoding(site, low, high)
    if not site.spec.of_parameter:
        return None
    value = meta.unbox(_at(params, path))
    if not bool(jnp.all(jnp.isfinite(value))):
        raise ValueError(f"'{path}' holds NaN or infinity, and has no range. Mend it first.")
    if quantizer.method is not None:
        return _of_method(path, value, site)
    if site.spec.of_adapter and not bool(jnp.any(value)):
        warnings.warn(
            f"'{path}' is all zeros, so that its grid has no width, and training through it would "
            "not move. Compute encodings when the adapter is trained, or give a fixed range.",
            stacklevel=3,
        )
    low, high = _range_of_values(quantizer, _groups(value, site.shape))
    scale, offset = scale_and_offset(low, high, quantizer.bitwidth, quantizer.symmetric)
    leaves = (jnp.asarray(leaf).reshape(site.shape) for leaf in (scale, offset))
    return _of_leaves(site, *leaves)


def _range_of_values(quantizer: Quantizer, groups: Array) -> Any:
    """The range of each group, from all its values."""
    if statistic_of(quantizer) == "extremes":  # where the weight lies
        return np.asarray(jnp.min(groups, 1)), np.asarray(jnp.max(groups, 1))
    return range_of_array(
        quantizer.calibration,
        groups,
        quantizer.bitwidth,
        quantizer.symmetric,
        **settings_of(quantizer),
    )


def _groups(value: Array, scale: tuple[int, ...]) -> Array:
    """The values that each scale serves: ``(scales, values)``, in the scale's order."""
    split = [part for n, m in zip(value.shape, scale, strict=True) for part in (m, n // m)]
    order = (*range(0, 2 * value.ndim, 2), *range(1, 2 * value.ndim, 2))
    groups = gathered_on_mesh(value).astype(jnp.float32).reshape(split).transpose(order)
    return groups.reshape(int(np.prod(scale)), -1)


def _of_method(path: str, value: Array, site: Site) -> Encoding:
    """The scales of a method of `quantize_checkpoint`."""
    method = site.quantizer.method
    assert method is not None
    axes, depth = site.stack_axes, len(site.stack_axes)
    first = stack_first(value, axes)

    def scale_of(weight: Array) -> Array:
        return quantize_layer(weight, method, site.spec.contracted)[1]

    flat = first.reshape(-1, *first.shape[depth:])
    with naming(path):
        scales = jnp.stack([scale_of(weight) for weight in flat]).astype(jnp.float32)
    scale = site.laid_out(scales.reshape(site.layers, -1))
    return _of_leaves(site, scale, jnp.full(scale.shape, -(2.0 ** (site.quantizer.bitwidth - 1))))


def _encoding(site: Site, low: np.ndarray, high: np.ndarray) -> Encoding:
    """From ranges ``(layers, groups)``."""
    quantizer = site.quantizer
    leaves = scale_and_offset(low, high, quantizer.bitwidth, quantizer.symmetric)
    return _of_leaves(site, *(site.laid_out(leaf) for leaf in leaves))


def _of_leaves(site: Site, scale: Array, offset: Array) -> Encoding:
    return Encoding(
        jnp.asarray(scale, jnp.float32),
        jnp.asarray(offset, jnp.float32),
        site.quantizer,
        site.spec.of_parameter,
        site.spec.of_adapter,
    )
