"""What a config must say of the adapters beside it, and a config in the names of another side."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from peft_jax._config import (
    PATTERN_FORM,
    LoraConfig,
    alpha_of,
    is_all_linear,
    is_saved,
    matches,
    rank_of,
    scaling_of,
    selects,
    selects_parameter,
    tokens_of,
)
from peft_jax._spec import LoraSpec

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Named:
    """One layer's adapter, under the names of one side.

    Attributes:
      module: that holds the parameter.
      param: name of the parameter.
      by_parameter: whether ``target_parameters`` is to name it.
    """

    module: Path
    param: str
    by_parameter: bool

    @property
    def path(self) -> Path:
        """What the config's patterns are matched with."""
        return (*self.module, self.param) if self.by_parameter else self.module


def by_parameter(config: LoraConfig, module: Path, param: str, kind: str | None) -> bool:
    """Whether a config adapts a parameter by ``target_parameters``, not by its module."""
    if kind == "experts":
        return True
    by_module = config.target_modules is not None and selects(config, module)
    return not by_module and selects_parameter(config, (*module, param))


def disagreements(config: LoraConfig, named: Named, spec: LoraSpec) -> list[str]:
    """Where a config says otherwise than the spec of one adapter."""
    if spec.variant == "tokens":
        tokens = tokens_of(config, named.module, is_table=True)
        return [] if tokens == spec.tokens else [f"trainable_token_indices {list(tokens)[:8]}"]
    said = []
    if named.by_parameter:
        chosen = selects_parameter(config, named.path)
    else:
        chosen = config.target_modules is None or selects(config, named.module)
    if not chosen:
        said.append("no adapter there")
    if rank_of(config, named.path) != spec.rank:
        said.append(f"rank {rank_of(config, named.path)} for {spec.rank}")
    scaling = scaling_of(config, named.path)
    if not math.isclose(scaling, spec.scaling, rel_tol=1e-6):
        alpha = alpha_of(config, named.path)
        said.append(
            f"lora_alpha {alpha} and use_rslora {config.use_rslora}, a scaling of {scaling:g} for "
            f"{spec.scaling:g}"
        )
    if config.use_dora != (spec.variant == "dora"):
        said.append(f"use_dora {config.use_dora}")
    if config.lora_bias != (spec.bias is not None):
        said.append(f"lora_bias {config.lora_bias}")
    return said


def trains(config: LoraConfig, path: Path, *, adapted: bool) -> bool:
    """Whether a config trains a whole parameter, in a module that is adapted or not."""
    if is_saved(config, path):
        return True
    return path[-1] == "bias" and (config.bias == "all" or (adapted and config.bias == "lora_only"))


def unmatched(
    config: LoraConfig, adapters: Sequence[Named] | None, whole: Sequence[Path]
) -> list[str]:
    """Entries of a config that none of these adapters (None: any) and parameters is named by."""
    dotted = [".".join(one.path) for one in adapters or ()]
    lone = []
    for field in ("target_modules", "target_parameters"):
        entries = getattr(config, field) or ()
        if adapters is not None and not isinstance(entries, str):
            lone += [
                f"{field} {entry!r}"
                for entry in entries
                if not any(matches((entry,), name) for name in dotted)
            ]
    for entry in config.modules_to_save or ():
        one = dataclasses.replace(config, modules_to_save=(entry,))
        if not any(is_saved(one, path) for path in whole):
            lone.append(f"modules_to_save {entry!r}")
    return lone


# --- The same config in other names --------------------------------------------------------------


def renamed_config(
    config: LoraConfig,
    adapters: Sequence[tuple[Named, Named, LoraSpec]],
    whole: Sequence[tuple[Path, Path]],
) -> LoraConfig:
    """A config that says of other names what it says of these.

    Where all names are the same, and the config itself lists names or is an expression, it stays.
    Otherwise all adapted modules are listed by their whole names; ranks and alphas that differ are
    listed so too.

    Args:
      config: in the names of the one side.
      adapters: the names on its side, those on the other, and the spec.
      whole: paths of the modules that are trained whole, on its side and on the other.
    """
    same = all(a.path == b.path for a, b, _ in adapters) and all(a == b for a, b in whole)
    listed = config.target_modules is not None and not is_all_linear(config)
    config = _with_whole_modules(config, whole, same)
    if same and listed and not config.layers_to_transform:
        return _dotted(config)
    low_rank = [(a, b) for a, b, spec in adapters if spec.variant != "tokens"]
    modules = [".".join(b.path) for _, b in low_rank if not b.by_parameter]
    parameters = [".".join(b.path) for _, b in low_rank if b.by_parameter]
    ranks = {".".join(b.path): rank_of(config, a.path) for a, b in low_rank}
    alphas = {".".join(b.path): alpha_of(config, a.path) for a, b in low_rank}
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        tokens = {
            ".".join(b.module): spec.tokens for _, b, spec in adapters if spec.variant == "tokens"
        }
    return dataclasses.replace(
        config,
        target_modules=_unique(modules) if modules or parameters else config.target_modules,
        target_parameters=_unique(parameters) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=_pattern(ranks, config.r),
        alpha_pattern=_pattern(alphas, config.lora_alpha),
        trainable_token_indices=tokens,
    )


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _with_whole_modules(
    config: LoraConfig, whole: Sequence[tuple[Path, Path]], same: bool
) -> LoraConfig:
    """With whole names for the entries of ``modules_to_save`` that name a module by its end.

    Hugging Face's peft takes every module whose name ends in such an entry, ``norm`` for
    ``input_layernorm`` too.
    """
    if not config.modules_to_save:
        return config
    kept: list[str] = []
    for entry in config.modules_to_save:
        pattern = re.compile(PATTERN_FORM.format(entry.replace("/", ".")))
        named = [".".join(theirs) for ours, theirs in whole if pattern.fullmatch(".".join(ours))]
        if named or same:
            kept += named or [entry]
        else:
            one = dataclasses.replace(config, modules_to_save=(entry,), target_modules=None)
            kept += [".".join(theirs) for ours, theirs in whole if is_saved(one, ours)]
    return dataclasses.replace(config, modules_to_save=_unique(kept))


def _dotted(config: LoraConfig) -> LoraConfig:
    """With dots for the slashes that names may have here."""

    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key.replace("/", "."): item for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(v.replace("/", ".") if isinstance(v, str) else v for v in value)
        return value

    fields = (
        *("target_modules", "exclude_modules", "target_parameters", "modules_to_save"),
        *("rank_pattern", "alpha_pattern", "trainable_token_indices"),
    )
    return dataclasses.replace(config, **{name: turned(getattr(config, name)) for name in fields})


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """The pattern by which each whole name gets its value.

    The first key counts that matches the end of a name, as a regular expression; so longer names go
    first, and names that a shorter one would match are listed though they have the default.
    """
    names = sorted(values, key=lambda name: (-len(name), name))
    made = {name: values[name] for name in names if values[name] != default}
    if any(_found(made, name, default) != values[name] for name in names):
        made = {re.escape(name): values[name] for name in names}
    return made


def _found(pattern: dict[str, Any], name: str, default: Any) -> Any:
    return next(
        (v for key, v in pattern.items() if re.match(PATTERN_FORM.format(key), name)), default
    )


# --- Which config goes with which tensors --------------------------------------------------------

_OF_THE_TENSORS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
    *("bias", "target_modules", "exclude_modules", "target_parameters", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "layer_replication", "trainable_token_indices"),
)


def digest(config: LoraConfig) -> str:
    """A checksum of the fields that say what the tensors mean, and of no others."""
    data = config.to_dict()
    chosen = {name: data[name] for name in _OF_THE_TENSORS}
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(chosen[name], list):
            chosen[name] = sorted(chosen[name])
    for name in ("rank_pattern", "alpha_pattern"):  # whose order counts
        chosen[name] = list(chosen[name].items())
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
