"""What `add_weighted_adapter` is told besides the adapters, judged."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax._numerics import MAJORITY_SIGN_METHODS, is_traced
from peft_jax.adapters._combine_layers import CALLER
from peft_jax.adapters._combine_table import Settings


def finite_weights(weights: Any) -> list[float]:
    """The weights as plain numbers."""
    if isinstance(weights, jax.Array) and not is_traced(weights):
        weights = np.asarray(weights)
    values = list(weights) if isinstance(weights, list | tuple | np.ndarray) else None
    found = [_number(value) for value in values or ()]
    if values is None or not all(map(math.isfinite, found)):
        raise ValueError(
            f"{CALLER}: weights is a list of finite numbers, one for each adapter, got "
            f"{weights!r}. Under `jax.jit` they are plain numbers as well."
        )
    return found


def _number(value: Any) -> float:
    """A plain number; NaN for what is none."""
    if isinstance(value, np.ndarray | jax.Array) and not is_traced(value):
        value = value.item() if value.ndim == 0 else None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if number else math.nan


def checked_settings(svd_rank: Any, svd_clamp: Any, density: Any, majority: Any) -> Settings:
    """The options, each in its range."""
    is_rank = isinstance(svd_rank, int | np.integer) and not isinstance(svd_rank, bool)
    allowed = {
        "svd_rank, a positive integer or None": (
            svd_rank,
            svd_rank is None or (is_rank and svd_rank >= 1),
        ),
        "svd_clamp, a quantile in (0, 1] or None": (
            svd_clamp,
            svd_clamp is None or 0 < _number(svd_clamp) <= 1,
        ),
        "density, in (0, 1] or None": (density, density is None or 0 < _number(density) <= 1),
        f"majority_sign_method, one of {MAJORITY_SIGN_METHODS}": (
            majority,
            majority in MAJORITY_SIGN_METHODS,
        ),
    }
    for rule, (value, fits) in allowed.items():
        if not fits:
            raise ValueError(f"{CALLER}: {rule}, got {value!r}.")
    return Settings(
        None if density is None else _number(density),
        majority,
        None if svd_rank is None else int(svd_rank),
        None if svd_clamp is None else _number(svd_clamp),
    )


def check_key(key: Any, combination_type: str) -> None:
    """Refuses what is not one key."""
    dtype, shape = (getattr(key, name, None) for name in ("dtype", "shape"))
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if not typed and (dtype != jnp.uint32 or shape is None or len(shape) != 1):
        raise ValueError(
            f"{CALLER}: {combination_type!r} draws what it keeps, and needs `key`, one key from "
            f"`jax.random.key(seed)`; got {key!r:.100}."
        )
