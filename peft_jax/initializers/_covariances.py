"""CorDA: covariances of the inputs of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from peft_jax._config import LoraConfig
from peft_jax._model import batches_of
from peft_jax._trees import progress_bar, split_params
from peft_jax.initializers._eva import Specs, adapted_model, factored, forward_of, specs_of
from peft_jax.initializers._observe import Observation, Observer

Array = jax.Array


def collect_covariances(
    model: nn.Module,
    params: Any,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    *,
    specs: Specs | None = None,
    forward_fn: Callable[[nn.Module, Any, Any], Any] | None = None,
    progress: bool = False,
) -> dict[str, Array]:
    """``C = mean(X^T X)`` of each adapted layer, for ``init_lora_weights(method="corda")``.

    ``X (rows, in)`` is what one call of the layer multiplies its weight by, divided by the
    magnitude of its largest number; the mean is over calls, so that ``C`` grows with the rows of
    a call. A multiple of ``C`` leaves ``a·b`` as it is and shifts size between ``a`` and ``b``,
    which an optimizer such as Adam may feel: ``C / trace(C)`` balances them. CorDA,
    https://arxiv.org/abs/2406.05223, section 3.1.

    Args:
      model: as for `get_eva_state_dict`.
      params: likewise.
      dataloader: likewise.
      peft_config: likewise; its ``corda_config`` says whether squares are rounded to float16.
      specs: as for `get_eva_state_dict`.
      forward_fn: likewise.
      progress: whether to show a bar.

    Returns:
      From the path of each adapter to its covariance ``(in, in)`` in float32, with the axes of a
      stack in front.

    Raises:
      ValueError: as `get_eva_state_dict`; also where an input is not finite.
    """
    peft_model, config = adapted_model(model, peft_config)
    corda = config.corda_config
    halved = corda is not None and corda.use_float16_for_covariance
    how = Observation(normalised=True, dtype=jnp.float16 if halved else jnp.float32)
    base, observer = split_params(params).original, None
    total: dict[str, Any] = {}
    for batch in progress_bar(batches_of(dataloader), "covariances", shown=progress):
        if observer is None:
            specs = factored(specs or specs_of(peft_model, batch, forward_fn))
            observer = Observer(forward_of(peft_model, forward_fn), base, specs, how)
        found = observer(batch)
        total = jax.tree.map(jnp.add, total, found) if total else found
    return {path: _mean(path, moments) for path, moments in total.items()}


def _mean(path: str, moments: dict[str, Array]) -> Array:
    square = moments["square"].astype(jnp.float32)
    if not bool(jnp.all(jnp.isfinite(square))):
        raise ValueError(f"The inputs of '{path}' are not finite. Repair the data or the weights.")
    covariance = square / moments["count"][..., None, None, None]
    return covariance[..., 0, :, :] if covariance.shape[-3] == 1 else covariance
