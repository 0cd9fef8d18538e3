"""What simulation does to a module: its input, its parameters, its output, its adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta

from peft_jax._numerics import as_stored, axes_for, simulate_quantize
from peft_jax._spec import contracted_axes
from peft_jax._surgery import (
    INPUT,
    SIMULATION,
    Call,
    Proceed,
    Rule,
    SpecBox,
    Wrapper,
    find_layer,
    note,
    recording,
)
from peft_jax.quantsim._grid import fake_quantize
from peft_jax.quantsim._quantizer import Quantizer, SimulationConfig
from peft_jax.quantsim._sites import ENCODINGS, INDEX, OFFSET, SCALE, SiteSpec, scale_shape

Array = jax.Array
_ARRAYS = (jax.Array, np.ndarray)
_ADAPTER_FIELDS = {"a": "adapter_weights", "b": "adapter_weights", "scaling": "adapter_scaling"}


@dataclasses.dataclass(eq=False)
class Census:
    """Which sites a run meets; filled while it is traced.

    Attributes:
      possible: paths of all arrays that a rule could speak of.
      used: paths of those that are simulated.
      constants: of those that are known numbers, by path.
    """

    possible: set[str] = dataclasses.field(default_factory=set)
    used: set[str] = dataclasses.field(default_factory=set)
    constants: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Simulate:
    """A rule for `ModuleInterceptor` by which a model computes as if it were quantized.

    Attributes:
      config: what is simulated.
      known: the quantizers of the encodings that lie among the parameters, by path.
      observed: paths of what flows between layers and is noted rather than quantized.
      census: in place of all this: the sites are counted, and nothing is changed.
    """

    config: SimulationConfig
    known: tuple[tuple[str, Quantizer], ...] = ()
    observed: frozenset[str] = frozenset()
    census: Census | None = None

    def __call__(self, module: nn.Module) -> nn.Module:
        return _Simulated(wrapped=module, simulation=self)

    @functools.cached_property
    def quantizers(self) -> Mapping[str, Quantizer]:
        """What is known, by path."""
        return dict(self.known)

    def seen(
        self,
        call: Call,
        name: str,
        value: Array | np.ndarray,
        field: str | None,
        *,
        contracted: tuple[int, ...] | None = None,
        of_adapter: bool = False,
        parts: int = 1,
    ) -> Any:
        """An array as the model computes with it.

        Args:
          call: of the module that reads or computes the array.
          name: of the array, behind the module's path.
          value: the array.
          field: of the configuration that is about it; see `SimulationConfig.quantizer`.
          contracted: of a parameter, the axes that its product sums over.
          of_adapter: whether it belongs to an adapter.
          parts: see `SimulationConfig.quantizer`.
        """
        path = "/".join((*call.module.scope.path, name))
        quantizer = self.config.quantizer(path, field, parts)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            if quantizer is not None and contracted is not None:
                raise ValueError(
                    f"'{path}' is simulated ({quantizer!r}), but holds {value.dtype}. Give the "
                    "parameters as floats; integers are for a runtime."
                )
            return value
        if self.census is not None and (field is not None or quantizer is not None):
            self.census.possible.add(path)
        if quantizer is None:
            self._refuse_unused(call, name, path)
            return value
        if call.mapped:
            raise ValueError(
                f"The layer at '{call.path}' runs inside `nn.map_variables` (nn.WeightNorm and "
                "nn.SpectralNorm do so), where there is no place for encodings. Leave it out by "
                f"`QuantizerRule('{call.path}/*', None)`."
            )
        if quantizer.method is not None and contracted is None:
            raise ValueError(
                f"'{path}' flows between layers, and a quantizer with a method is for weights "
                f"({quantizer!r}). Say bitwidth, symmetric and granularity instead."
            )
        if recording():
            spec = SiteSpec(quantizer, contracted is not None, of_adapter, contracted or ())
            self._record(call, name, value.shape, path, spec)
            return value
        if self.census is not None:
            self.census.used.add(path)
            if isinstance(value, np.generic):
                self.census.constants[path] = float(value)
            return value
        return self._simulated(call, name, jnp.asarray(value), path, quantizer, contracted)

    def _record(
        self, call: Call, name: str, shape: tuple[int, ...], path: str, spec: SiteSpec
    ) -> None:
        """Leaves a box, which lifts stack as they do parameters, in the place of the encoding."""
        contracted = spec.contracted if spec.of_parameter else None
        shape = scale_shape(shape, contracted, spec.quantizer, path)
        if not spec.of_parameter:  # room for a stack axis anywhere among those of the weight
            shape = (1,) * (_rank(call) - 1) + shape
        scope = call.module.scope
        boxes = dict(scope.get_variable("params", ENCODINGS) or {})
        boxes[name] = SpecBox(jnp.zeros(shape, jnp.float32), spec)
        scope.put_variable("params", ENCODINGS, boxes)

    def _refuse_unused(self, call: Call, name: str, path: str) -> None:
        """Encodings that would be passed over in silence."""
        leaves = call.module.scope.get_variable("params", ENCODINGS) or {}
        if self.census is None and name in leaves:
            raise ValueError(
                f"There is an encoding for '{path}', which the configuration does not simulate. "
                "Leave it out of the tree, or simulate it by a QuantizerRule."
            )

    def _simulated(
        self,
        call: Call,
        name: str,
        value: Array,
        path: str,
        quantizer: Quantizer,
        contracted: tuple[int, ...] | None,
    ) -> Array:
        leaves = (call.module.scope.get_variable("params", ENCODINGS) or {}).get(name)
        if leaves is None:
            raise ValueError(
                f"'{path}' is simulated ({quantizer!r}), but has no encoding. Compute encodings on "
                "batches that reach it by `quantsim.compute_encodings`, or leave it out by "
                f"`QuantizerRule({path!r}, None)`."
            )
        if path in self.observed:
            return note(value, leaves[INDEX].reshape(()), path)
        if self.quantizers.get(path) != quantizer:
            raise ValueError(
                f"The encoding of '{path}' was made for {self.quantizers.get(path)!r}, but the "
                f"model simulates {quantizer!r}. Compute it anew by `quantsim.compute_encodings` "
                "(unfrozen, if it is frozen), or keep the configuration that it was made for."
            )
        if quantizer.method is not None:
            assert contracted is not None
            with naming(path):
                axes = axes_for(quantizer.method, contracted)
                return simulate_quantize(value, quantizer.method, axes)
        shape = scale_shape(value.shape, contracted, quantizer, path)
        scale, offset = leaves[SCALE], leaves[OFFSET]
        if contracted is None:
            grid = (1,) * (max(value.ndim, 1) - 1) + shape
            fits = all(leaf.size == shape[0] for leaf in (scale, offset))
        else:
            grid, fits = shape, scale.shape == offset.shape == shape
        if not fits:
            raise ValueError(
                f"'{path}' of shape {value.shape} needs scales and offsets of shape {shape}, but "
                f"its encoding has {scale.shape} and {offset.shape}. Give the encodings that were "
                "computed for this model."
            )
        array = value.reshape(value.shape or (1,))
        scale, offset = scale.reshape(grid), offset.reshape(grid)
        return fake_quantize(array, scale, offset, quantizer.bitwidth).reshape(value.shape)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors of array functions say which array they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error


def _rank(call: Call) -> int:
    """How many axes the module's weight has, without those of a stack."""
    layer = find_layer(call.module)
    weight = layer and meta.unbox(call.module.scope.get_variable("params", layer.param))
    return max(1, getattr(weight, "ndim", 1))


@dataclasses.dataclass(frozen=True)
class _InputRule(Rule):
    """The module, and adapters beside it, are given what quantization leaves of the input."""

    order: ClassVar[int] = INPUT
    name = "simulated quantization of inputs"
    simulation: Simulate

    def around(self, call: Call, proceed: Proceed) -> Any:
        layer = find_layer(call.module)
        call = dataclasses.replace(call, simulated=functools.partial(self._of_adapter, call))
        if layer is not None and call.method in layer.methods:
            x, field, parts = layer.input(call), "inputs", 1
        elif call.method != "setup":
            x, field, parts = next(iter(call.args), None), None, 2
        else:
            return proceed(call)
        if not isinstance(x, _ARRAYS):
            return proceed(call)
        name = _named(call, "input")
        if recording():  # the weight, which says how the layer is stacked, comes with the call
            y = proceed(call)
            self.simulation.seen(call, name, x, field, parts=parts)
            return y
        seen = self.simulation.seen(call, name, x, field, parts=parts)
        return proceed(call if seen is x else _with_input(call, x, seen, name))

    def _of_adapter(
        self,
        call: Call,
        adapter: str,
        leaf: str,
        value: Array,
        contracted: tuple[int, ...] | None,
    ) -> Array:
        field = "adapter_hidden" if leaf.endswith("hidden") else _ADAPTER_FIELDS.get(leaf)
        return self.simulation.seen(
            call, f"{adapter}/{leaf}", value, field, contracted=contracted, of_adapter=True
        )


@dataclasses.dataclass(frozen=True)
class _WeightRule(Rule):
    """The module reads its parameters, and gives its output, as quantization leaves them."""

    order: ClassVar[int] = SIMULATION
    name = "simulated quantization of weights and outputs"
    simulation: Simulate

    def at_weight(self, call: Call) -> bool:
        if recording():
            return True
        names = call.module.scope.variables().get("params", {})
        return any(self._quantizer(call, name) and not _is_stored(call, name) for name in names)

    def _quantizer(self, call: Call, name: str) -> Quantizer | None:
        """How a parameter is quantized."""
        path = "/".join((*call.module.scope.path, name))
        return self.simulation.config.quantizer(path, _field(call, name))

    def transform(self, call: Call, name: str, value: Any) -> Any:
        if not isinstance(value, _ARRAYS) or _is_stored(call, name):
            return value
        layer, field = find_layer(call.module), _field(call, name)
        contracted = tuple(range(-value.ndim, -1))
        if layer is not None and field is not None:
            contracted = contracted_axes(layer.equation(call))
        return self.simulation.seen(call, name, value, field, contracted=contracted)

    def around(self, call: Call, proceed: Proceed) -> Any:
        layer, y = find_layer(call.module), proceed(call)
        is_product = layer is not None and call.method in layer.methods
        if call.method == "setup" or not isinstance(y, jax.Array):
            return y
        field, parts = ("outputs", 1) if is_product else (None, 2)
        return self.simulation.seen(call, _named(call, "output"), y, field, parts=parts)


def _field(call: Call, name: str) -> str | None:
    """Which field of the configuration is about a parameter; None: it has to be named."""
    layer = find_layer(call.module)
    return "weights" if layer is not None and name == layer.param else None


def _named(call: Call, name: str) -> str:
    return name if call.method == "__call__" else f"{call.method}_{name}"


def _is_stored(call: Call, name: str) -> bool:
    """Whether a parameter is stored in few bits, and so has its grid already."""
    return as_stored(meta.unbox(call.module.scope.get_variable("params", name))) is not None


def _with_input(call: Call, x: Any, seen: Array, name: str) -> Call:
    """The call with another array in the place of its input."""
    if not any(arg is x for arg in (*call.args, *call.kwargs.values())):
        raise ValueError(
            f"The input of {type(call.module).__name__} at '{call.path}' is computed from its "
            "arguments, so that no other can be given in its place. Leave it out by "
            f"`QuantizerRule('{call.path}/{name}', None)`, or register the layer with the name "
            "of an argument as its input."
        )
    return dataclasses.replace(
        call,
        args=tuple(seen if arg is x else arg for arg in call.args),
        kwargs={key: seen if arg is x else arg for key, arg in call.kwargs.items()},
    )


class _Simulated(Wrapper):
    """A module that computes as if it were quantized."""

    simulation: Simulate

    @nn.nowrap
    def rule(self) -> Rule:
        return _WeightRule(self.simulation)

    @nn.nowrap
    def unwrap(self) -> tuple[tuple[Rule, ...], nn.Module]:
        rules, module = super().unwrap()
        return (_InputRule(self.simulation), *rules), module
