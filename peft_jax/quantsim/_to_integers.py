"""Weights as the integers that a runtime computes with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from peft_jax._numerics import QuantizationMethod
from peft_jax._spec import LayerSpec
from peft_jax._trees import children, is_branch, quantize_checkpoint, reboxed, rebuild
from peft_jax.quantsim._encoding import Encoding, check_grid, flattened
from peft_jax.quantsim._grid import codes

Array = jax.Array


def integer_params(
    params: Any, encodings: Any, *, specs: Mapping[str, LayerSpec] | None = None
) -> Any:
    """The parameters, of which those with an encoding are integers.

    Where the quantizer is a ``method`` of `quantize_checkpoint`, they are its stored values and
    scales, bit for bit, which the ``Int4`` wrappers read. Otherwise they are the codes: of a
    symmetric grid signed, ``code + offset`` (int8, or int16 above 8 bits); else unsigned, from 0.

    Args:
      params: of the model.
      encodings: from `compute_encodings`; those of what flows between layers are passed over.
      specs: from `layer_specs`, where a quantizer is a method: as for `quantize_checkpoint`.

    Raises:
      ValueError: where a parameter is not there; as `quantize_checkpoint`.
    """
    own = {path: e for path, e in flattened(encodings) if e.of_parameter}
    _check_weights(params, own)
    plain = {path: e for path, e in own.items() if e.quantizer.method is None}
    tree = _with_codes(params, plain, ())
    by_method = {(e.quantizer.method, path) for path, e in own.items() if path not in plain}
    for method in QuantizationMethod:
        paths = {path for other, path in by_method if other is method}
        if not paths:
            continue
        chosen = None if specs is None else {path: specs[path] for path in paths if path in specs}
        tree = quantize_checkpoint(tree, method=method, specs=chosen, select=paths.__contains__)
    return tree


def _check_weights(params: Any, encodings: Mapping[str, Encoding]) -> None:
    """Refuses encodings of what is not there, is no float, or does not fit."""
    for path, encoding in encodings.items():
        check_grid(path, encoding)
        here: Any = params
        for name in path.split("/"):
            here = {str(key): value for key, value in children(here)} if is_branch(here) else {}
            here = here.get(name)
        value = meta.unbox(here)
        dtype = getattr(value, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            found = "lack" if value is None else f"hold as {dtype or type(value).__name__}"
            raise ValueError(
                f"There is an encoding for '{path}', which the parameters {found}. Give the "
                "parameters that the encodings were computed with."
            )
        shape, scale = jnp.shape(value), jnp.shape(encoding.scale)
        if len(shape) != len(scale) or any(n % m for n, m in zip(shape, scale, strict=True)):
            raise ValueError(
                f"The encoding of '{path}' has scales of shape {scale}, which do not fit the "
                f"parameter's {shape}. Give the parameters that the encodings were computed with."
            )
        if not bool(jnp.all(jnp.isfinite(value))):
            raise ValueError(f"'{path}' holds NaN or infinity, which no integer is. Mend it first.")


def _with_codes(tree: Any, encodings: Mapping[str, Encoding], path: tuple[str, ...]) -> Any:
    if "/".join(path) in encodings:
        encoding = encodings["/".join(path)]
        return reboxed(tree, _integers(meta.unbox(tree), encoding))
    if not is_branch(tree):
        return tree
    return rebuild(
        tree,
        {key: _with_codes(value, encodings, (*path, str(key))) for key, value in children(tree)},
    )


def _integers(value: Array, encoding: Encoding) -> Array:
    wide = encoding.bitwidth > 8
    code = codes(jnp.asarray(value), encoding.scale, encoding.offset, encoding.bitwidth)
    if not encoding.symmetric:
        return code.astype(jnp.uint16 if wide else jnp.uint8)
    signed = code - 2 ** (encoding.bitwidth - 1)
    return signed.astype(jnp.int16 if wide else jnp.int8)
