"""The table of initializers."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from peft_jax._config import CordaConfig, EvaConfig, LoftQConfig, LoraConfig
from peft_jax.initializers._decompositions import corda, fast_pissa, olora, pissa
from peft_jax.initializers._draws import drawn, eva
from peft_jax.initializers._loftq import loftq
from peft_jax.initializers._start import Start, Target


@dataclasses.dataclass(frozen=True)
class Initializer:
    """One way to start adapters.

    Attributes:
      start: from an adapter and its weight to the adapter at its start.
      takes_weight: whether the adapter takes part of the weight, so that the base changes.
      config: the class of its settings, all of which have defaults.
      statistics: what it needs to know of each layer's inputs, and where to get it.
    """

    start: Callable[[Target], Start]
    takes_weight: bool = False
    config: type | None = None
    statistics: str | None = None


# A capital N at the end of a name stands for a number.
INITIALIZERS: Mapping[bool | str, Initializer] = {
    True: Initializer(functools.partial(drawn, True)),
    False: Initializer(functools.partial(drawn, False)),
    "gaussian": Initializer(functools.partial(drawn, "gaussian")),
    "orthogonal": Initializer(functools.partial(drawn, "orthogonal")),
    "pissa": Initializer(pissa, takes_weight=True),
    "pissa_niter_N": Initializer(fast_pissa, takes_weight=True),
    "olora": Initializer(olora, takes_weight=True),
    "loftq": Initializer(loftq, takes_weight=True, config=LoftQConfig),
    "eva": Initializer(
        eva, config=EvaConfig, statistics="components: `peft.get_eva_state_dict` finds them"
    ),
    "corda": Initializer(
        corda,
        takes_weight=True,
        config=CordaConfig,
        statistics="covariances: `peft.collect_covariances` finds them",
    ),
}


def find_initializer(method: Any) -> tuple[Initializer, int]:
    """The row of the table that a method names, and the number in the name.

    Raises:
      ValueError: where there is none.
    """
    if isinstance(method, bool | str) and method in INITIALIZERS and method != "pissa_niter_N":
        return INITIALIZERS[method], 0
    numbered = re.fullmatch(r"(\w*_)(\d+)", method) if isinstance(method, str) else None
    if numbered is not None and f"{numbered[1]}N" in INITIALIZERS:
        return INITIALIZERS[f"{numbered[1]}N"], int(numbered[2])
    names = [name for name in INITIALIZERS if isinstance(name, str)]
    close = difflib.get_close_matches(str(method), names, 3)
    raise ValueError(
        f"init_lora_weights: method={method!r} is none of True, False and {names} (N is a number)."
        + (f" Close names: {close}." if close else "")
    )


def method_of(config: LoraConfig, method: Any) -> tuple[Any, Any]:
    """The method that a config says, and the settings of that method.

    Raises:
      ValueError: where another method is asked for.
    """
    said = config.init_lora_weights
    if method is not True and method != said:
        raise ValueError(
            f"init_lora_weights: method={method!r}, but LoraConfig.init_lora_weights = {said!r}. "
            "Leave method out, or pass the settings of this method alone as config."
        )
    settings = {
        "loftq": config.loftq_config,
        "eva": config.eva_config,
        "corda": config.corda_config,
    }
    return said, settings.get(str(said))


def settings_of(row: Initializer, method: Any, config: Any) -> Any:
    """The settings of a method: those given, or its defaults.

    Raises:
      ValueError: where they are another method's.
    """
    if config is None:
        return None if row.config is None else row.config()
    if row.config is None or not isinstance(config, row.config):
        wanted = "no config" if row.config is None else f"a {row.config.__name__}"
        raise ValueError(
            f"init_lora_weights: method={method!r} takes {wanted}, got "
            f"{type(config).__name__}. Pass config={row.config and row.config.__name__}."
        )
    return config
