"""The one base of all wrappers: scope sharing, forwarding, description."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar

from flax import linen as nn

from peft_jax._surgery.flax_internals import (
    Scope,
    bind_in_place,
    is_placed_by_context,
    set_attribute,
)
from peft_jax._surgery.interceptor import call_wrapped
from peft_jax._surgery.layer_kinds import layer_type, require_layer
from peft_jax._surgery.rules import Rule, RuleSource

__all__ = [
    "LayerWrapper",
    "Transparent",
    "Wrapper",
]


class Transparent(nn.Module):
    """A module in the place of another, whose parameters keep their paths.

    It takes the scope of the module that it wraps, or gives it its own where that one has none
    yet, so that neither its name nor ``wrapped`` shows in the parameter tree. Attributes and
    methods that it lacks are those of the wrapped module; its methods run through `_forward`.
    """

    wrapped: nn.Module

    def __post_init__(self) -> None:
        if not isinstance(self.wrapped, nn.Module):
            raise ValueError(
                f"{type(self).__name__}.wrapped is the module to wrap, got {self.wrapped!r}."
            )
        wrapped, implicit = self.wrapped, is_placed_by_context(self)
        if wrapped.scope is not None and implicit:
            if self.name not in (None, wrapped.name):
                raise ValueError(
                    f"{type(self).__name__}(name={self.name!r}) wraps a module that has a name "
                    f"already, {wrapped.name!r}, under which its parameters lie. Name the wrapped "
                    "module instead."
                )
            set_attribute(self, "parent", wrapped.scope)
            set_attribute(self, "name", wrapped.name or "wrapped")  # no child to be named
        # Flax would adopt `wrapped` as a child with a scope of its own: it must not see it.
        set_attribute(self, "wrapped", None)
        try:
            super().__post_init__()
        finally:
            set_attribute(self, "wrapped", wrapped)
        if self.scope is not None and wrapped.scope is None:
            set_attribute(self, "wrapped", self._bind(wrapped, self.scope))

    @nn.nowrap
    def _bind(self, wrapped: nn.Module, scope: Scope) -> nn.Module:
        """The wrapped module, bound to this wrapper's scope under this wrapper's name."""
        name = self.name or wrapped.name or "wrapped"
        if wrapped.parent is None:  # made outside of any module, and maybe used elsewhere too
            return wrapped.clone(parent=scope, name=name)
        bind_in_place(wrapped, scope, name)
        return wrapped

    @nn.nowrap
    def init_with_output(
        self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """As of any Linen module."""
        return super().init_with_output(rngs, *args, method=self._own_method(method), **kwargs)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As of any Linen module."""
        return super().apply(variables, *args, method=self._own_method(method), **kwargs)

    @nn.nowrap
    def _own_method(self, method: Any) -> Any:
        """A method of the wrapped module's class by its name, under which this module has it."""
        name = getattr(method, "__name__", None)
        if name is not None and getattr(layer_type(self._inside()), name, None) is method:
            return name
        return method

    @nn.nowrap
    def _inside(self) -> nn.Module:
        """The module whose methods and attributes are shown."""
        return self.wrapped

    @nn.nowrap
    def _forward(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a method of the module inside."""
        return getattr(self._inside(), method)(*args, **kwargs)

    @nn.nowrap
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped module."""
        return self._forward("__call__", args, kwargs)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks is the wrapped module's."""
        wrapped = self.__dict__.get("wrapped")
        if wrapped is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        module = self._inside()
        if _is_method(layer_type(module), name):
            return types.MethodType(_forwarding(name), self)
        return getattr(module, name)


class Wrapper(Transparent, RuleSource):
    """A module in the place of another, whose methods run under a rule."""

    def rule(self) -> Rule:
        """What this wrapper does to the layer inside, as data."""
        raise TypeError(f"{type(self).__name__} defines no rule.")

    rule = nn.nowrap(rule)

    @nn.nowrap
    def unwrap(self) -> tuple[tuple[Rule, ...], nn.Module]:
        rules: tuple[Rule, ...] = (self.rule(),)
        module = self.wrapped
        if isinstance(module, RuleSource):
            inside, module = module.unwrap()
            rules += inside
        return rules, module

    @nn.nowrap
    def _inside(self) -> nn.Module:
        _, module = self.unwrap()
        return module

    @nn.nowrap
    def _forward(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rules, module = self.unwrap()
        return call_wrapped(module, rules, method, args, kwargs)


class LayerWrapper(Wrapper):
    """A wrapper of layers of certain kinds, told apart by what `register_layer` knows.

    Attributes:
      kinds: the kinds of layers that it wraps.
      verb: what it does to them, in error messages.
      otherwise: what else to do with a layer that is not registered, in error messages.
    """

    kinds: ClassVar[frozenset[str]] = frozenset()
    verb: ClassVar[str] = "wraps"
    otherwise: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_layer()

    @nn.nowrap
    def check_layer(self) -> None:
        """Refuses a layer that this wrapper does not fit."""
        name = type(self).__name__
        _, module = self.unwrap()
        layer = require_layer(module, f"{name} {self.verb}", self.otherwise)
        if layer.kind not in self.kinds:
            fitting = [cls.__name__ for cls in self.siblings() if layer.kind in cls.kinds]
            raise ValueError(
                f"{name} {self.verb} layers of the kind {sorted(self.kinds)}, not "
                f"{layer_type(module).__name__}, which is of the kind {layer.kind!r}. Use "
                f"{' or '.join(fitting)}."
            )
        layer.check(module)

    @classmethod
    def siblings(cls) -> tuple[type[LayerWrapper], ...]:
        """The wrappers that do the same to layers of other kinds."""
        return tuple(cls.__base__.__subclasses__())  # type: ignore[union-attr]


def _is_method(cls: type[nn.Module], name: str) -> bool:
    return isinstance(getattr(cls, name, None), types.FunctionType)


def _forwarding(name: str) -> Callable[..., Any]:
    def forward(self: Transparent, *args: Any, **kwargs: Any) -> Any:
        return self._forward(name, args, kwargs)

    forward.__name__ = name
    return forward
