"""A table of what is adapted, and how."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from rich.console import Console
from rich.table import Table

from peft_jax._flax_internals import inside_lift, root_of
from peft_jax._model import recorded_boxes
from peft_jax._names import scale_name
from peft_jax._registry import find_layer
from peft_jax._specs import LayerSpec, LoraSpec
from peft_jax._stored import as_stored
from peft_jax._trees import children, is_branch


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One adapter.

    Attributes:
      path: slashed path of the adapter.
      layer: kind of the layer.
      equation: of the layer; that of the change of the parameter where no layer is known.
      weight: shape of the adapted parameter.
      adapter: shape of each of the adapter's arrays.
      rank: of the adapter; of token rows their number.
      scaling: factor of ``a·b``.
      variant: as in `LoraSpec`.
      storage: how the weight is stored: a dtype, or the name of a quantization method.
      weight_bytes: bytes of the weight, with its scale.
      adapter_bytes: bytes of the adapter.
    """

    path: str
    layer: str
    equation: str
    weight: tuple[int, ...]
    adapter: Mapping[str, tuple[int, ...]]
    rank: int
    scaling: float
    variant: str
    storage: str
    weight_bytes: int
    adapter_bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summarize` returns; ``print`` shows a table.

    Attributes:
      rows: one for each adapter.
      left_alone: paths of layers that run on parameters of another module's making, which no
        adapter reaches.
    """

    rows: tuple[SummaryRow, ...]
    left_alone: tuple[str, ...] = ()

    def __str__(self) -> str:
        table = Table(
            "adapter", "layer", "equation", "weight", "adapter's arrays", "rank", "scaling",
            "storage", "bytes", "adapter's bytes",
        )  # fmt: skip
        for row in self.rows:
            arrays = ", ".join(f"{name} {_shape(shape)}" for name, shape in row.adapter.items())
            table.add_row(
                row.path, row.layer, row.equation, _shape(row.weight), arrays, str(row.rank),
                f"{row.scaling:.4g}", row.storage, f"{row.weight_bytes:,d}",
                f"{row.adapter_bytes:,d}",
            )  # fmt: skip
        total = sum(row.adapter_bytes for row in self.rows)
        console = Console(width=180, file=io.StringIO(), color_system=None, force_jupyter=False)
        console.print(table)
        console.print(f"{len(self.rows)} adapters, {total:,d} bytes")
        if self.left_alone:
            console.print(
                "left alone, as they run on parameters of another module's making: "
                + ", ".join(self.left_alone)
            )
        return console.file.getvalue()  # type: ignore[attr-defined]


def summarize(
    model: nn.Module,
    *inputs: Any,
    params: Any = None,
    method: Callable[..., Any] | str | None = None,
    rngs: Any = None,
    **kwargs: Any,
) -> Summary:
    """Every adapter that runs when the model is called on these inputs, as a table.

    As `lora_specs`, which see for the arguments: nothing is computed.

    Example::

      print(peft.summarize(model, jax.ShapeDtypeStruct((1, 128), "int32"), params=params))

    Args:
      model: a Linen module.
      *inputs: arguments of the method.
      params: parameters, which tell how weights are stored; None: as ``init`` would make them.
      method: the method to run.
      rngs: as for ``model.init``.
      **kwargs: further arguments of the method.

    Raises:
      ValueError: where ``model`` is no unbound Linen module, or ``params`` lack a weight.
    """
    notes = _LeftAlone()
    with nn.intercept_methods(notes):
        boxes = recorded_boxes(model, "summarize", *inputs, method=method, rngs=rngs, **kwargs)
    adapters: dict[str, dict[str, Any]] = {}
    for path, box in boxes.items():
        if isinstance(box.spec, LoraSpec):
            parent, _, leaf = path.rpartition("/")
            adapters.setdefault(parent, {})[leaf] = box
    rows = [_row(path, leaves, boxes, params) for path, leaves in adapters.items()]
    return Summary(tuple(rows), tuple(dict.fromkeys(notes.paths)))


def _row(path: str, leaves: Mapping[str, Any], boxes: Mapping[str, Any], params: Any) -> SummaryRow:
    spec: LoraSpec = next(iter(leaves.values())).spec
    above = path.rpartition("/")[0]
    weight = "/".join(part for part in (above, str(spec.param)) if part)
    layer = boxes[weight].spec if weight in boxes else None
    drawn = boxes[weight].value if weight in boxes else None
    shape, storage, size = _storage(weight, drawn, params)
    return SummaryRow(
        path=path,
        layer=layer.kind if isinstance(layer, LayerSpec) else spec.kind or "parameter",
        equation=layer.equation if isinstance(layer, LayerSpec) else spec.equation,
        weight=shape,
        adapter={name: box.value.shape for name, box in leaves.items()},
        rank=spec.rank,
        scaling=spec.scaling,
        variant=spec.variant,
        storage=storage,
        weight_bytes=size,
        adapter_bytes=sum(_bytes(box.value) for box in leaves.values()),
    )


def _storage(path: str, drawn: Any, params: Any) -> tuple[tuple[int, ...], str, int]:
    """Shape, storage and bytes of a weight."""
    if params is None:
        if drawn is None:
            return (), "", 0
        return drawn.shape, str(jnp.dtype(drawn.dtype)), _bytes(drawn)
    tree, name = params, ""
    for name in path.split("/"):
        layer, tree = tree, dict(_named(tree)).get(name)
        if tree is None:
            raise ValueError(f"summarize: the parameters hold no '{path}'. Give this model's.")
    value = meta.unbox(tree)
    stored = as_stored(value)
    if stored is None:
        return np.shape(value), str(jnp.dtype(value.dtype)), _bytes(value)
    from_scale = scale_name(name, layer)
    scale = meta.unbox(layer[from_scale]) if from_scale else None
    size = _bytes(stored.array) + (0 if scale is None else _bytes(scale))
    return stored.shape, stored.method, size


def _named(tree: Any) -> Any:
    return [(str(key), value) for key, value in children(tree)] if is_branch(tree) else []


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "?"


def _bytes(array: Any) -> int:
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


class _LeftAlone:
    """Notes layers that run on a root of their own inside the model's."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._root: Any = None  # of the model that is running

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.scope is None or inside_lift(module.scope):
            return next_fun(*args, **kwargs)
        root, outer = root_of(module.scope), self._root
        if outer not in (None, root) and find_layer(module) is not None:
            self.paths.append("/".join(module.scope.path) or type(module).__name__)
        self._root = root if outer is None else outer
        try:
            return next_fun(*args, **kwargs)
        finally:
            self._root = outer
