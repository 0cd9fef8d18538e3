"""What a rule makes of a module: built where modules wait to be bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from peft_jax._registry import Call
from peft_jax._rules import Untouched


class _Host(nn.Module, Untouched):
    """Where a rule runs: modules that it makes wait to be bound, as they do in any ``setup``.

    Flax would have the module itself for their parent; but it may be past its setup, and a child
    that holds its parent has a `repr` without end.
    """

    make: Callable[[], Any]

    @nn.nowrap
    def sow(self, *args: Any, **kwargs: Any) -> bool:
        """Records nothing: the host is no part of the model."""
        return False

    def setup(self) -> None:
        self.made = _Opaque(self.make())


@dataclasses.dataclass(frozen=True)
class _Opaque:
    """Keeps Flax from taking a module that belongs elsewhere for a child."""

    content: Any


def made(replace_fn: Callable[[Any], Any], call: Call) -> Any:
    """What a rule makes of the module, bound in its scope."""
    module = call.module
    host = _Host(lambda: replace_fn(module), parent=module.scope, name="host")
    replacement = host.made.content
    if isinstance(replacement, nn.Module) and replacement.scope is None:
        return replacement.clone(parent=module.scope, name=module.name or "replacement")
    return replacement
