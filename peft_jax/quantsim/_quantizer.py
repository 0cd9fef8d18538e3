"""What is quantized and how, as data: quantizers, rules by path, the configuration."""

from __future__ import annotations

import dataclasses
import fnmatch
import numbers
from collections.abc import Iterable
from typing import Any

from peft_jax._numerics import QuantizationMethod
from peft_jax._spec import is_number

GRANULARITIES = ("tensor", "channel", "block")
CALIBRATIONS = ("min_max", "percentile", "mse", "moving_average")
_AFFINE_METHODS = ("int4", "int8", "q4_0", "q4_0_transpose")
LARGEST = 3.4e38  # what float32 holds


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How one array is quantized: ``(code + offset) * scale`` with codes ``0 .. 2**bitwidth - 1``.

    Attributes:
      bitwidth: from 2 to 16.
      symmetric: whether the grid is ``-2**(bitwidth-1) .. 2**(bitwidth-1) - 1`` times the scale;
        otherwise it begins where the values do, with zero among its points.
      granularity: one scale for the ``tensor``; for each ``channel``, which is an output of the
        product for a weight (of ``x·W``; of ``x·a``, a rank; of ``(x·a)·b``), and an index of the
        last axis for what flows between layers; or for each ``block`` of ``block_size`` values
        along ``axis``, every index of the other axes by itself.
      block_size: of the granularity ``block``; divides the axis.
      axis: of the blocks, counted from the end; None: the last axis that the layer contracts. What
        flows between layers has its blocks along the last axis.
      calibration: how the range follows from the values seen. ``min_max``: all of them;
        ``percentile``: without the outermost ``100 - percentile`` percent at each end; ``mse``: the
        least mean squared error (both to within 1/2048 of the largest magnitude);
        ``moving_average``: of the smallest and of the largest of each batch, ``momentum * average +
        (1 - momentum) * batch`` (the only one that depends on how values are split into batches).
      percentile: above 50, at most 100.
      momentum: between 0 and 1.
      range: a fixed range in place of a calibrated one.
      method: a method of `quantize_checkpoint` that is such a grid (int4, int8, q4_0,
        q4_0_transpose), for weights: its codes and scales, bit for bit, which follow the weight
        wherever it goes. It says bitwidth, symmetry and granularity by itself. Scales of the Q4_0
        pair may be negative, as GGML has them.
    """

    bitwidth: int = 8
    symmetric: bool = False
    granularity: str = "tensor"
    block_size: int | None = None
    axis: int | None = None
    calibration: str = "min_max"
    percentile: float = 99.99
    momentum: float = 0.9
    range: tuple[float, float] | None = None
    method: QuantizationMethod | None = None

    def __post_init__(self) -> None:
        if self.method is not None:
            self._take(QuantizationMethod(self.method))
        if not _is_integer(self.bitwidth) or not 2 <= self.bitwidth <= 16:
            self._refuse("bitwidth", "is an integer from 2 to 16")
        if not isinstance(self.symmetric, bool):
            self._refuse("symmetric", "is True or False")
        if self.granularity not in GRANULARITIES:
            self._refuse("granularity", f"is one of {GRANULARITIES}")
        if self.calibration not in CALIBRATIONS:
            self._refuse("calibration", f"is one of {CALIBRATIONS}")
        if (self.granularity == "block") != (self.block_size is not None):
            self._refuse("block_size", "goes with granularity='block', and with no other")
        if self.block_size is not None and not (
            _is_integer(self.block_size) and self.block_size >= 1
        ):
            self._refuse("block_size", "is a positive integer")
        if self.axis is not None and not (_is_integer(self.axis) and self.axis < 0):
            self._refuse("axis", "is counted from the end, and so below 0")
        if self.axis is not None and self.granularity != "block":
            self._refuse("axis", "goes with granularity='block', and with no other")
        if not (is_number(self.percentile) and 50 < self.percentile <= 100):
            self._refuse("percentile", "is above 50 and at most 100")
        if not (is_number(self.momentum) and 0 < self.momentum < 1):
            self._refuse("momentum", "is between 0 and 1")
        if self.range is not None:
            self._check_range()
        for field in ("bitwidth", "block_size", "axis"):  # numpy's integers are not JSON's
            value = getattr(self, field)
            object.__setattr__(self, field, None if value is None else int(value))

    def _take(self, method: QuantizationMethod) -> None:
        """Sets the fields that the method settles."""
        if method.value not in _AFFINE_METHODS:
            self._refuse("method", f"is one of {_AFFINE_METHODS}, whose values lie on even grids")
        block = method.block
        settled = {
            "method": method,
            "bitwidth": 8 if method is QuantizationMethod.INT8 else 4,
            "symmetric": True,
            "granularity": "channel" if block is None else "block",
            "block_size": None if block is None else block[1],
            "axis": None if block is None else block[0],
        }
        for field in dataclasses.fields(self):
            given, default = getattr(self, field.name), field.default
            if field.name != "method" and given not in (default, settled.get(field.name, default)):
                self._refuse(field.name, f"goes without method={method.value!r}, which says it all")
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def _check_range(self) -> None:
        given: Any = self.range
        if (
            not isinstance(given, tuple | list)
            or len(given) != 2
            or not all(map(is_number, given))
            or not -LARGEST <= given[0] <= 0 <= given[1] <= LARGEST
            or given[0] == given[1]
        ):
            self._refuse("range", "is (min, max) in float32, with zero between, as on every grid")
        object.__setattr__(self, "range", (float(given[0]), float(given[1])))

    def _refuse(self, field: str, rule: str) -> None:
        raise ValueError(f"Quantizer.{field} = {getattr(self, field)!r}: it {rule}.")

    @property
    def is_calibrated(self) -> bool:
        """Whether its range follows from values seen."""
        return self.range is None and self.method is None

    def __repr__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name == "bitwidth" or getattr(self, field.name) != field.default
        ]
        return f"Quantizer({', '.join(changed)})"


@dataclasses.dataclass(frozen=True)
class QuantizerRule:
    """Another quantizer for some of the arrays; the last rule that matches counts.

    Paths are those of the parameters: ``block_0/query/kernel``; and beside them
    ``block_0/query/input``, ``block_0/query/output`` (``attend_input``, ... for another method than
    ``__call__``), ``block_0/query/lora/a``, ``.../b``, ``.../hidden`` (``x·a``) and
    ``.../scaling``.

    A rule speaks of what the configuration simulates by itself: weights, inputs and outputs of
    layers that `register_layer` knows, and adapters. A further parameter is simulated where the
    pattern's last part is its name (``*/bias``, ``*/norm/scale``, ``*/lora/magnitude``); the
    ``input`` or ``output`` of a module that is no layer where its last two parts name both
    (``*/norm_0/output``).

    Attributes:
      pattern: with the wildcards of a shell (``*`` matches slashes too).
      quantizer: None: what matches is not simulated.
    """

    pattern: str
    quantizer: Quantizer | None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise ValueError(f"QuantizerRule.pattern is a path, got {self.pattern!r}.")
        if self.quantizer is not None and not isinstance(self.quantizer, Quantizer):
            raise ValueError(
                f"QuantizerRule.quantizer is a Quantizer or None, got {self.quantizer!r}."
            )

    def matches(self, path: str) -> bool:
        """Whether it speaks of this path."""
        return fnmatch.fnmatchcase(path, self.pattern)

    def names(self, parts: int) -> bool:
        """Whether the pattern's last parts are names, rather than wildcards alone."""
        last = self.pattern.split("/")[-parts:]
        return not set("*?[") & set(last[-1]) and len(last) == parts and all(map(_is_named, last))


def _is_named(part: str) -> bool:
    return bool(part.strip("*?"))


@dataclasses.dataclass(frozen=True)
class SimulationConfig:
    """What is simulated, and how; see `Quantizer` and `QuantizerRule`.

    Attributes:
      weights: of the layers. None, here and below: not simulated.
      inputs: what a layer's weight is multiplied by, and adapters beside it too; floats alone.
      outputs: what a layer gives, before adapters add to it.
      adapter_weights: ``a`` and ``b``.
      adapter_hidden: ``x·a``.
      adapter_scaling: the factor of ``x·a·b``.
      rules: by path.
    """

    weights: Quantizer | None = Quantizer(8, symmetric=True, granularity="channel")
    inputs: Quantizer | None = Quantizer(8)
    outputs: Quantizer | None = Quantizer(8)
    adapter_weights: Quantizer | None = Quantizer(8, symmetric=True)
    adapter_hidden: Quantizer | None = Quantizer(8)
    adapter_scaling: Quantizer | None = Quantizer(8)
    rules: tuple[QuantizerRule, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[:-1]:
            value = getattr(self, field.name)
            if value is not None and not isinstance(value, Quantizer):
                raise ValueError(
                    f"SimulationConfig.{field.name} is a Quantizer or None, got {value!r}."
                )
        rules: Any = self.rules
        if isinstance(rules, QuantizerRule | str) or not isinstance(rules, Iterable):
            raise ValueError(f"SimulationConfig.rules is a list of QuantizerRules, got {rules!r}.")
        rules = tuple(rules)
        for rule in rules:
            if not isinstance(rule, QuantizerRule):
                raise ValueError(f"SimulationConfig.rules holds QuantizerRules, got {rule!r}.")
        object.__setattr__(self, "rules", rules)

    def with_rules(self, *rules: QuantizerRule) -> SimulationConfig:
        """The configuration with further rules, which count more than those before."""
        return dataclasses.replace(self, rules=(*self.rules, *rules))

    def quantizer(self, path: str, field: str | None, parts: int = 1) -> Quantizer | None:
        """How an array is quantized; None: it is not.

        Args:
          path: of the array.
          field: which of the fields is about it; None: it is simulated only where it is named.
          parts: how many of the last parts of a pattern have to name it then.
        """
        found: Quantizer | None = None if field is None else getattr(self, field)
        for rule in self.rules:
            if rule.matches(path) and (field is not None or rule.names(parts)):
                found = rule.quantizer
        return found
