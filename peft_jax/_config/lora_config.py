"""`LoraConfig`: what to adapt and how, as plain data. It knows no model and imports no jax."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import os
import uuid
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from peft_jax._config import validation as checks
from peft_jax._config.initializer_configs import (
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraRuntimeConfig,
    PeftType,
    TaskType,
    runtime,
)

__all__ = [
    "CONFIG_FILE",
    "LoraConfig",
]


CONFIG_FILE = "adapter_config.json"


_TEXT = checks.optional(checks.text)
_ALPHA = checks.number("a finite number")
_LORA_FIELDS: Mapping[str, checks.Reader] = {
    "task_type": checks.optional(checks.choice(TaskType)),
    "peft_type": checks.default(PeftType.LORA, checks.choice(PeftType)),
    "auto_mapping": checks.optional(checks.json_dict),
    "peft_version": _TEXT,
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "inference_mode": checks.flag,
    "r": checks.integer(1),
    "target_modules": checks.optional(checks.modules_or_all),
    "exclude_modules": checks.optional(checks.modules),
    "lora_alpha": _ALPHA,
    "lora_dropout": checks.number("a rate from 0 and below 1", lambda x: 0 <= x < 1),
    "fan_in_fan_out": checks.flag,
    "bias": checks.choice(("none", "all", "lora_only")),
    "use_rslora": checks.flag,
    "modules_to_save": checks.optional(checks.name_regexes),
    "init_lora_weights": checks.initialiser,
    "layers_to_transform": checks.optional(checks.index_or_indices),
    "layers_pattern": checks.optional(checks.regex_or_regexes),
    "rank_pattern": checks.default({}, checks.dict_of(checks.integer(1), checks.name_regex)),
    "alpha_pattern": checks.default({}, checks.dict_of(_ALPHA, checks.name_regex)),
    "megatron_config": checks.optional(checks.json_dict),
    "megatron_core": _TEXT,
    "trainable_token_indices": checks.optional(checks.tokens),
    "loftq_config": checks.data(LoftQConfig),
    "eva_config": checks.data(EvaConfig),
    "corda_config": checks.data(CordaConfig),
    "use_dora": checks.flag,
    "alora_invocation_tokens": checks.only(None),
    "use_qalora": checks.only(False),
    "qalora_group_size": checks.only(16),
    "layer_replication": checks.optional(checks.ranges),
    "runtime_config": runtime,
    "lora_bias": checks.flag,
    "target_parameters": checks.optional(checks.names),
    "arrow_config": checks.only(None),
    "ensure_weight_tying": checks.only(False),
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers of a model are adapted, and how: the fields of Hugging Face's ``LoraConfig``.

    Names of modules are written with dots or slashes, and match a path whole or from a dot on: as
    ``attn/q`` matches ``layers.0.attn.q``. Regular expressions see dotted paths. Lists are kept as
    tuples, so that configs with the same values are equal and have the same hash.

    Attributes:
      task_type: one of `TaskType`, or None.
      peft_type: `PeftType.LORA`.
      auto_mapping, peft_version, base_model_name_or_path, revision, inference_mode: bookkeeping,
        kept.
      r: the rank.
      target_modules: a list of names; or a regular expression for the whole path; or
        ``all-linear``: every linear layer but the output's; None: by the model's type.
      exclude_modules: names, or a regular expression, of modules that get no adapter.
      lora_alpha: the adapter's output is scaled by ``lora_alpha / r``.
      lora_dropout: rate of dropout before the adapter, from 0 and below 1.
      fan_in_fan_out: kept; here the layer's equation says how its weight lies.
      bias: which biases are trained: ``none``, ``all`` or ``lora_only`` (those of adapted layers).
      use_rslora: whether the scaling is ``lora_alpha / sqrt(r)`` instead (arXiv:2312.03732).
      modules_to_save: names of modules that are trained and saved whole.
      init_lora_weights: True (kaiming and zeros), False (both random), ``gaussian``,
        ``orthogonal``, ``pissa``, ``pissa_niter_N``, ``olora``, ``loftq``, ``eva`` or ``corda``.
      layers_to_transform: an index or a list of indices: the layers that are adapted.
      layers_pattern: name, or list of names, that stands before the index, such as ``h``.
      rank_pattern: ranks other than ``r``, by name or regular expression; the first match counts.
      alpha_pattern: values other than ``lora_alpha``, likewise.
      megatron_config, megatron_core: kept; they mean nothing on JAX.
      trainable_token_indices: rows of the embedding that are trained; or a dict from names of
        embeddings to their rows.
      loftq_config: `LoftQConfig` or a dict of its fields, beside ``init_lora_weights="loftq"``.
      eva_config: `EvaConfig` or a dict of its fields, beside ``init_lora_weights="eva"``.
      corda_config: `CordaConfig` or a dict of its fields, beside ``init_lora_weights="corda"``.
      use_dora: whether magnitude and direction are trained apart (arXiv:2402.09353).
      layer_replication: ranges ``[start, end)`` of layers, which make up the adapted model.
      runtime_config: `LoraRuntimeConfig`; neither compared nor written to files.
      lora_bias: whether the adapter has a bias.
      target_parameters: names of parameters that no module of their own holds, such as the weights
        of experts.
      alora_invocation_tokens, use_qalora, qalora_group_size, arrow_config, ensure_weight_tying:
        not built; they pass at their default values alone.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = PeftType.LORA
    auto_mapping: Mapping[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Collection[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Collection[str] | str | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    megatron_config: Mapping[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Collection[int] | Mapping[str, Collection[int]] | None = None
    loftq_config: LoftQConfig | None = None
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    use_dora: bool = False
    alora_invocation_tokens: None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    layer_replication: Collection[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = dataclasses.field(
        default=LoraRuntimeConfig(), compare=False
    )
    lora_bias: bool = False
    target_parameters: Collection[str] | None = None
    arrow_config: None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        checks.read_fields(self, _LORA_FIELDS)
        for initialiser, config in (("eva", EvaConfig()), ("corda", CordaConfig())):
            field = f"{initialiser}_config"
            if self.init_lora_weights == initialiser and getattr(self, field) is None:
                object.__setattr__(self, field, config)
        for field, contradicts, words in checks.CONTRADICTIONS:
            if contradicts(self):
                value = checks.shown(getattr(self, field))
                raise ValueError(f"LoraConfig.{field} = {value} {words}.")
        _tell_once(self)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # Rules are looked up by their config for each module of each trace.
        values = (
            getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.compare and field.name not in ("auto_mapping", "megatron_config")
        )
        return hash(
            tuple(
                frozenset(value.items()) if isinstance(value, dict) else value for value in values
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        # Hashes of strings differ from process to process, so that a kept one is not pickled.
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON, with Hugging Face's keys. Inverse of `from_dict`."""
        written = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del written["runtime_config"]
        if self.loftq_config is None:
            written["loftq_config"] = {}
        return {name: _plain(value) for name, value in written.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoraConfig:
        """Reads what `to_dict` or Hugging Face's ``to_dict`` wrote.

        Fields of other versions pass where they are empty or False. Where ``init_lora_weights`` is
        True, what is left of ``eva_config`` and ``corda_config`` is left out: Hugging Face leaves
        it behind when it turns such an adapter into a plain one.

        Raises:
          ValueError: on a field that is unknown, or a value that is not allowed.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"LoraConfig.from_dict takes a dict, got {checks.shown(data)}.")
        known = [field.name for field in dataclasses.fields(cls)]
        given = {name: value for name, value in data.items() if name in known}
        for name, value in data.items():
            if name not in given and not _is_empty(value):
                raise ValueError(
                    f"LoraConfig.{name} = {checks.shown(value)}: there is no such field"
                    f"{checks.closest(name, known)}. Leave it out if the adapter works without it."
                )
        if given.get("init_lora_weights") is True:
            given = {k: v for k, v in given.items() if k not in ("eva_config", "corda_config")}
        return cls(**given)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> LoraConfig:
        """Reads the ``adapter_config.json`` of a directory, or that file itself.

        Raises:
          ValueError: with the path, where it cannot be read, or on what `from_dict` refuses.
        """
        try:
            file = Path(path)
            file = file / CONFIG_FILE if file.is_dir() else file
            data = json.loads(file.read_text(encoding="utf-8"))
        except (TypeError, OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"No config could be read from {str(path)!r}: {error}. It is a directory with a "
                f"file {CONFIG_FILE}, or such a file, of JSON."
            ) from error
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{error} It was read from {str(file)!r}.") from error

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``adapter_config.json`` into the directory. Inverse of `from_pretrained`.

        The file appears whole or not at all. Patterns keep their order, which decides between
        them.

        Raises:
          ValueError: where the path is a file, or a value of ``auto_mapping`` or
            ``megatron_config`` is no JSON.
        """
        try:
            text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                "LoraConfig.auto_mapping and LoraConfig.megatron_config hold dicts, lists, "
                f"strings, finite numbers, booleans and None where they are saved: {error}."
            ) from error
        try:
            folder = Path(directory)
            folder.mkdir(parents=True, exist_ok=True)
        except (TypeError, FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"{str(directory)!r} is not a directory to save in: {error}."
            ) from error
        _replace(folder / CONFIG_FILE, text)


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, dict | list | str) and not value)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, LoftQConfig):  # fields that Hugging Face lacks only where they say more
        own = {"method": None, "store": False}
        fields = dataclasses.asdict(value).items()
        return {name: item for name, item in fields if name not in own or item != own[name]}
    if isinstance(value, EvaConfig | CordaConfig):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


def _replace(file: Path, text: str) -> None:
    """Writes the text under another name first, so that no reader meets half a file."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


_FOREIGN: Mapping[str, Callable[[LoraConfig], bool]] = {
    "megatron_config": lambda config: bool(config.megatron_config),
    "megatron_core": lambda config: config.megatron_core != "megatron.core",
    "runtime_config.ephemeral_gpu_offload": lambda c: c.runtime_config.ephemeral_gpu_offload,
}
_TOLD: set[str] = set()


def _tell_once(config: LoraConfig) -> None:
    for field, is_given in _FOREIGN.items():
        if is_given(config) and field not in _TOLD:
            _TOLD.add(field)
            warnings.warn(
                f"LoraConfig.{field} means nothing on JAX: it is kept and not used.", stacklevel=4
            )
