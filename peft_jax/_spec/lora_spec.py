"""What arrays do not say of themselves, as plain data: specs of adapters and layers. No jax."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any

from peft_jax._spec.equation import ELLIPSIS, parse_equation

__all__ = [
    "LayerSpec",
    "LoraSpec",
    "contracted_axes",
    "is_number",
]


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What the array of a weight does not say.

    Attributes:
      equation: the layer as ``inputs,weight->outputs``, such as ``...i,io->...o``.
      kind: ``dense``, ``einsum``, ``dense_general``, ``conv`` or ``embed``.
      stack_axes: as in `LoraSpec`: the axes along which the layer is stacked, innermost first, each
        counted in the array that it was added to.
    """

    equation: str
    kind: str = "einsum"
    stack_axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        parse_equation(self.equation)
        axes = self.stack_axes
        if not isinstance(axes, tuple | list) or not all(map(is_integer, axes)):
            raise ValueError(f"LayerSpec.stack_axes = {axes!r} is not a list of integers.")
        if not isinstance(self.kind, str):
            raise ValueError(f"LayerSpec.kind = {self.kind!r} is not a name.")
        object.__setattr__(self, "stack_axes", tuple(map(operator.index, axes)))

    @functools.cached_property
    def axes(self) -> tuple[int, ...]:
        """The axes that the layer contracts, counted from the end of a weight without a stack."""
        return contracted_axes(self.equation)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON. Inverse of `from_dict`."""
        return {**dataclasses.asdict(self), "stack_axes": list(self.stack_axes)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerSpec:
        """Reads what `to_dict` wrote.

        Raises:
          ValueError: on a field that is unknown or missing, or a value that is not allowed.
        """
        return _from_dict(cls, data)


def _from_dict(cls: Any, data: Mapping[str, Any]) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__}.from_dict takes a dict, got {type(data).__name__}.")
    fields = dataclasses.fields(cls)
    unknown = sorted(set(data) - {field.name for field in fields})
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    missing = sorted(required - set(data))
    if unknown or missing:
        raise ValueError(
            f"A {cls.__name__} has the fields {sorted(field.name for field in fields)}; unknown "
            f"here: {unknown}, missing: {missing}."
        )
    return cls(**data)


def contracted_axes(equation: str) -> tuple[int, ...]:
    """Positions in the kernel, counted from the end, of the axes that the layer sums over."""
    layer = parse_equation(equation)
    return tuple(layer.kernel.index(c) - len(layer.kernel) for c in layer.contracted)


VARIANTS = ("lora", "dora", "tokens")


def is_integer(value: Any) -> bool:
    """Whether it is a whole number, of Python or of another library."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """What the arrays of one adapter do not say.

    Attributes:
      param: name of the adapted parameter, beside the adapter; None where the adapter stands
        alone (a ``LoRADenseAdapter`` without a layer).
      equation: equation of the kernel's change, ``ir,ro->io``; with a leading ``...`` in every
        operand for layers stacked by ``nn.scan`` or ``nn.vmap``.
      rank: length of the rank axis.
      scaling: factor of ``a·b``: ``alpha / rank``, ``alpha / sqrt(rank)`` for rsLoRA, or 1 where
        alpha is None.
      alpha: as given to the layer.
      variant: ``lora``; ``dora``, with a ``magnitude``, one number for each output; or ``tokens``:
        no ``a`` and ``b``, but the ``rows`` of an embedding that are trained in place of its own.
      stack_axes: the axes along which the layer is stacked, innermost first, each counted in the
        array that it was added to, in ``a``, ``b`` and the kernel alike. Empty with a leading
        ``...`` means axis 0.
      outputs: the letters of the kernel's axes that stand in the layer's output, in that order:
        the axes of ``magnitude`` and ``bias``. None: those that ``a`` lacks, in kernel order.
      bias: name of the parameter that the adapter's ``bias`` joins, beside the adapter: the
        layer's own bias, or ``param`` itself for an embedding. None: the adapter has no bias.
      tokens: indices of the rows of the variant ``tokens``.
      kind: kind of the layer, as in `LayerSpec`; None where nothing is known of it. It does not
        change what the arrays mean, and so is left out of ``==``.
      shape: of the adapted parameter, stack axes and all; None where nothing is known of it. Left
        out of ``==`` as well.
    """

    param: str | None
    equation: str
    rank: int
    scaling: float = 1.0
    alpha: float | None = None
    variant: str = "lora"
    stack_axes: tuple[int, ...] = ()
    outputs: str | None = None
    bias: str | None = None
    tokens: tuple[int, ...] = ()
    kind: str | None = dataclasses.field(default=None, compare=False)
    shape: tuple[int, ...] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        axes = self.stack_axes
        allowed = {
            "rank": is_integer(self.rank) and self.rank >= 1,
            "scaling": is_number(self.scaling),
            "alpha": self.alpha is None or is_number(self.alpha),
            **{
                name: getattr(self, name) is None or isinstance(getattr(self, name), str)
                for name in ("param", "outputs", "bias", "kind")
            },
            "variant": self.variant in VARIANTS,
            "tokens": isinstance(self.tokens, tuple | list)
            and all(map(is_integer, self.tokens))
            and bool(self.tokens) == (self.variant == "tokens"),
            "stack_axes": isinstance(axes, tuple | list) and all(map(is_integer, axes)),
            "shape": self.shape is None
            or (isinstance(self.shape, tuple | list) and all(map(is_integer, self.shape))),
        }
        for field, is_allowed in allowed.items():
            if not is_allowed:
                raise ValueError(
                    f"LoraSpec.{field} = {getattr(self, field)!r} is not allowed: rank is a "
                    "positive integer, scaling a finite number, alpha too (or None), param, "
                    f"outputs, bias and kind a name or None, variant one of {VARIANTS}, "
                    "stack_axes integers, tokens integers (of the variant 'tokens' alone), shape "
                    "integers or None."
                )
        object.__setattr__(self, "rank", operator.index(self.rank))
        object.__setattr__(self, "scaling", float(self.scaling))
        if self.alpha is not None and not isinstance(self.alpha, int):
            object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "stack_axes", tuple(map(operator.index, axes)))
        object.__setattr__(self, "tokens", tuple(map(operator.index, self.tokens)))
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(map(operator.index, self.shape)))
        _, _, kernel = self.letters
        if self.outputs is not None and not set(self.outputs) <= set(kernel):
            raise ValueError(
                f"LoraSpec.outputs = {self.outputs!r} names axes that the kernel {kernel!r} lacks."
            )
        if axes and ELLIPSIS not in self.equation:
            raise ValueError(
                f"LoraSpec.stack_axes = {self.stack_axes} goes with an equation of stacked layers, "
                f"such as '...ir,...ro->...io', not {self.equation!r}."
            )

    @functools.cached_property
    def letters(self) -> tuple[str, str, str]:
        """Letters of ``a``, ``b`` and the kernel, without the ellipsis."""
        try:
            operands, kernel = self.equation.replace(" ", "").split("->")
            terms = (*operands.split(","), kernel)
            stacked = [term.startswith(ELLIPSIS) for term in terms]
            a, b, kernel = (term.removeprefix(ELLIPSIS) for term in terms)
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"LoraSpec.equation = {self.equation!r} is not of the form 'ir,ro->io'."
            ) from error
        shared = (set(a) & set(b)) - set(kernel)
        repeats = any(len(set(term)) != len(term) for term in (a, b, kernel))
        fits = len(shared) == 1 and set(kernel) == (set(a) | set(b)) - shared
        if repeats or not fits or len(set(stacked)) != 1 or not (a + b + kernel).isalpha():
            raise ValueError(
                f"LoraSpec.equation = {self.equation!r} is not of the form 'ir,ro->io': a and b "
                "share the rank alone, all other letters make up the kernel, none stands twice in "
                "a term, and a leading '...' stands in every term or in none."
            )
        return a, b, kernel

    @functools.cached_property
    def output_letters(self) -> str:
        """Letters of the axes of ``magnitude`` and ``bias``."""
        a, _, kernel = self.letters
        return "".join(c for c in kernel if c not in a) if self.outputs is None else self.outputs

    @functools.cached_property
    def matrix_axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Positions in the kernel of its batch, input and output axes (stack axes left out).

        A batch axis that stands in ``a`` alone counts as an input: ``b`` is shared along it.
        """
        a, b, kernel = self.letters
        batch = tuple(i for i, c in enumerate(kernel) if c in a and c in b)
        inputs = tuple(i for i, c in enumerate(kernel) if c in a and c not in b)
        outputs = tuple(i for i, c in enumerate(kernel) if c not in a)
        return batch, inputs, outputs

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON. Inverse of `from_dict`."""
        data = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoraSpec:
        """Reads what `to_dict` wrote.

        Raises:
          ValueError: on a field that is unknown or missing, or a value that is not allowed.
        """
        return _from_dict(cls, data)
