"""How the arrays of one layer lie here, and how its tensors lie in Hugging Face's files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from peft_jax._numerics import MatrixView, rank_letter
from peft_jax._spec import LayerSpec, LoraSpec, parse_equation

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """One array of a layer, and the tensor that stands for it.

    Attributes:
      leaf: name of the array in the adapter; of a weight, its parameter's.
      suffix: how the tensor's name ends.
      ours: a letter for each axis of the array.
      theirs: for each axis of the tensor the letters that are joined in it; none for length one.
      sizes: length of each letter.
    """

    leaf: str
    suffix: str
    ours: str
    theirs: tuple[str, ...]
    sizes: Mapping[str, int]

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Of the array."""
        return tuple(self.sizes[c] for c in self.ours)

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(math.prod(self.sizes[c] for c in group) for group in self.theirs)

    def to_theirs(self, array: Array) -> Array:
        """The tensor of an array. Inverse of `to_ours`."""
        order = [self.ours.index(c) for c in "".join(self.theirs)]
        return array.transpose(order).reshape(self.their_shape)

    def to_ours(self, tensor: Array) -> Array:
        """The array of a tensor."""
        letters = "".join(self.theirs)
        split = tensor.reshape([self.sizes[c] for c in letters])
        return split.transpose([letters.index(c) for c in self.ours])


@dataclasses.dataclass(frozen=True)
class Stack:
    """The axes along which layers are stacked in one array.

    Attributes:
      lengths: of the axes, outermost first.
      axes: as in `LoraSpec.stack_axes`, one for each length.
    """

    lengths: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    @property
    def indices(self) -> Iterator[tuple[int, ...]]:
        """Of the layers, in order."""
        return np.ndindex(self.lengths)

    def _order(self, ndim: int) -> list[int]:
        order = list(range(ndim))
        for front, axis in enumerate(reversed(self.axes)):
            order.insert(front, order.pop(front + axis % (ndim - front)))
        return order

    def first(self, array: Array) -> Array:
        """The array with the stack's axes in front."""
        return array.transpose(self._order(array.ndim))

    def back(self, array: Array) -> Array:
        """The array with the stack's axes at their places again. Inverse of `first`."""
        return array.transpose(np.argsort(self._order(array.ndim)))


def stack_and_sizes(
    spec: LoraSpec, arrays: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[Stack, dict[str, int]]:
    """The stack of an adapter's layer, and the length of each of its axes, the rank's too.

    Args:
      spec: of the adapter.
      arrays: shapes of the adapter's arrays, by which a spec without a shape is completed.

    Raises:
      ValueError: where the spec does not say its shape and arrays do not either.
    """
    rank = {rank_letter(spec): spec.rank}
    if spec.shape is not None:
        view = MatrixView.of(spec, spec.shape)
        return Stack(view.stack, view.stack_axes), view.sizes | rank
    if spec.variant == "tokens" and arrays and len(arrays["rows"]) == 2:
        return Stack(), {spec.letters[2][-1]: arrays["rows"][1]}
    if not arrays or not {"a", "b"} <= set(arrays):
        raise ValueError("its spec says no shape; take specs from `peft.lora_specs`")
    letters = dict(zip(("a", "b"), spec.letters, strict=False))
    depth = len(arrays["a"]) - len(letters["a"])
    fits = depth == len(spec.stack_axes) if spec.stack_axes else depth >= 0
    if not fits or (depth and not spec.equation.startswith("...")):
        raise ValueError(f"a of shape {arrays['a']} does not fit the equation {spec.equation!r}")
    stack = Stack((), spec.stack_axes or (0,) * depth)
    sizes: dict[str, int] = {}
    for leaf in ("b", "a"):
        if len(arrays[leaf]) != depth + len(letters[leaf]):
            raise ValueError(f"{leaf} does not fit the equation {spec.equation!r}")
        shape = stack.first(np.broadcast_to(np.empty(()), arrays[leaf])).shape
        stack = Stack(shape[:depth], stack.axes) if leaf == "a" else stack
        sizes |= zip(letters[leaf], shape[depth:], strict=True)
    return stack, sizes | rank


# --- Adapters ------------------------------------------------------------------------------------

_Rows = list[tuple[str, str, str, tuple[str, ...]]]
_Form = Callable[[LoraSpec, Mapping[str, int]], list[TensorLayout]]


def adapter_layouts(
    spec: LoraSpec, sizes: Mapping[str, int], *, by_parameter: bool
) -> list[TensorLayout]:
    """The tensors of one layer's adapter.

    Args:
      spec: of the adapter.
      sizes: length of each axis, from `stack_and_sizes`.
      by_parameter: whether the other side adapts the parameter rather than its module.

    Raises:
      ValueError: where Hugging Face's layout has no form for it.
    """
    if spec.variant == "tokens":
        letters, known = "tf", {"t": len(spec.tokens), "f": sizes[spec.letters[2][-1]]}
        suffix = "token_adapter.trainable_tokens_delta"
        return [TensorLayout("rows", suffix, letters, ("t", "f"), known)]
    kind = spec.kind or ""
    bare = by_parameter and kind in ("embed", "experts")
    form = _experts if bare else _FORMS.get(kind, _linear)
    return form(spec, sizes)


def _outputs(spec: LoraSpec, *, one: bool = False) -> str:
    """Letters of the axes that the layer puts out, in the order of its output."""
    a, b, kernel = spec.letters
    batch = [c for c in kernel if (c in a and c in b) or (c in a and c in spec.output_letters)]
    if batch:
        raise ValueError(
            f"its equation {spec.equation!r} has a matrix for each index of {''.join(batch)!r}, "
            "and a linear layer has one. Save it as it is, by orbax"
        )
    rest = [c for c in kernel if c not in a and c not in spec.output_letters]
    if rest or (one and len(spec.output_letters) != 1):
        raise ValueError(
            f"its equation {spec.equation!r} is not that of one matrix. Save it as it is, by orbax"
        )
    return spec.output_letters


def _per_output(spec: LoraSpec, outputs: str, theirs: tuple[str, ...]) -> _Rows:
    rows: _Rows = []
    if spec.variant == "dora":
        rows.append(("magnitude", "lora_magnitude_vector", outputs, theirs))
    if spec.bias is not None:
        rows.append(("bias", "lora_B.bias", outputs, (outputs,)))
    return rows


def _linear(spec: LoraSpec, sizes: Mapping[str, int]) -> list[TensorLayout]:
    """``lora_A (r, in)`` and ``lora_B (out, r)``, the axes of a group joined."""
    (a, b, kernel), r, outputs = spec.letters, rank_letter(spec), _outputs(spec)
    inputs = "".join(c for c in kernel if c in a)
    rows: _Rows = [
        ("a", "lora_A.weight", a, (r, inputs)),
        ("b", "lora_B.weight", b, (outputs, r)),
        *_per_output(spec, outputs, (outputs,)),
    ]
    return [TensorLayout(*row, sizes) for row in rows]


def _conv(spec: LoraSpec, sizes: Mapping[str, int]) -> list[TensorLayout]:
    """``lora_A (r, in, *window)`` and ``lora_B (out, r, 1, ...)``."""
    (a, b, kernel), r, outputs = spec.letters, rank_letter(spec), _outputs(spec, one=True)
    *window, channels = (c for c in kernel if c in a)
    ones = ("",) * len(window)
    rows: _Rows = [
        ("a", "lora_A.weight", a, (r, channels, *window)),
        ("b", "lora_B.weight", b, (outputs, r, *ones)),
        *_per_output(spec, outputs, ("", outputs, *ones)),
    ]
    return [TensorLayout(*row, sizes) for row in rows]


def _embed(spec: LoraSpec, sizes: Mapping[str, int]) -> list[TensorLayout]:
    """``lora_embedding_A (r, vocabulary)`` and ``lora_embedding_B (features, r)``."""
    (a, b, kernel), r, outputs = spec.letters, rank_letter(spec), _outputs(spec)
    if spec.bias is not None:
        raise ValueError("embeddings have no lora_bias there. Save it as it is, by orbax")
    rows: _Rows = [
        ("a", "lora_embedding_A", a, (r, "".join(c for c in kernel if c in a))),
        ("b", "lora_embedding_B", b, (outputs, r)),
        *_per_output(spec, outputs, (outputs,)),
    ]
    return [TensorLayout(*row, sizes) for row in rows]


def _experts(spec: LoraSpec, sizes: Mapping[str, int]) -> list[TensorLayout]:
    """``lora_A (experts * r, in)`` and ``lora_B (out, r * experts)``.

    Of a parameter with two axes: ``lora_A (r, second)`` and ``lora_B (first, r)``.
    """
    (a, b, kernel), r = spec.letters, rank_letter(spec)
    if spec.variant != "lora" or spec.bias is not None:
        raise ValueError("a parameter has neither use_dora nor lora_bias there. Save it by orbax")
    experts = "".join(c for c in kernel if c in a and c in b)
    inputs, outputs = ("".join(c for c in term if c not in r + experts) for term in (a, b))
    if len(experts) > 1 or len(inputs) != 1 or len(outputs) != 1:
        raise ValueError(
            f"its equation {spec.equation!r} has {len(kernel)} axes, and parameters of two or "
            "three are adapted there. Save it by orbax"
        )
    rows: _Rows
    if experts:
        rows = [
            ("a", "lora_A.weight", a, (experts + r, inputs)),
            ("b", "lora_B.weight", b, (outputs, r + experts)),
        ]
    else:
        rows = [("b", "lora_A.weight", b, (r, outputs)), ("a", "lora_B.weight", a, (inputs, r))]
    return [TensorLayout(*row, sizes) for row in rows]


_FORMS: Mapping[str, _Form] = {"conv": _conv, "embed": _embed, "experts": _experts}


# --- Whole weights -------------------------------------------------------------------------------

WEIGHTS = ("kernel", "embedding", "scale", "weight")  # what is ``weight`` there


def weight_layout(
    leaf: str, shape: Sequence[int], spec: LayerSpec | LoraSpec | None
) -> tuple[Stack, TensorLayout]:
    """The tensor of a whole parameter, which lies here in a shape without stack axes in front.

    Args:
      leaf: name of the parameter.
      shape: of the parameter; without a `LayerSpec`, of one layer.
      spec: of the weight, or of the adapter beside it; None: of two axes a ``kernel`` is ``(in,
        out)``, and all else lies there as it lies here.

    Raises:
      ValueError: where there is no tensor of it.
    """
    shape, suffix = tuple(shape), "weight" if leaf in WEIGHTS else leaf
    if spec is None:
        if leaf == "kernel" and len(shape) > 2:
            raise ValueError(
                f"a kernel of shape {shape} may be of a convolution or of several heads. Give its "
                "`LayerSpec` too (`specs={**peft.lora_specs(...), **peft.layer_specs(...)}`)"
            )
        letters = "".join(map(chr, range(ord("a"), ord("a") + len(shape))))
        known = dict(zip(letters, shape, strict=True))
        groups = tuple(letters[::-1] if leaf == "kernel" else letters)
        if leaf == "bias" and letters:  # one number for each output, however many axes those have
            groups = (letters,)
        return Stack(), TensorLayout(leaf, suffix, letters, groups, known)
    if isinstance(spec, LoraSpec):
        a, _, kernel = spec.letters
        inputs, outputs = "".join(c for c in kernel if c in a), _outputs(spec)
    else:
        layer = parse_equation(spec.equation)
        kernel, inputs, outputs = layer.kernel, layer.contracted, layer.kept
        if layer.batch or set(inputs + outputs) != set(kernel):
            raise ValueError(f"its equation {spec.equation!r} is not that of one matrix")
    depth = len(shape) - len(kernel)
    if depth < 0 or (spec.stack_axes and depth != len(spec.stack_axes)):
        raise ValueError(f"its shape {shape} does not fit its equation {spec.equation!r}")
    axes = spec.stack_axes or (0,) * depth
    moved = Stack((), axes).first(np.broadcast_to(np.empty(()), shape)).shape
    sizes = dict(zip(kernel, moved[depth:], strict=True))
    grouped = {
        "conv": (outputs, inputs[-1:], *inputs[:-1]),
        "embed": (inputs, outputs),
    }.get(spec.kind or "", (outputs, inputs))
    return Stack(moved[:depth], axes), TensorLayout(leaf, suffix, kernel, grouped, sizes)
