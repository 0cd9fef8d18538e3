"""The base of all adapters: their parameters, their spec, their low-rank product."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from flax.typing import Array, Dtype, Initializer, PrecisionLike

from peft_jax._numerics import Weight, adapted_norms, gains, low_rank_product
from peft_jax._spec import BATCH_IN_B, Equation, LoraSpec, LowRank, parse_equation
from peft_jax._surgery import Untouched, boxed

DEFAULT_A_INIT = nn.initializers.kaiming_uniform()
DEFAULT_B_INIT = nn.initializers.zeros_init()


def check_settings(owner: str, rank: Any, alpha: Any, dropout: Any) -> None:
    """Refuses a rank, alpha or dropout rate that no adapter has.

    Raises:
      ValueError: with the owner's name and the value.
    """
    if isinstance(rank, bool) or not hasattr(rank, "__index__") or rank < 1:
        raise ValueError(f"{owner}.rank is a positive integer, got {rank!r}.")
    is_number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)
    if alpha is not None and not (is_number and math.isfinite(alpha)):
        raise ValueError(
            f"{owner}.alpha is a finite number, or None for a scaling of 1, got {alpha!r}."
        )
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{owner}.dropout is a rate of at least 0 and below 1, got {dropout!r}.")


class LoRAAdapter(nn.Module, Untouched):
    """Base of the adapters.

    ``a_init`` and ``b_init`` are called with the matrix inside each array, ``(in, rank)`` and
    ``(rank, out)``, so that fan-in counts the input axes and never the batch axes; each batch index
    gets a draw of its own.

    Attributes:
      rank: length of the inner axis; at least 1.
      alpha: the scaling is ``alpha / rank``; None: 1.
      dropout: rate of the dropout on ``x``, drawn from the "dropout" rng.
      deterministic: whether dropout is off; None: off where no "dropout" rng is given.
      dtype: dtype of the computation (None: that of ``x``, ``a`` and ``b`` together).
      param_dtype: dtype of ``a`` and ``b``.
      a_init: initializer of ``a`` (Kaiming-uniform over the input axes).
      b_init: initializer of ``b`` (zeros, so that the adapter changes nothing at the start).
      use_rslora: whether the scaling is ``alpha / sqrt(rank)`` (rsLoRA,
        https://arxiv.org/abs/2312.03732).
      use_dora: whether there is a ``magnitude``, for `gain`.
      lora_bias: whether there is a ``bias``, for `shift`.
      precision: as in ``jax.lax.dot_general``.
      adapts: name of the adapted parameter, for the spec; None where the adapter stands alone.
      kind: kind of the adapted layer, for the spec.
      simulated: what simulation makes of ``a``, ``b``, ``magnitude``, ``bias``, the intermediate
        ``hidden`` (``x·a``) and the ``scaling``, called as `seen` is; None: nothing.
      kernel_metadata: the box (``nn.Partitioned``, ...) of the kernel; ``a``, ``b``, ``magnitude``
        and ``bias`` are partitioned along the axes that they share with it.
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
    precision: PrecisionLike = None
    adapts: str | None = None
    kind: str | None = None
    simulated: Callable[..., Array] | None = None
    kernel_metadata: Any = None

    def __post_init__(self) -> None:
        check_settings(type(self).__name__, self.rank, self.alpha, self.dropout)
        if self.adapts is None and (self.use_dora or self.lora_bias):
            raise ValueError(
                f"{type(self).__name__} stands alone, without the weight and the output that "
                "use_dora and lora_bias are about. Use the wrapper around a layer, such as "
                "`peft.LoRADense`."
            )
        super().__post_init__()

    @property
    def scaling(self) -> float:
        """Factor of the product."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @nn.nowrap
    def spec(self, layer: Equation, low_rank: LowRank, shape: Sequence[int]) -> LoraSpec:
        """What the arrays do not say, for a kernel of this shape."""
        default = "".join(c for c in layer.kernel if c not in low_rank.a)
        bias = self.adapts if self.kind == "embed" else "bias"
        return LoraSpec(
            self.adapts,
            low_rank.delta,
            self.rank,
            self.scaling,
            self.alpha,
            variant="dora" if self.use_dora else "lora",
            outputs=None if layer.kept == default else layer.kept,
            bias=bias if self.lora_bias else None,
            kind=self.kind,
            shape=tuple(shape),
        )

    @nn.nowrap
    def arrays(
        self, equation: str, shape: Sequence[int], *, batch_in_b: bool = False
    ) -> tuple[Array, Array, LowRank]:
        """``a``, ``b`` and their equations, for a layer of this equation and kernel shape."""
        layer = parse_equation(equation)
        low_rank = layer.low_rank(batch_in_b=batch_in_b)
        shapes = low_rank.shapes(layer.sizes(shape), self.rank)
        spec = self.spec(layer, low_rank, shape)
        a_init = _through_matrices(self.a_init, low_rank.a, low_rank)
        b_init = _through_matrices(self.b_init, low_rank.b, low_rank)
        a = self._array("a", low_rank.a, shapes[0], a_init, layer, spec)
        b = self._array("b", low_rank.b, shapes[1], b_init, layer, spec)
        shared = {*low_rank.b, low_rank.rank}
        inputs = [i - len(low_rank.a) for i, c in enumerate(low_rank.a) if c not in shared]
        rank = low_rank.b.index(low_rank.rank) - len(low_rank.b)
        return self.seen("a", a, inputs), self.seen("b", b, (rank,)), low_rank

    @nn.nowrap
    def _array(
        self,
        name: str,
        letters: str,
        shape: tuple[int, ...],
        init: Initializer,
        layer: Equation,
        spec: LoraSpec,
    ) -> Array:
        """One of the adapter's parameters, whose axes are named by letters."""
        stored = self._stored(name, shape)
        if stored is not None:  # not by `self.param`, which would trace the initializer
            return stored
        init = boxed(init, letters, layer.kernel, self.kernel_metadata, spec)
        return self.param(name, init, shape, self.param_dtype)

    @nn.nowrap
    def _per_output(self, name: str, equation: str, shape: Sequence[int], init: Any) -> Array:
        """A parameter with one number for each output of the layer."""
        layer = parse_equation(equation)
        spec = self.spec(layer, layer.low_rank(batch_in_b=self._batch_in_b), shape)
        sizes = layer.sizes(shape)
        lengths = tuple(sizes[c] for c in layer.kept)
        return self.seen(name, self._array(name, layer.kept, lengths, init, layer, spec), ())

    @nn.nowrap
    def seen(self, name: str, value: Array, contracted: Sequence[int] | None = None) -> Array:
        """An array as the adapter computes with it.

        Args:
          name: of the array.
          value: as it is stored, or was computed.
          contracted: axes, counted from the end, that the adapter sums over; None: it is no
            parameter.
        """
        if self.simulated is None:
            return value
        return self.simulated(name, value, None if contracted is None else tuple(contracted))

    @property
    def factor(self) -> float | Array:
        """The scaling as the adapter computes with it."""
        if self.simulated is None:
            return self.scaling
        return self.seen("scaling", np.float32(self.scaling))

    @property
    def _batch_in_b(self) -> bool:
        """Whether batch axes stand in ``b`` too."""
        return self.kind in BATCH_IN_B

    @nn.compact
    def gain(self, weight: Array | Weight, equation: str) -> Array:
        """``m / ||W + scaling * a·b||``, one number for each output of the layer, in float32.

        ``magnitude`` starts as that norm.

        Args:
          weight: ``W``.
          equation: of the layer.
        """
        a, b, low_rank = self.arrays(equation, weight.shape, batch_in_b=self._batch_in_b)
        kept = parse_equation(equation).kept
        n = adapted_norms(weight, a, b, low_rank.delta, self.factor, kept)

        def first(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
            return n.astype(dtype)

        return gains(self._per_output("magnitude", equation, weight.shape, first), n)

    @nn.compact
    def shift(self, equation: str, shape: Sequence[int]) -> Array:
        """``scaling * bias``, one number for each output of the layer, zeros at the start."""
        return self.scaled(self._per_output("bias", equation, shape, nn.initializers.zeros))

    @nn.nowrap
    def product(
        self,
        x: Array,
        equation: str,
        shape: Sequence[int],
        *,
        deterministic: bool | None = None,
        batch_in_b: bool = False,
    ) -> Array:
        """``scaling * x·a·b`` for a layer ``einsum(equation, x, kernel)``."""
        a, b, low_rank = self.arrays(equation, shape, batch_in_b=batch_in_b)
        x, a, b = promote_dtype(self.dropped(x, deterministic), a, b, dtype=self.dtype)
        b = self.scaled(b)  # smaller than the product
        return low_rank_product(
            x,
            a,
            b,
            low_rank.first,
            low_rank.second,
            precision=self.precision,
            between=functools.partial(self.seen, "hidden"),
        )

    @nn.nowrap
    def dropped(self, x: Array, deterministic: bool | None) -> Array:
        """``x`` after dropout."""
        if self.dropout == 0.0:
            return x
        if deterministic is None:
            deterministic = self.deterministic
        if deterministic is None:
            deterministic = not self.has_rng("dropout")
        return nn.Dropout(self.dropout, deterministic=deterministic, name="dropout")(x)

    @nn.nowrap
    def scaled(self, array: Array) -> Array:
        """The array times the scaling, in its own dtype."""
        factor = self.factor
        if isinstance(factor, float) and factor == 1.0:
            return array
        return array * jnp.asarray(factor, array.dtype)

    @nn.nowrap
    def _stored(self, name: str, shape: tuple[int, ...]) -> Array | None:
        """An array of the parameters, if it is there and has the shape."""
        assert self.scope is not None
        stored, path = meta.unbox(self.get_variable("params", name)), "/".join(self.scope.path)
        if stored is None and not (self.is_mutable_collection("params") and self.has_rng("params")):
            raise ValueError(
                f"The parameters hold no adapter at '{path}', where a rule puts one. Initialize "
                "the model under the same rules, or add the adapters by `peft.merge_params`."
            )
        if stored is not None and jnp.shape(stored) != shape:
            raise ValueError(
                f"The adapter at '{path}' has an array {name!r} of shape "
                f"{jnp.shape(stored)}; rank {self.rank} on this layer needs {shape}. Use the rank "
                "and the layer that the parameters were made for."
            )
        return stored


def _through_matrices(init: Initializer, letters: str, low_rank: LowRank) -> Initializer:
    """Draws an array through the matrices inside it, one for each index of its batch axes."""
    batch = [i for i, c in enumerate(letters) if c in low_rank.batch]
    order = [*batch, *(i for i in range(len(letters)) if i not in batch)]
    is_a = letters == low_rank.a

    def draw(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Any:
        ordered = [shape[i] for i in order]
        draws, rest = math.prod(ordered[: len(batch)]), ordered[len(batch) :]
        matrix = (math.prod(rest[:-1]), rest[-1]) if is_a else (rest[0], math.prod(rest[1:]))
        if batch:
            value = jax.vmap(lambda key: init(key, matrix, dtype))(jax.random.split(key, draws))
        else:
            value = init(key, matrix, dtype)
        if matrix == shape:
            return value
        array = jnp.reshape(meta.unbox(value), ordered)
        array = jnp.transpose(array, [order.index(i) for i in range(len(order))])
        return meta.replace_boxed(value, array)

    return draw
