"""Low-rank adapters of each kind of layer: they compute ``scaling * x·a·b`` and nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from flax.typing import Array, Dtype, Initializer, PaddingLike

from peft_jax._layers.lora_adapter import LoRAAdapter
from peft_jax._numerics import decomposed_change, delta, low_rank_product, norms
from peft_jax._spec import (
    BATCH_IN_B,
    DENSE,
    EMBED,
    as_tuple,
    conv_equation,
    dense_general_equation,
    parse_equation,
)
from peft_jax._surgery import Call, Layer, child_scope, find_layer, layer_type
from peft_jax._trees import DEFAULT, adapter_name, is_adapter

__all__ = [
    "LoRAConvAdapter",
    "LoRADenseAdapter",
    "LoRADenseGeneralAdapter",
    "LoRAEinsumAdapter",
    "LoRAEmbedAdapter",
    "Settings",
    "adapter_fields",
    "weight_change",
]


class LoRADenseAdapter(LoRAAdapter):
    """``scaling * x·a·b`` for a kernel ``(in, out)``: ``a (in, r)``, ``b (r, out)``.

    Attributes:
      features: length of the output axis; None: as long as the input's.
    """

    features: int | None = None

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None) -> Array:
        """Maps ``(..., in)`` to ``(..., out)``."""
        width = inputs.shape[-1]
        shape = (width, width if self.features is None else self.features)
        return self.product(inputs, DENSE, shape, deterministic=deterministic)


class LoRAEinsumAdapter(LoRAAdapter):
    """``scaling * x·a·b`` for a layer ``einsum(einsum_str, x, kernel)``.

    ``a`` holds the kernel's batch and contracted axes in kernel order, then ``r``; ``b`` holds
    ``r``, then the kernel's other axes. For ``BTNH,NHD->BTD``: ``a (N, H, r)``, ``b (r, D)``.

    Attributes:
      einsum_str: ``inputs,kernel->outputs``.
      shape: shape of the kernel.

    Raises:
      ValueError: where the equation has no low-rank form, or does not fit the shape.
    """

    einsum_str: str
    shape: Sequence[int]

    def __post_init__(self) -> None:
        parse_equation(self.einsum_str).sizes(self.shape)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None) -> Array:
        """Maps an input to an output of ``einsum_str``."""
        return self.product(inputs, self.einsum_str, self.shape, deterministic=deterministic)


class LoRADenseGeneralAdapter(LoRAAdapter):
    """``scaling * x·a·b`` for ``nn.DenseGeneral``; batch axes stand in both arrays.

    ``a (*batch, *in, r)``, ``b (*batch, r, *features)``.

    Attributes:
      features: output axes.
      axis: axes of the input that are contracted.
      batch_dims: batch axes of the input.
    """

    features: int | Sequence[int]
    axis: int | Sequence[int] = -1
    batch_dims: int | Sequence[int] = ()

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None) -> Array:
        """Maps the input to an output of ``nn.DenseGeneral``."""
        features = as_tuple(self.features)
        equation = dense_general_equation(inputs.ndim, self.axis, self.batch_dims, len(features))
        layer = parse_equation(equation)
        sizes = dict(zip(layer.inputs, inputs.shape, strict=True))
        shape = tuple(sizes[c] for c in layer.kernel if c in sizes) + features
        return self.product(inputs, equation, shape, deterministic=deterministic, batch_in_b=True)


class LoRAConvAdapter(LoRAAdapter):
    """``scaling * conv(x, a)·b``: ``a (*window, in / groups, r)``, ``b (r, out)``.

    The window is that of the layer; ``b`` acts on each place of the output by itself.

    Attributes:
      features, kernel_size, strides, padding, input_dilation, kernel_dilation,
        feature_group_count: as in ``nn.Conv``.
      transpose: whether the layer is an ``nn.ConvTranspose`` (without ``input_dilation`` and
        groups).
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: PaddingLike = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    transpose: bool = False

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None) -> Array:
        """Maps ``(*batch, *places, in)`` to ``(*batch, *places, out)``."""
        groups = self.feature_group_count
        window = as_tuple(self.kernel_size)
        shape = (*window, inputs.shape[-1] // groups, self.features)
        a, b, _ = self.arrays(conv_equation(len(window)), shape)
        x, a, b = promote_dtype(self.dropped(inputs, deterministic), a, b, dtype=self.dtype)
        b = self.scaled(b)
        hidden = self.seen("hidden", self.hidden(x, a))
        if groups == 1:
            return jnp.einsum("...r,ro->...o", hidden, b, precision=self.precision)
        # Every group of inputs meets the columns of `b` that make the outputs of this group.
        b = b.reshape(self.rank, groups, self.features // groups)
        y = jnp.einsum("...gr,rgo->...go", hidden, b, precision=self.precision)
        return y.reshape(*y.shape[:-2], self.features)

    @nn.nowrap
    def hidden(self, x: Array, a: Array) -> Array:
        """``conv(x, a)``; where there are several groups, with an axis of groups before the rank.

        Every group of inputs goes through all of ``a``.
        """
        groups = self.feature_group_count
        if groups == 1:
            return self._convolve(x, a)
        hidden = self._convolve(x, jnp.tile(a, groups))
        return hidden.reshape(*hidden.shape[:-1], groups, a.shape[-1])

    @nn.nowrap
    def _convolve(self, x: Array, kernel: Array) -> Array:
        fields: dict[str, Any] = {
            "features": kernel.shape[-1],
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "kernel_dilation": self.kernel_dilation,
            "precision": self.precision,
            "dtype": x.dtype,
            "use_bias": False,
            "parent": None,
        }
        if self.transpose:
            layer: nn.Module = nn.ConvTranspose(**fields)
        else:
            layer = nn.Conv(
                **fields,
                input_dilation=self.input_dilation,
                feature_group_count=self.feature_group_count,
            )
        return layer.apply({"params": {"kernel": kernel}}, x)


class LoRAEmbedAdapter(LoRAAdapter):
    """``scaling * a[ids]·b``: ``a (vocab, r)``, ``b (r, features)``.

    Dropout acts on the rows of ``a`` that are looked up, and on the query of `attend`.

    Attributes:
      num_embeddings: length of the vocabulary.
      features: length of an embedding.
    """

    num_embeddings: int
    features: int

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None) -> Array:
        """Maps indices ``(...)`` to ``(..., features)``."""
        a, b, _ = self.arrays(EMBED, (self.num_embeddings, self.features))
        a, b = promote_dtype(a, b, dtype=self.dtype)
        if self.num_embeddings == 1:  # nn.Embed ignores the indices then
            inputs = jnp.zeros_like(inputs)
        rows = self.dropped(jnp.take(a, inputs, axis=0), deterministic)
        rows = self.seen("hidden", rows)
        return jnp.einsum("...r,rf->...f", rows, self.scaled(b), precision=self.precision)

    @nn.compact
    def attend(self, query: Array, deterministic: bool | None = None) -> Array:
        """Maps ``(..., features)`` to ``(..., vocab)``, the product with ``(a·b)ᵀ``."""
        a, b, _ = self.arrays(EMBED, (self.num_embeddings, self.features))
        query, a, b = promote_dtype(self.dropped(query, deterministic), a, b, dtype=self.dtype)
        return low_rank_product(
            query,
            self.scaled(b),
            a,
            "...f,rf->...r",
            "...r,vr->...v",
            precision=self.precision,
            between=functools.partial(self.seen, "attend_hidden"),
        )


class LoRAWeightAdapter(LoRAAdapter):
    """What an adapter adds to a kernel: ``scaling * a·b``, and what DoRA makes of it.

    Attributes:
      equation: the layer's equation.
    """

    equation: str

    @nn.compact
    def __call__(self, weight: Array) -> Array:
        """The change of the kernel, in float32 or wider."""
        layer = parse_equation(self.equation)
        a, b, low_rank = self.arrays(self.equation, weight.shape, batch_in_b=self._batch_in_b)
        change = delta(a, b, low_rank.delta, self.factor)
        if not self.use_dora:
            return change

        def first(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
            total = weight.astype(change.dtype) + change
            return norms(total, layer.kernel, layer.kept).astype(dtype)

        magnitude = self._per_output("magnitude", self.equation, weight.shape, first)
        return decomposed_change(weight, change, magnitude, layer.kernel, layer.kept)


_DELTA = "_peft_jax_delta"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields that every LoRA wrapper shares; see `LoRAAdapter`."""

    rank: int
    alpha: float | None
    dropout: float
    deterministic: bool | None
    dtype: Dtype | None
    param_dtype: Dtype
    a_init: Initializer
    b_init: Initializer
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    adapter_name: str = DEFAULT


# --- The adapter beside a layer of each kind -----------------------------------------------------

Build = Callable[[Call, Layer, tuple[int, ...]], tuple[type[LoRAAdapter], dict[str, Any]]]


def _conv(call: Call, layer: Layer, shape: tuple[int, ...]) -> Any:
    module = call.module
    names = ["features", "kernel_size", "strides", "padding", "kernel_dilation"]
    transpose = issubclass(layer_type(module), nn.ConvTranspose)
    if not transpose:
        names += ["input_dilation", "feature_group_count"]
    fields = {name: getattr(module, name) for name in names}
    return LoRAConvAdapter, {**fields, "transpose": transpose}


_BESIDE: Mapping[str, Build] = {
    "dense": lambda call, layer, shape: (LoRADenseAdapter, {"features": shape[-1]}),
    "einsum": lambda call, layer, shape: (
        LoRAEinsumAdapter,
        {"einsum_str": layer.equation(call), "shape": shape},
    ),
    "dense_general": lambda call, layer, shape: (
        LoRADenseGeneralAdapter,
        {
            "features": call.module.features,
            "axis": call.module.axis,
            "batch_dims": call.module.batch_dims,
        },
    ),
    "conv": _conv,
    "embed": lambda call, layer, shape: (
        LoRAEmbedAdapter,
        {"num_embeddings": shape[0], "features": shape[1]},
    ),
}


def adapter_fields(
    call: Call, layer: Layer, shape: tuple[int, ...]
) -> tuple[type[LoRAAdapter], dict[str, Any]]:
    """The type and the fields of the adapter beside a layer with a weight of this shape."""
    return _BESIDE[layer.kind](call, layer, shape)


def make_adapter(
    cls: Any,
    call: Call,
    param: str,
    stored: Any,
    settings: Settings,
    **fields: Any,
) -> Any:
    """The adapter of one parameter, in the scope of the module that holds the parameter."""
    scope = call.module.scope
    if call.mapped:
        raise ValueError(
            f"The layer at '{call.path}' runs inside `nn.map_variables` (or a wrapper is written "
            "inside nn.WeightNorm or nn.SpectralNorm), where parameters are not those that are "
            "stored, so that fused weights would give other answers. Leave it out of the rule; "
            "for layers under a norm, use `peft.ModuleInterceptor` in place of the wrapper."
        )
    name = adapter_name(call.module, param, settings.adapter_name)
    taken = scope.get_variable("params", name)
    if taken is not None and not is_adapter(name, taken):
        raise ValueError(
            f"The adapter of '{call.path}' is named {name!r}, but the module has a child or a "
            "parameter of this name. Rename the module's own."
        )
    _refuse_unused(call, name, taken, settings)
    names = [field.name for field in dataclasses.fields(settings)]
    shared = {name: getattr(settings, name) for name in names if name != "adapter_name"}
    return cls(
        **shared,
        **fields,
        adapts=param,
        simulated=call.simulated and functools.partial(call.simulated, name),
        kernel_metadata=stored if isinstance(stored, meta.AxisMetadata) else None,
        parent=child_scope(scope, name),
        name=name,
    )


def _refuse_unused(call: Call, name: str, taken: Any, settings: Settings) -> None:
    """Arrays that this rule would pass over in silence."""
    for leaf, field in {"magnitude": "use_dora", "bias": "lora_bias"}.items():
        if isinstance(taken, Mapping) and leaf in taken and not getattr(settings, field):
            raise ValueError(
                f"The adapter at '{call.path}/{name}' has a {leaf}, which takes no part without "
                f"{field}=True. Set it, or give the parameters that were made for this rule."
            )


def refuse_another_equation(call: Call, equation: str, kind: str) -> None:
    """One pair of arrays has one delta, whatever equations the layer is called with."""
    delta = parse_equation(equation).low_rank(batch_in_b=kind in BATCH_IN_B).delta
    before = call.module.__dict__.setdefault(_DELTA, delta)
    if _pattern(before) != _pattern(delta):
        raise ValueError(
            f"The layer at '{call.path}' is called with equations whose changes of the kernel "
            f"differ ('{before}', then '{delta}'): one adapter cannot serve both. Leave it out of "
            "the rule, or give each use a layer of its own."
        )


def _pattern(equation: str) -> tuple[int, ...]:
    """An equation up to the choice of letters."""
    return tuple(equation.index(c) for c in equation)


def weight_change(
    settings: Settings, call: Call, name: str, value: Any, equation: str, kind: str | None
) -> Array:
    """What an adapter adds to a weight, in float32 or wider."""
    layer = find_layer(call.module)
    if layer is not None and layer.param == name and kind is not None:
        refuse_another_equation(call, equation, kind)
    if settings.dropout:
        raise ValueError(
            f"Dropout acts on a layer's input, but the adapter of '{call.path}' joins the weight "
            f"{name!r}. Set dropout=0 (it is {settings.dropout})."
        )
    stored: Any = call.module.get_variable("params", name)
    fields = {"equation": equation, "kind": kind}
    return make_adapter(LoRAWeightAdapter, call, name, stored, settings, **fields)(value)
