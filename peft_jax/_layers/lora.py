"""LoRA wrappers: layers with an adapter."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer

from peft_jax._layers.adapter_variants import Settings
from peft_jax._layers.lora_adapter import DEFAULT_A_INIT, DEFAULT_B_INIT, check_settings
from peft_jax._layers.lora_rules import LoRARule
from peft_jax._layers.lora_weight import LoRAWeightRule
from peft_jax._surgery import PRODUCTS, LayerWrapper, Rule, layer_type
from peft_jax._trees import DEFAULT, check_adapter_name

__all__ = [
    "LoRAConv",
    "LoRADense",
    "LoRADenseGeneral",
    "LoRAEinsum",
    "LoRAEmbed",
    "LoRAWeight",
]


class _LoRAWrapper(LayerWrapper):
    """Fields and checks that the LoRA wrappers share; see `LoRAAdapter` for their meaning.

    Wrappers around one layer add up, each with an adapter of a name of its own
    (``adapter_name``), which lies at ``lora.<name>``; that of the name ``default`` at ``lora``.

    With ``use_dora`` the layer is ``y = (m / n) * (x·W + scaling * x·a·b) + bias``, where ``n`` is
    the norm of ``W + scaling * a·b`` for each output and ``magnitude`` ``m`` starts as that norm:
    once pretrained weights have come in, set it by `init_lora_weights`. Paper: DoRA,
    https://arxiv.org/abs/2402.09353; ``n`` has no gradient, as in its section 4.3. Dropout acts on
    the ``x`` of ``x·a·b`` alone.
    """

    _: dataclasses.KW_ONLY
    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    deterministic: bool | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    a_init: Initializer = DEFAULT_A_INIT
    b_init: Initializer = DEFAULT_B_INIT
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    adapter_name: str = DEFAULT

    verb: ClassVar[str] = "adapts"
    otherwise: ClassVar[str] = (
        ", or adapt it at the weight by `peft.LoRAWeight(rank=..., wrapped=...)`"
    )

    def __post_init__(self) -> None:
        check_settings(type(self).__name__, self.rank, self.alpha, self.dropout)
        check_adapter_name(type(self).__name__, self.adapter_name)
        super().__post_init__()

    @nn.nowrap
    def settings(self) -> Settings:
        """The shared fields, as data."""
        return Settings(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)}
        )

    @nn.nowrap
    def rule(self) -> Rule:
        return LoRARule(type(self).__name__, self.settings())

    @nn.nowrap
    def __call__(self, *args: Any, deterministic: bool | None = None, **kwargs: Any) -> Any:
        """Calls the wrapped layer and adds the adapter's product.

        Args:
          *args: the layer's arguments.
          deterministic: whether the adapter's dropout is off; goes to the layer too, where it has
            such an argument. None: as the field says.
          **kwargs: the layer's arguments.
        """
        if deterministic is None:
            return self._forward("__call__", args, kwargs)
        _, module = self.unwrap()
        if "deterministic" in inspect.signature(layer_type(module).__call__).parameters:
            kwargs["deterministic"] = deterministic
        return self.clone(
            parent=self.scope, wrapped=self.wrapped, deterministic=deterministic
        )._forward("__call__", args, kwargs)


class LoRADense(_LoRAWrapper):
    """An ``nn.Dense`` with an adapter: ``y = x·W + bias + scaling * x·a·b``.

    ``a (in, r)`` and ``b (r, out)`` lie at ``lora/{a,b}`` beside the kernel. Any layer registered
    with an equation can be wrapped. Paper: LoRA, https://arxiv.org/abs/2106.09685.

    Example::

      layer = peft.LoRADense(rank=3, wrapped=nn.Dense(10))

    Raises:
      ValueError: on a rank below 1, a module that is not registered, a layer of another kind.
    """

    kinds: ClassVar[frozenset[str]] = PRODUCTS


class LoRAEinsum(_LoRAWrapper):
    """An ``nn.Einsum`` with an adapter, for any equation, given to the layer or to the call.

    ``a`` holds the kernel's batch and contracted axes in kernel order, then ``r``; ``b`` holds
    ``r``, then the kernel's other axes; both lie at ``lora/{a,b}`` beside the kernel.

    Raises:
      ValueError: where the equation has no low-rank form, besides what `LoRADense` raises.
    """

    kinds: ClassVar[frozenset[str]] = PRODUCTS


class LoRADenseGeneral(_LoRAWrapper):
    """An ``nn.DenseGeneral`` with an adapter: ``a (*batch, *in, r)``, ``b (*batch, r, *features)``.

    Raises as `LoRADense`.
    """

    kinds: ClassVar[frozenset[str]] = PRODUCTS


class LoRAConv(_LoRAWrapper):
    """An ``nn.Conv`` or ``nn.ConvTranspose`` with an adapter.

    ``a (*window, in / groups, r)``, ``b (r, out)``; strides, dilation, padding and groups are the
    layer's. With a mask, or a transposed kernel, the adapter joins the weight, and dropout raises.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"conv"})


class LoRAEmbed(_LoRAWrapper):
    """An ``nn.Embed`` with an adapter, in lookups and in ``attend``.

    ``a (vocab, r)`` and ``b (r, features)`` lie at ``lora/{a,b}`` beside the embedding.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"embed"})


class LoRAWeight(_LoRAWrapper):
    """Any module with adapters at its weights: its own forward reads ``W + scaling * a·b``.

    For modules whose product cannot be taken apart: an activation inside, an optimized LSTM cell,
    a parameter that is used twice. Each parameter of two or more axes of the module and of the
    modules inside it is adapted. The last axis is the output, the others are inputs, unless the
    module that holds the parameter is registered. Adapters lie beside their parameter at
    ``lora/{a,b}``; where a module holds several, the later ones at ``lora_<parameter>/{a,b}``.

    Attributes:
      params: names (``kernel``) or ends of slashed paths (``hi/kernel``) of the parameters to
        adapt; None: all.

    Raises:
      ValueError: on a name that matches nothing, on dropout, where nothing is there to adapt.
    """

    _: dataclasses.KW_ONLY
    params: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.params, str):
            raise ValueError(
                f"LoRAWeight.params is a list of names, got the string {self.params!r}. Write "
                f"params=[{self.params!r}]."
            )
        if self.params is not None and not self.params:
            raise ValueError("LoRAWeight.params names nothing to adapt. Leave it out to adapt all.")
        super().__post_init__()
        if self.dropout:
            raise ValueError(
                f"Dropout acts on a layer's input, but LoRAWeight joins the weight. Set dropout=0 "
                f"(it is {self.dropout})."
            )
        if self.lora_bias:
            raise ValueError(
                "lora_bias adds to a layer's output, but LoRAWeight joins the weight. Set "
                "lora_bias=False, or wrap the layer by `peft.LoRADense` or its like."
            )

    @nn.nowrap
    def check_layer(self) -> None:
        pass

    @nn.nowrap
    def rule(self) -> Rule:
        params = None if self.params is None else tuple(self.params)
        return LoRAWeightRule(self.settings(), params)
