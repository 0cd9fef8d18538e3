"""What a model is made of: the specs of its adapters, found by tracing it abstractly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from peft_jax._spec_box import traced_specs
from peft_jax._specs import LoraSpec


def lora_specs(
    model: nn.Module,
    *inputs: Any,
    method: Callable[..., Any] | str | None = None,
    rngs: Any = None,
    **kwargs: Any,
) -> dict[str, LoraSpec]:
    """The spec of every adapter that runs when the model is called on these inputs.

    The model is initialized abstractly (``jax.eval_shape``): no array is made. Adapters count
    whether they are written into the model or put there by an active interceptor.

    Example::

      with peft.ModuleInterceptor(rule):
        specs = peft.lora_specs(model, jax.ShapeDtypeStruct((1, 128), "int32"), train=False)

    Args:
      model: a Linen module, unbound.
      *inputs: arguments of the method. Arrays and ``jax.ShapeDtypeStruct`` are abstract; anything
        else passes as it is.
      method: the method to run (default ``__call__``).
      rngs: as for ``model.init``; default: a key for "params".
      **kwargs: further arguments of the method, treated as ``inputs``.

    Returns:
      From the slashed path of each adapter (``block_0/dense/lora``) to its `LoraSpec`.

    Raises:
      ValueError: where ``model`` is no unbound Linen module.
    """
    if not isinstance(model, nn.Module) or model.scope is not None:
        raise ValueError(
            f"lora_specs takes an unbound Linen module, got {type(model).__name__}"
            f"{' that is bound' if isinstance(model, nn.Module) else ''}. Give the model itself, "
            "not its parameters, nor a module inside `apply`."
        )
    if rngs is None:
        rngs = {"params": jax.eval_shape(lambda: jax.random.key(0))}

    def init(rngs: Any, inputs: Any, kwargs: Any) -> Any:
        return model.init(rngs, *inputs, method=method, **kwargs).get("params", {})

    return traced_specs(init, rngs, inputs, kwargs)
