"""Which modules of a running model a config means, and the wrappers that it puts around them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.typing import Array

from peft_jax._config import (
    LoraConfig,
    alpha_of,
    is_all_linear,
    is_saved,
    layer_index,
    rank_of,
    selects,
    selects_parameter,
    tokens_of,
)
from peft_jax._layers import (
    AdapterRule,
    LoRAConv,
    LoRADense,
    LoRADenseGeneral,
    LoRAEinsum,
    LoRAEmbed,
    Settings,
    TokensWrapper,
    weight_change,
)
from peft_jax._numerics import as_stored, weight_shape
from peft_jax._spec import experts_equation, parse_equation
from peft_jax._surgery import (
    PRODUCTS,
    STORAGE,
    Call,
    Layer,
    ModuleInterceptor,
    Proceed,
    Rule,
    Wrapper,
    find_layer,
    first_values,
    layer_type,
    lifts_around,
    traced_boxes,
)
from peft_jax._trees import DEFAULT, TOKENS, Path, containers, named_adapters, slashed

_WRAPPERS: Mapping[str, Any] = {
    "dense": LoRADense,
    "einsum": LoRAEinsum,
    "dense_general": LoRADenseGeneral,
    "conv": LoRAConv,
    "embed": LoRAEmbed,
}


@dataclasses.dataclass(frozen=True)
class Adapt:
    """A rule that adapts the modules that a config names.

    Attributes:
      config: which modules, and how.
      base: path of the model that the config speaks of.
      adapter_name: of the adapters.
      left_out: paths that ``all-linear`` does not mean.
      table: path of the embedding that a plain list of ``trainable_token_indices`` is about.
    """

    config: LoraConfig
    base: Path
    adapter_name: str
    left_out: frozenset[Path] | None = None
    table: Path | None = None

    def __call__(self, module: nn.Module) -> nn.Module:
        assert module.scope is not None
        path = module.scope.path[len(self.base) :]
        if self.config.target_parameters:
            module = _Parameters(wrapped=module, adapt=self)
        tokens = self._tokens(module, path)
        if tokens:
            module = TokensWrapper(wrapped=module, tokens=tokens, adapter_name=self.adapter_name)
        layer = self._layer(module, path)
        if layer is None:
            return module
        settings = self.settings(path, layer.kind)
        fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
        return _WRAPPERS[layer.kind](wrapped=module, **fields)

    def _layer(self, module: Any, path: Path) -> Layer | None:
        """How the module is read, if the config means it."""
        layer = _layer_of(module)
        config = self.config
        if is_all_linear(config):
            linear = layer is not None and layer.kind in PRODUCTS
            if not linear or path in (self.left_out or ()):
                return None
        self._refuse_stacked(module, path)
        if not selects(config, path):
            return None
        if layer is None:
            cls = layer_type(module).__name__
            raise ValueError(
                f"LoraConfig.target_modules = {_shown(config.target_modules)} names "
                f"'{slashed(path)}', a {cls}, and {cls} is not registered as a layer. Name the "
                f"layers inside it, leave it out (exclude_modules), or say how it reads its "
                f"parameter by `peft.register_layer({cls}, param=..., equation=...)`."
            )
        return layer

    def _tokens(self, module: Any, path: Path) -> tuple[int, ...]:
        """The rows of the module's table that are trained."""
        tokens = tokens_of(self.config, path, is_table=path == self.table)
        layer = _layer_of(module)
        if tokens and (layer is None or layer.kind != "embed"):
            raise ValueError(
                f"LoraConfig.trainable_token_indices names '{slashed(path)}', a "
                f"{layer_type(module).__name__}. Rows can be trained of an nn.Embed."
            )
        return tokens

    def _refuse_stacked(self, module: Any, path: Path) -> None:
        config = self.config
        if config.layers_to_transform in (None, ()):
            return
        lifts = [lift for lift in lifts_around(module.scope) if lift in ("scan", "vmap")]
        everywhere = dataclasses.replace(config, layers_to_transform=None, layers_pattern=None)
        if lifts and layer_index(path, config.layers_pattern) is None and selects(everywhere, path):
            raise ValueError(
                f"LoraConfig.layers_to_transform = {config.layers_to_transform} tells layers apart "
                f"by their index, but '{slashed(path)}' stands for a stack of layers "
                f"(nn.{lifts[0]}), which have one adapter each, or none. Leave layers_to_transform "
                "out, build the model with layers of their own names, or leave the stack out "
                f"(exclude_modules={['.'.join(path)]})."
            )

    def settings(self, path: Path, kind: str | None) -> Settings:
        """What the config says of the adapter at a path."""
        config, rank = self.config, rank_of(self.config, path)
        a_init, b_init = first_values(config.init_lora_weights, rank, kind)
        return Settings(
            rank=rank,
            alpha=alpha_of(config, path),
            dropout=config.lora_dropout,
            deterministic=None,
            dtype=None,
            param_dtype=jnp.float32,
            a_init=a_init,
            b_init=b_init,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            lora_bias=config.lora_bias,
            adapter_name=self.adapter_name,
        )

    def for_params(self, params: Any) -> Adapt:
        """The rule for a model with these parameters, whose adapters tell what ``init`` meant.

        Of the layers that ``all-linear`` may leave out, those without an adapter are left out.
        """
        if self.table is None and isinstance(self.config.trainable_token_indices, tuple):
            own = "" if self.adapter_name == DEFAULT else f".{self.adapter_name}"
            tables = [path for path, layer in containers(params) if f"{TOKENS}{own}" in layer]
            table = tables[0] if tables else _only_table(self.config, _tables(params))
            return dataclasses.replace(self, table=table).for_params(params)
        if not is_all_linear(self.config) or self.left_out is not None:
            return self
        tree = list(containers(params))
        tables = _tables(params)
        lengths = {
            weight_shape(meta.unbox(layer["embedding"]))[0]
            for path, layer in tree
            if path in tables
        }
        bare = frozenset(
            path
            for path, layer in tree
            if _may_be_output(layer, lengths) and not named_adapters(layer, self.adapter_name)
        )
        self._refuse_two_outputs(tree, bare)
        return dataclasses.replace(self, left_out=bare)

    def _refuse_two_outputs(self, tree: list[tuple[Path, Any]], bare: frozenset[Path]) -> None:
        """One layer is left out as the output layer; a second one has lost its adapter."""
        linear = [
            path
            for path, layer in tree
            if path in bare and selects(self.config, path) and _is_plainly_linear(layer)
        ]
        if len(linear) > 1:
            raise ValueError(
                f"The parameters hold no adapter at {[*map(slashed, linear)]}, of which "
                "target_modules='all-linear' leaves out one at most, the output layer. Initialize "
                "the model under the same config, or add the adapters by `peft.merge_params`."
            )


def _layer_of(module: Any) -> Layer | None:
    return find_layer(module.unwrap()[1] if isinstance(module, Wrapper) else module)


def _shown(value: Any) -> str:
    return f"{value!r:.200}"


def _tables(params: Any) -> list[Path]:
    """Where a parameter tree holds the table of an ``nn.Embed``."""
    tree = containers(params)
    return [path for path, layer in tree if isinstance(layer, Mapping) and "embedding" in layer]


def _may_be_output(layer: Any, lengths: set[int]) -> bool:
    """Whether a container holds a weight as wide as a table is long."""
    if not isinstance(layer, Mapping):
        return False
    shapes = [weight_shape(meta.unbox(v)) for v in layer.values() if _is_leaf(v)]
    return any(
        length in lengths for shape in shapes if len(shape) >= 2 for length in _widths(shape)
    )


def _is_plainly_linear(layer: Mapping[str, Any]) -> bool:
    return "kernel" in layer and len(weight_shape(meta.unbox(layer["kernel"]))) == 2


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, Mapping | list | tuple) or as_stored(value) is not None


def _widths(shape: tuple[int, ...]) -> list[int]:
    """What a weight's outputs may number: products of its last axes."""
    widths, product = [], 1
    for length in reversed(shape[1:]):
        product *= length
        widths.append(product)
    return widths


# --- Parameters without a layer ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _ParametersRule(AdapterRule):
    """Adapters at the parameters that a config names, of a module that is no layer."""

    adapt: Adapt

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"lora at parameters ({self.adapt.adapter_name})"

    def _path(self, call: Call, name: str) -> Path:
        return (*call.module.scope.path[len(self.adapt.base) :], name)

    def at_weight(self, call: Call) -> bool:
        layer = find_layer(call.module)
        if layer is None:
            return True
        names = {layer.param, "bias", *call.module.scope.variables().get("params", {})}
        return any(selects_parameter(self.adapt.config, self._path(call, name)) for name in names)

    def change(self, call: Call, name: str, value: Any) -> Array | None:
        path = self._path(call, name)
        if not selects_parameter(self.adapt.config, path):
            return None
        if jnp.ndim(value) < 2:
            raise ValueError(
                f"LoraConfig.target_parameters names '{slashed(path)}', which has shape "
                f"{jnp.shape(value)}: a low-rank change needs two axes or more. Leave it out."
            )
        layer = find_layer(call.module)
        if layer is not None and layer.param == name:
            equation, kind = layer.equation(call), layer.kind
        else:
            equation, kind = experts_equation(value.ndim), "experts"
        return weight_change(self.adapt.settings(path, kind), call, name, value, equation, kind)


class _Parameters(Wrapper):
    adapt: Adapt

    @nn.nowrap
    def rule(self) -> Rule:
        return _ParametersRule(self.adapt)


# --- The output layer ----------------------------------------------------------------------------


def needs_structure(config: LoraConfig) -> bool:
    """Whether a config speaks of layers that only the whole model tells; see `structure`."""
    return is_all_linear(config) or isinstance(config.trainable_token_indices, tuple)


class Structure(NamedTuple):
    """What a config means by a model's output layer and by its embedding."""

    left_out: frozenset[Path]
    table: Path | None


def structure(config: LoraConfig, base: Path, init: Callable[..., Any], *given: Any) -> Structure:
    """The output layer of a model, and its embedding.

    Args:
      config: asks for it.
      base: path of the model that the config speaks of.
      init: initializes the model; it is traced abstractly.
      *given: its arguments, as for `traced_boxes`.
    """
    seen: list[tuple[Path, str, int]] = []
    with ModuleInterceptor(_Noticing(_Notes(seen))):
        traced_boxes(init, *given)
    seen = [(path[len(base) :], kind, length) for path, kind, length in seen]
    table = None
    if isinstance(config.trainable_token_indices, tuple):
        table = _only_table(config, [path for path, kind, _ in seen if kind == "embed"])
    return Structure(_output_layer(seen), table)


def _output_layer(seen: list[tuple[Path, str, int]]) -> frozenset[Path]:
    """The last linear layer that is as wide as the longest table is long.

    Where there is none: the last linear layer of all, if it alone is as wide as some table is long
    (of two vocabularies the output's may be the shorter one). Tables of positions and of types,
    which may be as long as the model is wide, are not taken for vocabularies so.
    """
    lengths = [length for _, kind, length in seen if kind == "embed"]
    linear = [(path, width) for path, kind, width in seen if kind != "embed"]
    heads = [path for path, width in linear if width == max(lengths, default=0)]
    if not heads and linear:
        last, width = linear[-1]
        alone = all(path == last for path, other in linear if other == width)
        heads = [last] if alone and width in lengths else []
    return frozenset(heads[-1:])


def _only_table(config: LoraConfig, paths: list[Path]) -> Path:
    """The embedding that is meant where none is named."""
    found = sorted(set(paths))
    named = [path for path in found if path[-1:] == ("embed_tokens",)]
    if len(found) != 1 and len(named) != 1:
        raise ValueError(
            "LoraConfig.trainable_token_indices is a list, which is about the model's only "
            f"embedding, or the one named embed_tokens; there are {[*map(slashed, found)]}. Name "
            "one: trainable_token_indices={'<its path>': [...]}."
        )
    table = found[0] if len(found) == 1 else named[0]
    if is_saved(config, table):
        raise ValueError(
            f"LoraConfig.trainable_token_indices is about '{slashed(table)}', all of which is "
            "trained (modules_to_save). Leave one of them out."
        )
    return table


@dataclasses.dataclass(frozen=True, eq=False)
class _Notes:
    """Layers in the order of their calls: path, kind, and width or length of the table."""

    seen: list[tuple[Path, str, int]]


@dataclasses.dataclass(frozen=True)
class _NoticeRule(Rule):
    order: ClassVar[int] = STORAGE
    notes: _Notes

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"order of layers ({id(self.notes)})"

    def around(self, call: Call, proceed: Proceed) -> Any:
        y = proceed(call)
        layer = find_layer(call.module)
        if layer is not None and call.method in layer.methods:
            shape = weight_shape(meta.unbox(call.module.get_variable("params", layer.param)))
            equation = parse_equation(layer.equation(call))
            sizes = equation.sizes(shape)
            letters = [c for c in equation.produced if c in equation.outputs]
            width = shape[0] if layer.kind == "embed" else math.prod(sizes[c] for c in letters)
            if layer.kind in PRODUCTS or layer.kind == "embed":
                self.notes.seen.append((call.module.scope.path, layer.kind, width))
        return y


class _NoticeWrapper(Wrapper):
    notes: _Notes

    @nn.nowrap
    def rule(self) -> Rule:
        return _NoticeRule(self.notes)


@dataclasses.dataclass(frozen=True)
class _Noticing:
    notes: _Notes

    def __call__(self, module: nn.Module) -> nn.Module:
        layer = find_layer(module)
        return module if layer is None else _NoticeWrapper(wrapped=module, notes=self.notes)
