"""What GGUF files of adapters hold, and what they have no place for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from peft_jax._numerics import HostArray, PairLayout
from peft_jax._spec import LoraSpec

TYPE, ADAPTER_TYPE, ALPHA = "general.type", "adapter.type", "adapter.lora.alpha"
ARCHITECTURE, ALORA = "general.architecture", "adapter.alora.invocation_tokens"
# What is written, and GGML's names for those that numpy lacks.
DTYPES: Mapping[str, str] = {"float32": "", "float16": "", "bfloat16": "BF16"}
REMEDY = "Fuse the adapters (`peft.fuse_params`), and write the whole model by `peft.export_gguf`."


def check_plain(path: str, spec: LoraSpec) -> None:
    """Refuses the adapters that llama.cpp has no place for."""
    reason = None
    if spec.variant == "dora":
        reason = "is one of DoRA"
    elif spec.variant == "tokens":
        reason = "is rows of tokens"
    elif spec.bias is not None:
        reason = "has a bias"
    elif spec.kind == "conv":
        reason = "is that of a convolution"
    elif not spec.scaling:
        reason = "has the scaling 0, which cannot be taken off again,"
    if reason is not None:
        raise ValueError(f"The adapter at '{path}' {reason}; llama.cpp knows no such. {REMEDY}")


def product(path: str, layout: PairLayout) -> np.float32:
    """The alpha that llama.cpp would divide by the rank to get the scaling of an adapter."""
    with np.errstate(over="ignore", under="ignore"):
        value = np.float32(layout.spec.scaling * layout.rank)
    if not np.isfinite(value) or not value:
        raise ValueError(
            f"The adapter at '{path}' has the scaling {layout.spec.scaling} and the rank "
            f"{layout.rank}: their product is no float32 other than 0. Scale its arrays instead."
        )
    return value


def dtype_of(dtype: Any, caller: str, known: Any = DTYPES) -> np.dtype[Any]:
    """A floating dtype; one of those that are written, where ``known`` is not None."""
    try:
        kind = np.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"{caller}: dtype = {dtype!r} is no dtype.") from error
    if not jnp.issubdtype(kind, jnp.floating) or (known is not None and kind.name not in known):
        raise ValueError(f"{caller}: dtype = {kind}; it is one of {', '.join(DTYPES)}.")
    return kind


def cast_finite(label: str, array: HostArray, dtype: np.dtype[Any]) -> HostArray:
    """The array in a dtype in which all its numbers are finite."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.all(np.isfinite(cast)):
        raise ValueError(
            f"{label} has numbers that are not finite in {dtype}. Write it in a wider dtype, or "
            "look for what made them."
        )
    return cast
