"""What a `LoraConfig` is made of: enumerations and the configs of single initialisers."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from peft_jax._config import validation as checks

__all__ = [
    "CordaConfig",
    "EvaConfig",
    "LoftQConfig",
    "LoraRuntimeConfig",
    "PeftType",
    "TaskType",
]


class PeftType(enum.StrEnum):
    """The kinds of adapters built here."""

    LORA = "LORA"


class TaskType(enum.StrEnum):
    """What the adapted model is for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


_METHOD_OF_BITS = {4: "nf4", 8: "int8"}


def _method(value: Any) -> str:
    return checks.text(value.value if isinstance(value, enum.Enum) else value)


_LOFTQ_FIELDS: Mapping[str, checks.Reader] = {
    "loftq_bits": checks.integer(1),
    "loftq_iter": checks.integer(1),
    "method": checks.optional(_method),
    "store": checks.flag,
}


@dataclasses.dataclass(frozen=True)
class LoftQConfig:
    """How LoftQ quantizes the weights that an adapter then corrects (arXiv:2310.08659).

    Attributes:
      loftq_bits: bits of each stored value: 4 or 8, or any number beside a ``method``.
      loftq_iter: how often quantization and the low-rank fit take turns.
      method: the quantization method by name, such as ``nf4``; None: chosen by ``loftq_bits``.
      store: whether the weights come back stored in few bits rather than dequantized.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1
    method: str | None = None
    store: bool = False

    def __post_init__(self) -> None:
        checks.read_fields(self, _LOFTQ_FIELDS)
        if self.method is None and self.loftq_bits not in _METHOD_OF_BITS:
            raise ValueError(
                f"LoftQConfig.loftq_bits = {self.loftq_bits} chooses no quantization method, as "
                f"{list(_METHOD_OF_BITS)} do; name one with `method=`."
            )

    @property
    def quantization(self) -> str:
        """The name of the quantization method."""
        return _METHOD_OF_BITS[self.loftq_bits] if self.method is None else self.method


_EVA_FIELDS: Mapping[str, checks.Reader] = {
    "rho": checks.number("a finite number of at least 1", lambda x: x >= 1),
    "tau": checks.number("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "use_label_mask": checks.flag,
    "label_mask_value": checks.integer(),
    "whiten": checks.flag,
    "adjust_scaling_factors": checks.flag,
}


@dataclasses.dataclass(frozen=True)
class EvaConfig:
    """How EVA finds directions and ranks from the inputs of each layer (arXiv:2410.07170).

    Attributes:
      rho: a layer's rank grows to ``rho * r`` at most; 1 keeps all ranks equal.
      tau: a layer is done when its directions of two steps in turn are this similar (cosine).
      use_label_mask: whether positions whose label is ``label_mask_value`` are left out.
      label_mask_value: the label of such positions.
      whiten: whether directions are divided by their singular values.
      adjust_scaling_factors: whether alpha follows the rank, so that gradients keep their scale.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        checks.read_fields(self, _EVA_FIELDS)


_NO_FILE = checks.only(None, "; pass the statistics of the inputs as `statistics=` instead")
_CORDA_FIELDS: Mapping[str, checks.Reader] = {
    "cache_file": _NO_FILE,
    "covariance_file": _NO_FILE,
    "corda_method": checks.choice(("ipm", "kpm")),
    "verbose": checks.flag,
    "use_float16_for_covariance": checks.flag,
    "prune_temporary_fields": checks.flag,
}


@dataclasses.dataclass(frozen=True)
class CordaConfig:
    """How CorDA orients the decomposition of weights by their inputs (arXiv:2406.05223).

    Attributes:
      cache_file: not built (it holds a pickle); None alone.
      covariance_file: not built (it holds a pickle); None alone.
      corda_method: ``ipm`` adapts the directions that the inputs use most, ``kpm`` those that they
        use least.
      verbose: whether progress is printed.
      use_float16_for_covariance: whether covariances are held in float16.
      prune_temporary_fields: kept; here nothing temporary stays behind.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        checks.read_fields(self, _CORDA_FIELDS)


@dataclasses.dataclass(frozen=True)
class LoraRuntimeConfig:
    """Settings of one run, which no file keeps.

    Attributes:
      ephemeral_gpu_offload: kept; it means nothing on JAX.
    """

    ephemeral_gpu_offload: bool = False

    def __post_init__(self) -> None:
        checks.read_fields(self, {"ephemeral_gpu_offload": checks.flag})


def runtime(value: Any) -> LoraRuntimeConfig:
    if isinstance(value, Mapping):
        return checks.data(LoraRuntimeConfig)(value) or LoraRuntimeConfig()
    if not hasattr(value, "ephemeral_gpu_offload"):
        raise ValueError("it is a dict or an object with the field 'ephemeral_gpu_offload'")
    return LoraRuntimeConfig(value.ephemeral_gpu_offload)
