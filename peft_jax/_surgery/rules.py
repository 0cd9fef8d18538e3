"""What a wrapper does to a layer, as data: the language between wrappers and the dispatcher."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from flax import linen as nn

from peft_jax._surgery.flax_internals import lifts_around

__all__ = [
    "ADAPTER",
    "INPUT",
    "IN_PARTS",
    "SIMULATION",
    "STORAGE",
    "Call",
    "Init",
    "Proceed",
    "Rule",
    "Untouched",
]


STORAGE, SIMULATION, TOKENS, ADAPTER, INPUT = range(5)
# Set on a bound module while it may be given its weight as a `Weight`, values and scale apart.
IN_PARTS = "_peft_jax_in_parts"
Init = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a method of a bound module.

    Attributes:
      module: the module, of a type that the reader knows.
      changed: whether simulation or an adapter changes the weight that this call reads.
      adapted: whether an adapter is what changes it, or one of those that do.
      weight: the layer's weight as it is read beneath all adapters: an array, or a `Weight` where
        it is stored in few bits. None until the dispatcher has its rules together.
      simulated: what simulation makes of an array of an adapter: a function of the adapter's name
        in the tree, and of what `LoRAAdapter.seen` takes. None: nothing.
    """

    module: Any
    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    changed: bool = False
    adapted: bool = False
    weight: Callable[[], Any] | None = None
    simulated: Callable[..., Any] | None = None

    @property
    def path(self) -> str:
        """The module's slashed path; ``(the model itself)`` at the root."""
        return "/".join(self.module.scope.path) or "(the model itself)"

    @property
    def mapped(self) -> bool:
        """Whether it runs inside ``nn.map_variables``, on parameters that are not those stored."""
        return "map_variables" in lifts_around(self.module.scope)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the call, given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def with_argument(self, position: int, name: str, value: Any) -> Call:
        """The call with another value for an argument that it has."""
        if position < len(self.args):
            args = (*self.args[:position], value, *self.args[position + 1 :])
            return dataclasses.replace(self, args=args)
        return dataclasses.replace(self, kwargs={**self.kwargs, name: value})


Proceed = Callable[[Call], Any]


class Untouched:
    """Mixin of modules that interceptors leave alone: the adapters themselves."""


class Rule:
    """What a wrapper does to the layer inside, as data that compares by value.

    Attributes:
      order: rules are applied in this order, whatever the order of nesting.
      name: two rules of one name may not meet on one layer.
      covers_children: whether parameters of the module's submodules are transformed too.
    """

    order: ClassVar[int]
    name: str
    covers_children: ClassVar[bool] = False

    def concerns(self, call: Call) -> bool:
        """Whether the rule, inherited from an enclosing module, does anything to this one."""
        return True

    def at_weight(self, call: Call) -> bool:
        """Whether this call reads its parameters through `transform`."""
        return False

    def read(self, call: Call, name: str, make: Init, read: Callable[[Init], Any]) -> Any:
        """How the module's parameter is read, or made: what ``self.param(name, make)`` does.

        Args:
          call: the call that reads.
          name: of the parameter.
          make: from a key to the parameter's first value.
          read: what the module, and rules of lower order, do with ``make``.

        Returns:
          The parameter, in its box if it has one.
        """
        return read(make)

    def transform(self, call: Call, name: str, value: Any) -> Any:
        """The value that the module reads in place of its parameter."""
        return value

    def around(self, call: Call, proceed: Proceed) -> Any:
        """Runs the call, as it is or with other arguments, and what comes beside it."""
        return proceed(call)

    # Rules of one order that meet on a layer act together. Unless a kind of rules says otherwise,
    # each acts on what the one before has made.

    @staticmethod
    def transform_together(rules: Sequence[Rule], call: Call, name: str, value: Any) -> Any:
        """What `transform` is for one rule, for all rules of this order."""
        for rule in rules:
            value = rule.transform(call, name, value)
        return value

    @staticmethod
    def around_together(rules: Sequence[Rule], call: Call, proceed: Proceed) -> Any:
        """What `around` is for one rule, for all rules of this order."""
        for rule in rules:
            proceed = functools.partial(_around, rule, proceed)
        return proceed(call)


def _around(rule: Rule, proceed: Proceed, call: Call) -> Any:
    return rule.around(call, proceed)


class RuleSource(abc.ABC):
    """A module that stands for rules on the module that it wraps."""

    @abc.abstractmethod
    def unwrap(self) -> tuple[tuple[Rule, ...], nn.Module]:
        """The rules of this wrapper and those inside it, outermost first, and the module inside."""
