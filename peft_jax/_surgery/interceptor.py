"""Model surgery: one dispatcher that applies rules to the modules of a running model.

The walk of a call: Flax hands each method call to `_dispatch`; the outermost hook asks every active
interceptor, and every wrapper being called, for the rules of that module; sorts them (storage below
simulation below adapters); and runs them around Flax's ``next_fun``, the module's own method.
Nothing is kept but the `ContextVar` and what lies on the bound module itself, which Flax drops
with the call.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

from flax import linen as nn
from flax.core import meta

from peft_jax._numerics import as_stored
from peft_jax._surgery.active import (
    Extent,
    Local,
    State,
    check_task,
    close_entry,
    current,
    open_entry,
    using,
)
from peft_jax._surgery.flax_internals import is_lifted_function, method_hook
from peft_jax._surgery.layer_kinds import find_layer, layer_type
from peft_jax._surgery.rebuilt_rules import warn_of_rebuilt_rule
from peft_jax._surgery.rules import ADAPTER, STORAGE, Call, Proceed, Rule, RuleSource, Untouched
from peft_jax._surgery.weight_reads import by_order, made, reading_through, weight_beneath

__all__ = [
    "Interceptor",
    "ModuleInterceptor",
    "special_call",
]


_PLANS = "_peft_jax_plans"

# Calls that adapters treat in a way of their own: (type, method) -> function of (call, proceed).
_SPECIAL_CALLS: dict[tuple[type[nn.Module], str], Callable[[Call, Proceed], Any]] = {}


def special_call(module_type: type[nn.Module], around: Callable[[Call, Proceed], Any]) -> None:
    """Has ``around(call, proceed)`` run each ``__call__`` of a type while rules are active."""
    _SPECIAL_CALLS[module_type, "__call__"] = around


class Interceptor(abc.ABC):
    """Base of interceptors: a method interceptor of Flax as a context manager.

    Within the ``with`` statement, `interceptor` is called for each method call of each module, as
    by ``nn.intercept_methods``. ``jax.jit`` caches know of it: a function that is traced inside
    never serves outside, nor the other way round, and equal interceptors (``==``) share one
    program. Threads do not see each other's interceptors.

    Interceptors must be hashable; make them frozen dataclasses.
    """

    @abc.abstractmethod
    def interceptor(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Runs in place of a module's method; ``next_fun(*args, **kwargs)`` is the method."""

    def __enter__(self) -> Interceptor:
        try:
            hash(self)
        except TypeError as error:
            raise ValueError(
                f"An interceptor's rule must be hashable, since jax.jit keys its caches by it; "
                f"{self!r} is not. Make the rule a function or a frozen dataclass."
            ) from error
        open_entry(self, method_hook(_hook))
        return self

    def __exit__(self, *exception: object) -> None:
        close_entry(self)


@dataclasses.dataclass(frozen=True)
class ModuleInterceptor(Interceptor):
    """Replaces modules of any model by wrapped ones, without touching the model's code.

    ``replace_fn`` is called once for each bound module, when its first method runs, and returns the
    module itself or what shall run in its place: a wrapper of this library around it, or any
    module with the same methods, which takes over the module's scope and so its parameters' paths.

    Example::

      @dataclasses.dataclass(frozen=True)
      class Adapt:
        rank: int

        def __call__(self, module):
          if isinstance(module, nn.Dense):
            return peft.LoRADense(rank=self.rank, wrapped=module)
          return module

      with peft.ModuleInterceptor(Adapt(rank=3)):
        params = model.init(key, x)["params"]

    Interceptors nest in any order: stored weights come first, then simulated quantization, then
    adapters. Parameters keep their paths; the base's initial values and dropout masks are bit
    for bit those of the plain model.

    Not replaced are: modules inside a lifted class as seen from outside (``nn.remat(nn.Dense)``
    is reached inside the lift), modules run by another module's ``.apply`` on parameters of its
    own making, and adapters.

    Attributes:
      replace_fn: from a bound module to a module. Rules compare by ``==``: a function that is built
        anew for every step is a new program each time, for ``jax.jit`` too. Prefer functions at
        module level and frozen dataclasses.
    """

    replace_fn: Callable[[nn.Module], nn.Module]

    def __post_init__(self) -> None:
        rule = self.replace_fn
        if not callable(rule) or isinstance(rule, nn.Module | type):
            raise ValueError(
                "ModuleInterceptor takes a function from modules to modules, got "
                f"{self.replace_fn!r}."
            )

    def interceptor(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        return _dispatch(context, next_fun, *args, **kwargs)


def call_wrapped(
    module: nn.Module, rules: tuple[Rule, ...], method: str, args: tuple, kwargs: dict
) -> Any:
    """Calls a method of a bound module under rules of its own."""
    if module.scope is None:
        raise ValueError(
            f"{type(module).__name__} is called outside of init and apply. Call it inside a "
            "module, or use `.init` and `.apply`."
        )
    state = current()
    local = Local(module.scope.path, layer_type(module), rules, state.frame)
    with (
        using(dataclasses.replace(state, local=(*state.local, local))),
        method_hook(_hook),
    ):
        return getattr(module, method)(*args, **kwargs)


def _hook(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Stands on Flax's stack once for each interceptor; the outermost serves them all.

    It is one function, so that statements held by generators may end in any order.
    """
    state = current()
    if state.call is context:
        return next_fun(*args, **kwargs)
    if state.frame is None:
        check_task()
    interceptors: list[Any] = [entry.interceptor for entry in state.entries]
    if all(isinstance(interceptor, ModuleInterceptor) for interceptor in interceptors):
        return _dispatch(context, next_fun, *args, **kwargs)
    with using(dataclasses.replace(state, call=context)):
        return _nested(interceptors, context, next_fun)(*args, **kwargs)


def _nested(
    interceptors: list[Interceptor],
    context: nn.module.InterceptorContext,
    next_fun: Callable[..., Any],
) -> Callable[..., Any]:
    """The method inside interceptors as they nest, the dispatcher at the outermost rule."""
    rules = [isinstance(interceptor, ModuleInterceptor) for interceptor in interceptors]
    place = rules.index(True) if any(rules) else len(rules)
    run = next_fun
    for i, interceptor in reversed(list(enumerate(interceptors))):
        if i == place:
            run = functools.partial(_dispatch, context, run)
        elif not rules[i]:
            run = functools.partial(_intercepted, interceptor, run, context)
    return run if any(rules) else functools.partial(_dispatch, context, run)


def _intercepted(
    interceptor: Interceptor,
    next_fun: Callable[..., Any],
    context: nn.module.InterceptorContext,
    *args: Any,
    **kwargs: Any,
) -> Any:
    return interceptor.interceptor(next_fun, args, kwargs, context)


def _dispatch(
    context: nn.module.InterceptorContext,
    next_fun: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs a method under the rules of all module interceptors and wrappers."""
    state, module = current(), context.module
    if (
        module.scope is None
        or state.idle
        or isinstance(module, Untouched)
        or any(other is module for other in state.running)
    ):
        return next_fun(*args, **kwargs)
    call = Call(module, context.method_name, args, kwargs)
    if state.frame is None and not state.recording:
        for entry in state.entries:
            if isinstance(entry.interceptor, ModuleInterceptor):
                warn_of_rebuilt_rule(entry.interceptor.replace_fn, call)
    state = state.inside(module)
    if is_lifted_function(layer_type(module), call.method):
        with using(state):
            return next_fun(*args, **kwargs)
    state, replacement, rules = _plan(state, call)
    if replacement is not None:
        with using(state):
            return getattr(replacement, call.method)(*args, **kwargs)
    _refuse_unread(call, [rule for rule, _ in rules])
    state = dataclasses.replace(state, running=(*state.running, module))
    special = None if state.muted else _SPECIAL_CALLS.get((layer_type(module), call.method))
    with using(state):
        if not rules and not state.acting and special is None:
            return next_fun(*args, **kwargs)
        run = functools.partial(_run, rules, state.acting, next_fun)
        return run(call) if special is None else special(call, run)


def _plan(
    state: State, call: Call
) -> tuple[State, nn.Module | None, tuple[tuple[Rule, Hashable], ...]]:
    """Which module runs, and the rules on it, each with what it stems from."""
    module: Any = call.module
    rules: list[tuple[Rule, Hashable]] = []
    for entry in state.entries:
        interceptor = entry.interceptor
        if not isinstance(interceptor, ModuleInterceptor) or state.skips(interceptor):
            continue
        found, replacement = _replacement(interceptor, call)
        if replacement is not None:
            skipped = (*state.skipped, (module, interceptor))
            state = dataclasses.replace(state, skipped=skipped)
            return state, replacement, ()
        rules += [(rule, interceptor) for rule in found]
    for local in state.local:
        if local.path == module.scope.path and local.type is layer_type(module):
            rules += [(rule, rule) for rule in local.rules]
            rest = tuple(other for other in state.local if other is not local)
            state = dataclasses.replace(state, local=rest)
    if state.muted:
        rules = [(rule, source) for rule, source in rules if rule.order != ADAPTER]
    _refuse_clashes(call, [rule for rule, _ in rules])
    return state, None, tuple(sorted(rules, key=lambda pair: pair[0].order))


def _replacement(
    interceptor: ModuleInterceptor, call: Call
) -> tuple[tuple[Rule, ...], nn.Module | None]:
    """What the interceptor makes of the module: rules on it, or another module in its place."""
    plans = call.module.__dict__.setdefault(_PLANS, {})
    if interceptor in plans:
        rules, replacement = plans[interceptor]
    else:
        rules, replacement = (), made(interceptor.replace_fn, call)
        if not isinstance(replacement, nn.Module):
            raise ValueError(
                f"replace_fn returns a module, the one it was given or another, but returned "
                f"{replacement!r} for {type(call.module).__name__} at '{call.path}'."
            )
        if isinstance(replacement, RuleSource):
            found, inside = replacement.unwrap()
            if inside is call.module:
                rules, replacement = found, None
        if replacement is call.module:
            replacement = None
        plans[interceptor] = rules, replacement
    if call.method == "setup" or not hasattr(type(replacement), call.method):
        replacement = None  # never replaced at setup; undeclared methods go to the original
    return rules, replacement


def _refuse_clashes(call: Call, rules: list[Rule]) -> None:
    names = [rule.name for rule in rules]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"A layer carries one rule of each name, but '{call.path}' "
            f"({type(call.module).__name__}) gets {names.count(twice[0])} named {twice[0]!r}: "
            f"{[type(rule).__name__ for rule in rules]}. Remove a wrapper or an interceptor (a "
            "LoRAWeight covers the modules inside the one it wraps)."
        )


def _refuse_unread(call: Call, rules: list[Rule]) -> None:
    """Stored values are read by a rule, or not at all."""
    layer = find_layer(call.module)
    if layer is None or any(rule.order == STORAGE for rule in rules):
        return
    stored = as_stored(meta.unbox(call.module.scope.get_variable("params", layer.param)))
    if stored is not None:
        raise ValueError(
            f"'{call.path}/{layer.param}' holds stored {stored.method} values, which "
            f"{type(call.module).__name__} does not read by itself. Wrap the layer, by "
            f"`peft.Int4Dense(wrapped=..., method={stored.method!r})` or its like for this kind of "
            "layer, or turn the parameters back by `peft.dequantize_checkpoint`."
        )


def _run(
    rules: tuple[tuple[Rule, Hashable], ...],
    extents: tuple[Extent, ...],
    next_fun: Callable[..., Any],
    call: Call,
) -> Any:
    """The module's method, its parameters read through rules, the other rules around it."""
    own = [rule for rule, _ in rules]
    path = call.module.scope.path
    inherited = [
        extent.rule
        for extent in extents
        if path[: len(extent.path)] == extent.path and extent.rule.concerns(call)
    ]
    reading = [rule for rule in own if rule.at_weight(call)] + inherited
    reading.sort(key=lambda rule: rule.order)
    call = dataclasses.replace(
        call,
        changed=any(rule.order != STORAGE for rule in reading),
        adapted=any(rule.order == ADAPTER for rule in reading),
        weight=functools.partial(
            weight_beneath, call, [rule for rule in reading if rule.order < ADAPTER]
        ),
    )
    _refuse_clashes(call, [*own, *inherited])
    covering = tuple(Extent(path, rule, source) for rule, source in rules if rule.covers_children)

    def proceed(call: Call) -> Any:
        with contextlib.ExitStack() as stack:
            if covering:
                state = current()
                stack.enter_context(
                    using(dataclasses.replace(state, extents=(*state.extents, *covering)))
                )
            if reading:
                stack.enter_context(reading_through(call, reading))
            return next_fun(*call.args, **call.kwargs)

    for group in by_order(own):
        proceed = functools.partial(group[0].around_together, group, proceed=proceed)
    return proceed(call)
