"""Which tensors of a base model's GGUF file an adapter belongs to."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from peft_jax._numerics import PairLayout
from peft_jax._spec import LoraSpec
from peft_jax._trees import LORA
from peft_jax.io.gguf.adapter_rules import REMEDY
from peft_jax.io.gguf.write import check_names

Array = np.ndarray[Any, Any]
Name = str | Sequence[str]
Names = Mapping[str, Name] | Callable[[str], Name]

A, B = ".lora_a", ".lora_b"
_TABLE = "token_embd.weight"
_EXPERTS = "exps"


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor of the base, and where its matrices lie in the arrays of a `PairLayout`.

    Attributes:
      name: of the tensor.
      index: of its layer among the stacked ones.
      layers: their number.
      experts: the number of experts in the tensor; 0 where it is one matrix.
    """

    name: str
    index: int
    layers: int
    experts: int

    @property
    def is_table(self) -> bool:
        """Whether llama.cpp looks up the rows of the tensor."""
        return is_table(self.name)

    def of(self, matrices: Array) -> Array:
        """The matrices of this tensor: one, or one for each expert."""
        rows, columns = matrices.shape[-2:]
        shape = (self.layers, *([self.experts] if self.experts else []), rows, columns)
        found: Array = matrices.reshape(shape)[self.index]
        return found

    def in_file(self, left: Array, right: Array) -> tuple[Array, Array]:
        """``(in, r)`` and ``(r, out)`` as the file has them; its own inverse."""
        return left if self.is_table else left.swapaxes(-1, -2), right.swapaxes(-1, -2)

    def shapes(self, layout: PairLayout) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes in the file."""
        _, inputs, outputs = layout.lengths
        a = (inputs, layout.rank) if self.is_table else (layout.rank, inputs)
        front = (self.experts,) if self.experts else ()
        return (*front, *a), (*front, outputs, layout.rank)


def _is_experts(name: str) -> bool:
    """Whether llama.cpp has all experts of a layer in the tensor of this name."""
    return name.removesuffix(".weight").endswith(_EXPERTS)


def is_table(name: str) -> bool:
    """Whether llama.cpp looks up the rows of the tensor of this name."""
    return name.endswith(_TABLE)


def _weight_path(adapter: str, spec: LoraSpec) -> str:
    above = adapter.rpartition("/")[0]
    return adapter if spec.param is None else f"{above}/{spec.param}".lstrip("/")


def name_of(adapter: str, spec: LoraSpec, names: Names, caller: str) -> Name:
    """What the caller of ``caller`` names an adapter's tensor, or its tensors."""
    weight = _weight_path(adapter, spec)
    if callable(names):
        return names(weight)
    if not isinstance(names, Mapping):
        raise ValueError(
            f"{caller}: names are a mapping from paths of parameters to names of tensors, or a "
            f"function, got {names!r:.200}."
        )
    above, _, own = adapter.rpartition("/")
    keys = [weight, above] if own.partition(".")[0] == LORA else [weight]
    found = next((key for key in keys if key in names), None)
    if found is None:
        close = difflib.get_close_matches(weight, list(map(str, names)), 3, 0.0)
        raise ValueError(
            f"{caller}: names lack '{weight}', which the adapter at '{adapter}' adapts. Close "
            f"paths: {close}. Give the name of its tensor, such as 'blk.0.attn_q.weight'."
        )
    return names[found]


def all_places(
    layouts: Mapping[str, PairLayout],
    specs: Mapping[str, LoraSpec],
    names: Names,
    caller: str,
) -> dict[str, list[Place]]:
    """The tensors of each adapter; no two have the same name."""
    found = {
        adapter: _places(adapter, layout, name_of(adapter, specs[adapter], names, caller), caller)
        for adapter, layout in layouts.items()
    }
    named = [(adapter, place.name) for adapter, all in found.items() for place in all]
    check_names(named, caller, A)
    return found


def _misfit(layout: PairLayout, names: Sequence[str]) -> str | None:
    """Why an adapter cannot be that of tensors with these names."""
    kind, batch = layout.spec.kind, layout.groups[0]
    experts, tables = {_is_experts(name) for name in names}, {is_table(name) for name in names}
    if experts != {False} and not batch and not layout.stack:
        return "is that of experts in one tensor, but the layer has one matrix"
    if experts == {True, False} or (batch and experts != {True}):
        return f"is that of one matrix, but the layer has one for each index of '{batch}'"
    if kind == "embed" and tables != {True}:
        return f"is not {_TABLE}, the one table whose adapter llama.cpp reads"
    if kind not in ("embed", None) and tables != {False}:
        return f"is that of a table, but the layer is of the kind {kind!r}"
    if any(A in name or B in name for name in names):
        return "is that of an adapter; names are those of the base's tensors"
    return None


def _places(adapter: str, layout: PairLayout, name: Name, caller: str) -> list[Place]:
    templates = [name] if isinstance(name, str) else name
    strings = isinstance(templates, Sequence) and all(isinstance(n, str) for n in templates)
    if not strings or not templates:
        raise ValueError(
            f"{caller}: the adapter at '{adapter}' would be named {name!r}; that is neither a name "
            "nor a list of names, one for each layer. Give another by `names=`."
        )
    reason = _misfit(layout, templates)
    if reason is not None:
        raise ValueError(
            f"{caller}: the name {name!r} for the adapter at '{adapter}' {reason}. Give another "
            f"by `names=`, or leave the adapter out: {REMEDY}"
        )
    is_experts = all(map(_is_experts, templates))
    stack, inside = layout.stack, layout.lengths[0]
    if is_experts and not layout.groups[0]:
        stack, inside = stack[:-1], stack[-1]
    layers = math.prod(stack)
    if isinstance(name, str):
        if name.count("{}") != bool(stack):
            raise ValueError(
                f"{caller}: the adapter at '{adapter}' is of {layers} layers stacked by "
                f"{stack}, and its name is {name!r}: one with '{{}}' for the index of the layer is "
                "needed where there is a stack, and one without where there is none."
            )
        templates = [name.replace("{}", str(i)) for i in range(layers)]
    if len(templates) != layers:
        raise ValueError(
            f"{caller}: the adapter at '{adapter}' is of {layers} layers, and there are "
            f"{len(templates)} names. Give one for each, or one with '{{}}'."
        )
    count = inside if is_experts else 0
    return [Place(template, i, layers, count) for i, template in enumerate(templates)]


def heads_of(
    places: Mapping[str, list[Place]], patterns: Mapping[str, int] | None, caller: str
) -> dict[str, int]:
    """The number of heads of each tensor whose rows are reordered."""
    found: dict[str, int] = {}
    plain = [p.name for all in places.values() for p in all if not (p.is_table or p.experts)]
    for pattern, heads in (patterns or {}).items():
        matching = fnmatch.filter(plain, pattern)
        if type(heads) is not int or heads < 1:
            raise ValueError(f"{caller}: permute_heads[{pattern!r}] = {heads!r} is no number.")
        if not matching:
            close = difflib.get_close_matches(pattern, plain, 3, 0.0)
            raise ValueError(
                f"{caller}: permute_heads[{pattern!r}] matches no tensor of one matrix. Close "
                f"names: {close}."
            )
        for name in matching:
            if found.setdefault(name, heads) != heads:
                raise ValueError(
                    f"{caller}: permute_heads gives {name!r} both {found[name]} and {heads} heads."
                )
    return found
