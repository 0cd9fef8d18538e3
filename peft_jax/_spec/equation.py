"""The einsum language: what a layer's equation says about its kernel. Plain Python, no jax."""

from __future__ import annotations

import dataclasses
import functools
import string
from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "BATCH_IN_B",
    "DENSE",
    "EMBED",
    "Equation",
    "LowRank",
    "as_tuple",
    "conv_equation",
    "dense_general_equation",
    "experts_equation",
    "normalize_axes",
    "parse_equation",
    "roles_equation",
    "stacked",
    "unused_letter",
    "weight_equation",
]


ELLIPSIS = "..."
# Kinds of layers whose adapters have batch axes in both arrays.
BATCH_IN_B = frozenset({"dense_general", "experts"})


@dataclasses.dataclass(frozen=True)
class Equation:
    """A layer as a product of its input and its kernel: ``inputs,kernel->outputs``.

    The letters of the kernel fall into four groups, and everything that the library does with
    a kernel follows from them:

    ===========  ==========  ===========  ==================================================
    group        in inputs   in outputs   meaning
    ===========  ==========  ===========  ==================================================
    contracted   yes         no           input axes, summed over
    batch        yes         yes          one matrix for each index
    output       no          yes          output axes
    alone        no          no           summed over inside the kernel; counted as outputs
    ===========  ==========  ===========  ==================================================

    Attributes:
      inputs: letters of the input; may hold ``...``.
      kernel: letters of the kernel, each once, no ellipsis.
      outputs: letters of the output; may hold ``...``.
    """

    inputs: str
    kernel: str
    outputs: str

    def __str__(self) -> str:
        return f"{self.inputs},{self.kernel}->{self.outputs}"

    @functools.cached_property
    def contracted(self) -> str:
        return "".join(c for c in self.kernel if c in self.inputs and c not in self.outputs)

    @functools.cached_property
    def batch(self) -> str:
        return "".join(c for c in self.kernel if c in self.inputs and c in self.outputs)

    @functools.cached_property
    def produced(self) -> str:
        """Output axes, and those that stand in the kernel alone, in kernel order."""
        return "".join(c for c in self.kernel if c not in self.inputs)

    @functools.cached_property
    def kept(self) -> str:
        """Axes of the kernel that stand in the output, in the order in which they stand there."""
        return "".join(c for c in self.outputs if c in self.kernel)

    def input_axes(self, ndim: int) -> str:
        """A letter, or a dot, for each axis of an input of so many axes."""
        return _axes(self.inputs, ndim)

    def output_axes(self, ndim: int) -> str:
        """A letter, or a dot, for each axis of an output of so many axes."""
        return _axes(self.outputs, ndim)

    def sizes(self, shape: Sequence[int]) -> dict[str, int]:
        """Length of each kernel axis, for a kernel of this shape."""
        if len(shape) != len(self.kernel):
            raise ValueError(
                f"The kernel of '{self}' has {len(self.kernel)} axes ({self.kernel}), but the "
                f"shape {tuple(shape)} has {len(shape)}. Give the shape of the kernel that the "
                "equation names."
            )
        return dict(zip(self.kernel, shape, strict=True))

    def low_rank(self, *, batch_in_b: bool = False) -> LowRank:
        """The equations of a low-rank kernel ``a·b`` in place of the kernel.

        Args:
          batch_in_b: whether batch axes stand in ``b`` too (as for ``nn.DenseGeneral``), so that
            each batch index has a low-rank matrix of its own on both sides.
        """
        rank = unused_letter(str(self))
        a = "".join(c for c in self.kernel if c in self.inputs) + rank
        b = (self.batch if batch_in_b else "") + rank + self.produced
        middle = self._middle(rank)
        return LowRank(
            a=a,
            b=b,
            first=f"{self.inputs},{a}->{middle}",
            second=f"{middle},{b}->{self.outputs}",
            delta=f"{a},{b}->{self.kernel}",
            batch=self.batch,
            rank=rank,
        )

    def _middle(self, rank: str) -> str:
        """Axes after ``x·a``: those of the input that the output still needs, then the rank."""
        kept, rest = [], self.inputs
        while rest:
            token = ELLIPSIS if rest.startswith(ELLIPSIS) else rest[0]
            rest = rest[len(token) :]
            if token in self.outputs and token not in kept:
                kept.append(token)
        return "".join(kept) + rank


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The equations of one low-rank kernel, as einsum strings over ``a`` and ``b``.

    Attributes:
      a: letters of ``a``: the kernel's batch and contracted axes in kernel order, then the rank.
      b: letters of ``b``: the rank, then the kernel's other axes.
      first: ``x,a->h``.
      second: ``h,b->y``.
      delta: ``a,b->kernel``.
      batch: letters of the batch axes.
      rank: the letter of the rank.
    """

    a: str
    b: str
    first: str
    second: str
    delta: str
    batch: str
    rank: str

    def shapes(
        self, sizes: Mapping[str, int], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``a`` and ``b``."""
        known = {**sizes, self.rank: rank}
        return tuple(known[c] for c in self.a), tuple(known[c] for c in self.b)


@functools.lru_cache(maxsize=1024)
def parse_equation(equation: str) -> Equation:
    """Reads ``inputs,kernel->outputs``.

    Raises:
      ValueError: where no low-rank change of the kernel exists, or the equation is not one.
    """
    if not isinstance(equation, str):
        raise ValueError(
            f"An equation is a string such as '...i,io->...o', got {equation!r} "
            f"({type(equation).__name__})."
        )
    text = equation.replace(" ", "")

    def refuse(rule: str, remedy: str) -> ValueError:
        return ValueError(f"{rule} Got the equation {equation!r}. {remedy}")

    if text.count("->") != 1:
        raise refuse(
            "A layer's equation names its output.", "Write it as 'inputs,kernel->outputs'."
        )
    operands, outputs = text.split("->")
    if operands.count(",") != 1:
        raise refuse(
            f"A layer's equation has two operands, input and kernel, not "
            f"{operands.count(',') + 1}.",
            "Write it as 'inputs,kernel->outputs'.",
        )
    inputs, kernel = operands.split(",")
    if ELLIPSIS in kernel:
        raise refuse(
            "The kernel of an equation may not hold an ellipsis, since its axes must be told "
            "apart.",
            "Name every axis of the kernel by a letter.",
        )
    if not kernel:
        raise refuse("A kernel without axes has no low-rank form.", "Name the kernel's axes.")
    for operand in (inputs, kernel, outputs):
        stray = set(operand.replace(ELLIPSIS, "", 1)) - set(string.ascii_letters)
        if stray:
            raise refuse(
                f"Axes are named by letters, not {sorted(stray)}.", "Use a-z, A-Z and '...'."
            )
    for operand, role in ((kernel, "kernel"), (outputs, "output")):
        twice = sorted({c for c in operand if c != "." and operand.count(c) > 1})
        if twice:
            raise refuse(
                f"The letter {twice[0]!r} stands twice in the {role}: no low-rank change of the "
                "kernel has this form.",
                "Give each axis a letter of its own.",
            )
    lost = sorted(set(outputs) - set(inputs) - set(kernel) - {"."})
    if lost:
        raise refuse(
            f"The output axis {lost[0]!r} stands in no operand.",
            "Every letter of the output comes from the input or the kernel.",
        )
    if ELLIPSIS in outputs and ELLIPSIS not in inputs:
        raise refuse(
            "The output has an ellipsis that the input lacks.",
            "Write '...' in the input too.",
        )
    return Equation(inputs, kernel, outputs)


def _axes(term: str, ndim: int) -> str:
    return term.replace(ELLIPSIS, "." * (ndim - len(term) + len(ELLIPSIS)))


def unused_letter(used: str) -> str:
    """A letter for the rank: ``r`` where it is free, else the first free one."""
    for letter in "r" + string.ascii_letters:
        if letter not in used:
            return letter
    raise ValueError(f"The equation {used!r} uses every letter; none is left for the rank.")


def as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    """One number or several, as a tuple."""
    return tuple(value) if isinstance(value, Iterable) else (value,)


def normalize_axes(axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Axes as non-negative positions in rising order, in which Flax takes them too."""
    axes = as_tuple(axes)
    outside = [axis for axis in axes if not -ndim <= axis < ndim]
    if outside:
        raise ValueError(
            f"Axis {outside[0]} does not exist in an input of {ndim} axes. Name axes from "
            f"{-ndim} to {ndim - 1}."
        )
    return tuple(sorted(axis % ndim for axis in axes))


def dense_general_equation(
    ndim: int, axis: int | Sequence[int], batch_dims: int | Sequence[int], features: int
) -> str:
    """The equation of ``nn.DenseGeneral``: ``ndim`` input axes, ``features`` new output axes.

    ``lax.dot_general`` puts batch axes first, then the input's free axes, then the features.
    """
    axis, batch = normalize_axes(axis, ndim), normalize_axes(batch_dims, ndim)
    if ndim + features > len(string.ascii_letters) - 1:
        raise ValueError(f"{ndim} input axes and {features} feature axes exceed the alphabet.")
    letters = string.ascii_letters.replace("r", "")
    inputs, produced = letters[:ndim], letters[ndim : ndim + features]
    free = [i for i in range(ndim) if i not in axis and i not in batch]
    kernel, outputs = ("".join(inputs[i] for i in (*batch, *rest)) for rest in (axis, free))
    return f"{inputs},{kernel}{produced}->{outputs}{produced}"


def conv_equation(window: int) -> str:
    """A convolution at one place: its window joins the input axes; ``...xyi,xyio->...o``."""
    letters = "".join(c for c in string.ascii_letters if c not in "ior")[:window]
    return f"...{letters}i,{letters}io->...o"


def weight_equation(ndim: int) -> str:
    """A parameter of which nothing is known: the last axis is the output, the others are inputs."""
    letters = string.ascii_letters.replace("r", "")[:ndim]
    return f"...{letters[:-1]},{letters}->...{letters[-1]}"


def roles_equation(roles: Sequence[str]) -> str:
    """The equation of a product that contracts, produces or pairs (``batch``) each axis."""
    letters = string.ascii_letters.replace("r", "")[: len(roles)]
    batch, contracted, produced = (
        "".join(c for c, own in zip(letters, roles, strict=True) if own == role)
        for role in ("batch", "contracted", "produced")
    )
    return f"{batch}...{contracted},{letters}->{batch}...{produced}"


def experts_equation(ndim: int) -> str:
    """Matrices ``(in, out)``, one for each index of the axes in front, such as experts."""
    letters = string.ascii_letters.replace("r", "")[:ndim]
    return f"{letters[:-2]}...{letters[-2]},{letters}->{letters[:-2]}...{letters[-1]}"


DENSE = "...i,io->...o"
EMBED = "...v,vf->...f"


def stacked(delta: str) -> str:
    """A delta equation with a leading ellipsis in every operand: ``...ir,...ro->...io``."""
    if ELLIPSIS in delta:
        return delta
    operands, kernel = delta.split("->")
    a, b = operands.split(",")
    return f"...{a},...{b}->...{kernel}"
