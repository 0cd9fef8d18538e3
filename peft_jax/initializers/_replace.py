"""`replace_lora_weights_loftq`: adapters that correct a base that is stored in few bits already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from peft_jax._spec import LoraSpec
from peft_jax._trees import Specs, check_specs, progress_bar, slashed, split_params
from peft_jax.initializers._loftq import fitted
from peft_jax.initializers._parameters import (
    Parameter,
    adapted_parameter,
    leaf_at,
    refuse_shared,
    with_leaves,
)
from peft_jax.initializers._start import Target

_CALLER = "replace_lora_weights_loftq"


def replace_lora_weights_loftq(
    params: Any,
    original: Any,
    *,
    specs: Specs,
    callback: Callable[[Any, str], bool] | None = None,
    progress: bool = False,
) -> Any:
    """Replaces adapters by the best correction of what quantization took from their weights.

    For each adapter ``scaling * a·b`` becomes the best approximation of its rank of ``W - Q``,
    where ``Q`` is what the stored weight stands for. This is the first step of LoftQ
    (https://arxiv.org/abs/2310.08659) for a base that stays as it is. ``magnitude``, ``bias``
    and trained rows are kept.

    Args:
      params: the merged tree: stored weights (`quantize_checkpoint`) and adapters.
      original: the floating-point weights.
      specs: of the adapters.
      callback: of the tree in which one more adapter is replaced, and the adapter's path; whether
        that replacement is kept. None: all are.
      progress: whether to show a bar.

    Returns:
      The tree with other ``a`` and ``b``, in the dtypes, boxes and places of those before.

    Raises:
      ValueError: with the path, where trees and specs do not fit, a weight is not stored in few
        bits, adapters share one, or a scaling is zero.
    """
    check_specs(params, specs, _CALLER)
    base, lora = split_params(params)
    factored = {path: spec for path, spec in specs.items() if spec.variant != "tokens"}
    stored = {path: _stored(base, path, spec) for path, spec in factored.items()}
    kept = {path: _kept(original, path, spec) for path, spec in factored.items()}
    refuse_shared(stored, f"{_CALLER} corrects the weight")
    for path, weight in stored.items():
        if kept[path].shape != weight.shape:
            raise ValueError(
                f"{_CALLER}: '{slashed(weight.path)}' has shape {kept[path].shape} in original, "
                f"and {weight.shape} stored. Give the weights that were stored."
            )
    for path in progress_bar(stored, "replace adapters", shown=progress, leave=False):
        target = Target(path, specs[path], stored[path])
        with jax.default_matmul_precision("highest"):
            a, b = fitted(target, kept[path].numbers() - target.weight)
        place = tuple(path.split("/"))
        leaves = {
            (*place, name): Parameter(place, leaf_at(lora, (*place, name))).replaced(array)
            for name, array in {"a": a, "b": b}.items()
        }
        candidate = with_leaves(params, leaves, {})
        keep = True if callback is None else callback(candidate, path)
        if not isinstance(keep, bool | np.bool_):
            raise ValueError(
                f"{_CALLER}: the callback says whether the adapter at '{path}' is kept, by True or "
                f"False, got {keep!r:.100}."
            )
        params = candidate if keep else params
    return params


def _stored(base: Any, path: str, spec: LoraSpec) -> Parameter:
    parameter = adapted_parameter(base, path, spec, _CALLER, "the tree")
    if parameter.stored is None:
        raise ValueError(
            f"{_CALLER}: '{slashed(parameter.path)}' is not stored in few bits, so that there is "
            "nothing to correct. Store it by `peft.quantize_checkpoint`."
        )
    return parameter


def _kept(original: Any, path: str, spec: LoraSpec) -> Parameter:
    parameter = adapted_parameter(original, path, spec, _CALLER, "original")
    if parameter.stored is not None:
        raise ValueError(
            f"{_CALLER}: '{slashed(parameter.path)}' is stored in few bits in original too. Give "
            "the floating-point weights."
        )
    return parameter
