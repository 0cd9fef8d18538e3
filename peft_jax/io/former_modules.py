"""Pickles name the module of each class: those of version 0.1, before the package had wings.

Loading one imports the former module, which is now the face of the wing that has the class.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping

_FORMER: Mapping[str, str] = {
    "_adapters": "_layers",
    "_config_parts": "_config",
    "_interceptor": "_surgery",
    "_lora": "_layers",
    "_methods": "_numerics",
    "_peft_model": "_model",
    "_quantized": "_layers",
    "_replication._shared": "_trees",
    "_specs": "_spec",
    "_status": "_model",
    "_stored": "_numerics",
    "_summary": "_model",
    "adapters._slots": "_numerics",
}


def _name_former_modules() -> None:
    package = __name__.partition(".")[0]
    for former, wing in _FORMER.items():
        sys.modules.setdefault(f"{package}.{former}", importlib.import_module(f"{package}.{wing}"))


_name_former_modules()
