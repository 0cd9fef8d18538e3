"""A table of what is adapted, and how."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta

from peft_jax._config import LoraConfig, alpha_of, rank_of
from peft_jax._model.peft_model import PeftModel
from peft_jax._numerics import as_stored
from peft_jax._spec import LayerSpec, LoraSpec
from peft_jax._surgery import find_layer, inside_lift, recorded_boxes, root_of
from peft_jax._trees import Layer, Path, children, is_branch, map_layers, named_as, scale_name

__all__ = [
    "AdapterRow",
    "AdapterStatus",
    "Summary",
    "SummaryRow",
    "adapter_status",
    "summarize",
]


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]], *lines: str, width: int) -> str:
    """Rows under the names of their columns, and lines below, as text."""
    from rich.console import Console  # here, so that `import peft_jax` does not pay for it
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    console = Console(width=width, file=text, color_system=None, force_jupyter=False)
    console.print(table)
    for line in lines:
        console.print(line)
    return text.getvalue()


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
        columns = (
            "adapter", "layer", "equation", "weight", "adapter's arrays", "rank", "scaling",
            "storage", "bytes", "adapter's bytes",
        )  # fmt: skip
        rows = [
            (
                row.path, row.layer, row.equation, _shape(row.weight),
                ", ".join(f"{name} {_shape(shape)}" for name, shape in row.adapter.items()),
                str(row.rank), f"{row.scaling:.4g}", row.storage, f"{row.weight_bytes:,d}",
                f"{row.adapter_bytes:,d}",
            )
            for row in self.rows
        ]  # fmt: skip
        total = sum(row.adapter_bytes for row in self.rows)
        lines = [f"{len(self.rows)} adapters, {total:,d} bytes"]
        if self.left_alone:
            names = ", ".join(self.left_alone)
            lines.append(
                f"left alone, as they run on parameters of another module's making: {names}"
            )
        return _table(columns, rows, *lines, width=180)


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


@dataclasses.dataclass(frozen=True)
class AdapterRow:
    """One adapter of a model.

    Attributes:
      name: of the adapter.
      active: whether it acts; None where the model does not know of it.
      layers: in how many places of the tree it lies.
      ranks: those that occur, in order, by the config.
      scalings: likewise.
      variants: which of ``lora``, ``dora`` and ``tokens`` occur.
      parameters: how many numbers it holds.
      bytes: of its arrays.
      dtypes: of its arrays.
      in_place: what it trains beside its arrays: ``modules_to_save``, ``bias``.
    """

    name: str
    active: bool | None
    layers: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    variants: tuple[str, ...]
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    in_place: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AdapterStatus:
    """What `adapter_status` returns; ``print`` shows a table.

    Attributes:
      rows: one for each adapter, of the model's and then of the others in the parameters.
    """

    rows: tuple[AdapterRow, ...]

    def __str__(self) -> str:
        columns = (
            "adapter", "active", "layers", "rank", "scaling", "variant", "parameters", "bytes",
            "dtype", "trained in place",
        )  # fmt: skip
        active = {True: "yes", False: "no", None: "not the model's"}
        rows = [
            (
                row.name, active[row.active], str(row.layers), _listed(row.ranks),
                _listed(f"{scaling:.4g}" for scaling in row.scalings), _listed(row.variants),
                f"{row.parameters:,d}", f"{row.bytes:,d}", _listed(row.dtypes),
                _listed(row.in_place),
            )
            for row in self.rows
        ]  # fmt: skip
        return _table(columns, rows, width=160)


def adapter_status(model: PeftModel, params: Any) -> AdapterStatus:
    """Every adapter of a model: whether it acts, where it lies, how large it is.

    Example::

      print(peft.adapter_status(model, params))

    Args:
      model: from `get_peft_model`.
      params: of the model. Adapters that they lack count no layers; those that the model does not
        know of are listed too.

    Raises:
      ValueError: where ``model`` has no adapters.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"adapter_status takes a model from `get_peft_model`, got {type(model).__name__}."
        )
    found: dict[str, list[tuple[Path, Mapping[str, Any]]]] = {
        name: [] for name in model.peft_configs
    }

    def note(path: Path, rest: Layer, adapters: Layer) -> Layer:
        for branch, adapter in adapters.items():
            found.setdefault(named_as(branch), []).append((path, adapter))
        return rest

    map_layers(params, note)
    configs, active = model.peft_configs, model.active_adapters
    return AdapterStatus(
        tuple(
            _status_row(
                name, name in active if name in configs else None, configs.get(name), places
            )
            for name, places in found.items()
        )
    )


def _status_row(
    name: str,
    active: bool | None,
    config: LoraConfig | None,
    places: list[tuple[Path, Mapping[str, Any]]],
) -> AdapterRow:
    arrays = [meta.unbox(leaf) for _, adapter in places for leaf in adapter.values()]
    products = [(path, adapter) for path, adapter in places if "a" in adapter]
    ranks: set[int] = set()
    scalings: set[float] = set()
    in_place: list[str] = []
    if config is not None:
        for path, _ in products:
            rank = rank_of(config, path)
            ranks.add(rank)
            scalings.add(alpha_of(config, path) / (math.sqrt(rank) if config.use_rslora else rank))
        in_place += [f"modules_to_save={list(config.modules_to_save or ())}"] * bool(
            config.modules_to_save
        )
        in_place += [f"bias={config.bias!r}"] * (config.bias != "none")
    return AdapterRow(
        name=name,
        active=active,
        layers=len(places),
        ranks=tuple(sorted(ranks)),
        scalings=tuple(sorted(scalings)),
        variants=tuple(sorted({_variant(adapter) for _, adapter in places})),
        parameters=sum(math.prod(array.shape) for array in arrays),
        bytes=sum(math.prod(array.shape) * jnp.dtype(array.dtype).itemsize for array in arrays),
        dtypes=tuple(sorted({str(jnp.dtype(array.dtype)) for array in arrays})),
        in_place=tuple(in_place),
    )


def _variant(adapter: Mapping[str, Any]) -> str:
    if "rows" in adapter:
        return "tokens"
    return "dora" if "magnitude" in adapter else "lora"


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))
