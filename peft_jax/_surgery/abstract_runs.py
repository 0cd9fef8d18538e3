"""What a model is made of: the specs of its layers and adapters, found by tracing it abstractly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import linen as nn
from flax.core import meta

from peft_jax._spec import LayerSpec, LoraSpec
from peft_jax._surgery.interceptor import ModuleInterceptor
from peft_jax._surgery.layer_kinds import find_layer
from peft_jax._surgery.rules import STORAGE, Call, Init, Rule
from peft_jax._surgery.spec_boxes import SpecBox, traced_boxes, traced_specs
from peft_jax._surgery.wrapper import Wrapper

__all__ = [
    "layer_specs",
    "lora_specs",
    "model_init",
    "recorded_boxes",
]


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
    init, given = model_init(model, "lora_specs", method, rngs)
    return traced_specs(init, given, inputs, kwargs)


def layer_specs(
    model: nn.Module,
    *inputs: Any,
    method: Callable[..., Any] | str | None = None,
    rngs: Any = None,
    **kwargs: Any,
) -> dict[str, LayerSpec]:
    """The spec of every weight whose layer is registered and runs when the model is called so.

    As `lora_specs`, which see for the arguments: the model is initialized abstractly. Layers are
    those of Flax (Dense, Einsum, DenseGeneral, Conv, Embed) and those given to `register_layer`;
    a layer under ``nn.WeightNorm`` or ``nn.SpectralNorm``, whose weight is not the one that is
    stored, is left out.

    Example::

      specs = peft.layer_specs(model, jax.ShapeDtypeStruct((1, 128), "int32"))
      small = peft.quantize_checkpoint(params, method="int4", specs=specs)

    Returns:
      From the slashed path of each weight (``block_0/dense/kernel``) to its `LayerSpec`.

    Raises:
      ValueError: where ``model`` is no unbound Linen module.
    """
    boxes = recorded_boxes(model, "layer_specs", *inputs, method=method, rngs=rngs, **kwargs)
    return {
        path: dataclasses.replace(box.spec, stack_axes=box.stack_axes)
        for path, box in boxes.items()
        if isinstance(box.spec, LayerSpec)
    }


def recorded_boxes(
    model: nn.Module, caller: str, *inputs: Any, method: Any, rngs: Any, **kwargs: Any
) -> dict[str, SpecBox]:
    """Weights of registered layers and arrays of adapters, in boxes with their specs."""
    init, given = model_init(model, caller, method, rngs)
    with ModuleInterceptor(_recorded):
        return traced_boxes(init, given, inputs, kwargs)


def model_init(
    model: nn.Module, caller: str, method: Any, rngs: Any
) -> tuple[Callable[..., Any], Any]:
    """What makes a model's parameters from keys, arguments and named arguments; and the keys."""
    if not isinstance(model, nn.Module) or model.scope is not None:
        raise ValueError(
            f"{caller} takes an unbound Linen module, got {type(model).__name__}"
            f"{' that is bound' if isinstance(model, nn.Module) else ''}. Give the model itself, "
            "not its parameters, nor a module inside `apply`."
        )

    def init(rngs: Any, inputs: Any, kwargs: Any) -> Any:
        return model.init(rngs, *inputs, method=method, **kwargs).get("params", {})

    if rngs is None:
        rngs = {"params": jax.eval_shape(lambda: jax.random.key(0))}
    return init, rngs


@dataclasses.dataclass(frozen=True)
class _RecordingRule(Rule):
    """Labels the weight of a layer with the layer's spec."""

    order: ClassVar[int] = STORAGE
    name = "layer spec"

    def at_weight(self, call: Call) -> bool:
        return True

    def read(self, call: Call, name: str, make: Init, read: Callable[[Init], Any]) -> Any:
        layer = find_layer(call.module)
        if layer is None or name != layer.param or call.mapped:
            return read(make)
        spec = LayerSpec(layer.equation(call), layer.kind)
        return read(lambda key: SpecBox(meta.unbox(make(key)), spec))


class _Recorded(Wrapper):
    @nn.nowrap
    def rule(self) -> Rule:
        return _RecordingRule()


def _recorded(module: nn.Module) -> nn.Module:
    return module if find_layer(module) is None else _Recorded(wrapped=module)
