"""Model surgery: one dispatcher that applies rules to the modules of a running model.

The walk of a call: Flax hands each method call to `_dispatch`; the outermost hook asks every active
interceptor, and every wrapper being called, for the rules of that module; sorts them (storage below
simulation below adapters); and runs them around Flax's ``next_fun``, the module's own method.
Nothing is kept but the `ContextVar` and what lies on the bound module itself, which Flax drops
with the call.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Iterator
import contextlib
from contextvars import ContextVar
import dataclasses
import functools
from typing import Any, ClassVar

from flax import linen as nn
from flax.core import Scope, meta
import jax

from peft_jax._registry import Call, layer_type
from peft_jax._retraced import warn_of_rebuilt_rule

STORAGE, SIMULATION, ADAPTER = range(3)
_PLANS = "_peft_jax_plans"


# Calls that adapters treat in a way of their own: (type, method) -> function of (call, proceed).
_SPECIAL_CALLS: dict[tuple[type[nn.Module], str], Callable[[Call, Callable[[], Any]], Any]] = {}


def special_call(
    module_type: type[nn.Module], around: Callable[[Call, Callable[[], Any]], Any]
) -> None:
    """Has ``around(call, proceed)`` run each ``__call__`` of a type while rules are active."""
    _SPECIAL_CALLS[module_type, "__call__"] = around


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
    name: ClassVar[str]
    covers_children: ClassVar[bool] = False

    def concerns(self, call: Call) -> bool:
        """Whether the rule, inherited from an enclosing module, does anything to this one."""
        return True

    def at_weight(self, call: Call) -> bool:
        """Whether this call reads its parameters through `transform`."""
        return False

    def transform(self, call: Call, name: str, value: Any) -> Any:
        """The value that the module reads in place of its parameter."""
        return value

    def around(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """Runs the call, and what comes beside it."""
        return proceed()


class RuleSource(abc.ABC):
    """A module that stands for rules on the module that it wraps."""

    @abc.abstractmethod
    def unwrap(self) -> tuple[tuple[Rule, ...], nn.Module]:
        """The rules of this wrapper and those inside it, outermost first, and the module inside."""


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An interceptor in a ``with`` statement, and the module call in which that stands."""

    interceptor: Interceptor
    frame: object | None
    exits: contextlib.ExitStack = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class _Local:
    """Rules of a wrapper that is being called, waiting for their module (maybe inside a lift)."""

    path: tuple[str, ...]
    type: type[nn.Module]
    rules: tuple[Rule, ...]


@dataclasses.dataclass(frozen=True)
class _Extent:
    """A rule on a module whose submodules are running."""

    path: tuple[str, ...]
    rule: Rule
    source: Hashable


@dataclasses.dataclass(frozen=True)
class _State:
    """All that the dispatcher knows; what changes the meaning of a traced function is in `key`."""

    entries: tuple[_Entry, ...] = ()
    local: tuple[_Local, ...] = ()
    extents: tuple[_Extent, ...] = ()
    recording: bool = False
    muted: bool = False
    frame: object | None = None
    root: Scope | None = None
    running: tuple[nn.Module, ...] = ()
    skipped: tuple[tuple[nn.Module, Interceptor], ...] = ()

    @property
    def idle(self) -> bool:
        """Whether no rule can apply."""
        return not (self.entries or self.local or self.extents)

    @property
    def key(self) -> Hashable:
        if self.idle and not self.recording:
            return None
        return (
            tuple(entry.interceptor for entry in self.entries),
            self.local,
            tuple((extent.path, extent.source) for extent in self.extents),
            self.recording,
            self.muted,
        )


_IDLE = _State()
_STATE: ContextVar[_State] = ContextVar("peft_jax_state", default=_IDLE)
# jax.jit keys its caches by this value: a function traced under other rules is another program.
_JIT_KEY = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def _using(state: _State) -> Iterator[None]:
    before = _STATE.get()
    token = _STATE.set(state)
    try:
        if _same_meaning(before, state):
            yield
        else:
            with _JIT_KEY(state.key):
                yield
    finally:
        _STATE.reset(token)


def _same_meaning(one: _State, other: _State) -> bool:
    """Whether both states have the same key, told without building it."""
    return (
        one.entries is other.entries
        and one.local is other.local
        and one.extents is other.extents
        and one.recording == other.recording
        and one.muted == other.muted
    )


def recording() -> bool:
    """Whether adapters are to label their arrays with their specs (see `lora_specs`)."""
    return _STATE.get().recording


@contextlib.contextmanager
def record() -> Iterator[None]:
    """Within, adapters that are initialized label their arrays with their specs.

    The model that runs within is a whole of its own, wherever this stands.
    """
    state = dataclasses.replace(
        _STATE.get(), recording=True, root=None, running=(), local=(), extents=()
    )
    with _using(state):
        yield


@contextlib.contextmanager
def mute_adapters() -> Iterator[None]:
    """Within, adapter rules do nothing; storage and simulation still act."""
    state = _STATE.get()
    extents = tuple(extent for extent in state.extents if extent.rule.order != ADAPTER)
    with _using(dataclasses.replace(state, muted=True, extents=extents)):
        yield


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
        state = _STATE.get()
        entry = _Entry(self, state.frame, contextlib.ExitStack())
        entry.exits.enter_context(
            _using(dataclasses.replace(state, entries=(*state.entries, entry)))
        )
        entry.exits.enter_context(nn.intercept_methods(self.interceptor))
        return self

    def __exit__(self, *exception: object) -> None:
        _STATE.get().entries[-1].exits.close()


@dataclasses.dataclass(frozen=True)
class ModuleInterceptor(Interceptor):
    """Replaces modules of any model by wrapped ones, without touching the model's code.

    ``replace_fn`` is called once for each bound module, when its first method runs, and returns the
    module itself or what shall run in its place: a wrapper of this library around it, or any
    module with the same methods.

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
        if not callable(self.replace_fn):
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
        return _dispatch(next_fun, args, kwargs, context)


def call_wrapped(
    module: nn.Module, rules: tuple[Rule, ...], method: str, args: tuple, kwargs: dict
) -> Any:
    """Calls a method of a bound module under rules of its own."""
    if module.scope is None:
        raise ValueError(
            f"{type(module).__name__} is called outside of init and apply. Call it inside a "
            "module, or use `.init` and `.apply`."
        )
    state = _STATE.get()
    local = _Local(module.scope.path, layer_type(module), rules)
    with (
        _using(dataclasses.replace(state, local=(*state.local, local))),
        nn.intercept_methods(_dispatch),
    ):
        return getattr(module, method)(*args, **kwargs)


def _dispatch(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    state, module = _STATE.get(), context.module
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
    state = _enter(state, module.scope)
    if not hasattr(layer_type(module), call.method):
        # Flax's name for a function that a lifted transform runs on the module.
        with _using(state):
            return next_fun(*args, **kwargs)
    state, replacement, rules = _plan(state, call)
    if replacement is not None:
        with _using(state):
            return getattr(replacement, call.method)(*args, **kwargs)
    state = dataclasses.replace(state, running=(*state.running, module))
    special = None if state.muted else _SPECIAL_CALLS.get((layer_type(module), call.method))
    with _using(state):
        if not rules and not state.extents and special is None:
            return next_fun(*args, **kwargs)
        run = functools.partial(_run, call, rules, state.extents, next_fun)
        return run() if special is None else special(call, run)


def _enter(state: _State, scope: Scope) -> _State:
    """The state inside a module's call: a frame of its own, and the root that it belongs to."""
    root, frame = scope.root, object()
    if type(root) is not Scope:
        # Flax checks `setup` under a lift on a scope without variables or keys.
        return dataclasses.replace(state, frame=frame, entries=(), local=(), extents=())
    if root.debug_path or root == state.root:  # inside a lift, the root's path names it
        return dataclasses.replace(state, frame=frame)
    if state.root is None:
        return dataclasses.replace(state, frame=frame, root=root)
    # Another apply inside a module's call, on parameters of its own making: no target, but for
    # interceptors that stand right around it.
    entries = tuple(entry for entry in state.entries if entry.frame is state.frame)
    return _State(entries=entries, frame=frame, root=root, running=state.running)


def _plan(
    state: _State, call: Call
) -> tuple[_State, nn.Module | None, tuple[tuple[Rule, Hashable], ...]]:
    """Which module runs, and the rules on it, each with what it stems from."""
    module, rules = call.module, []
    for entry in state.entries:
        interceptor = entry.interceptor
        if not isinstance(interceptor, ModuleInterceptor) or any(
            skipped is module and by == interceptor for skipped, by in state.skipped
        ):
            continue
        found, replacement = _replacement(interceptor, call)
        if replacement is not None:
            skipped = ((module, interceptor), (replacement, interceptor))
            state = dataclasses.replace(state, skipped=(*state.skipped, *skipped))
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
        rules, replacement = (), interceptor.replace_fn(call.module)
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
        if replacement is None or call.method != "setup":
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
            f"{[type(rule).__name__ for rule in rules]}. Remove one of the wrappers or interceptors."
        )


def _run(
    call: Call,
    rules: tuple[tuple[Rule, Hashable], ...],
    extents: tuple[_Extent, ...],
    next_fun: Callable[..., Any],
) -> Any:
    """The module's method, its parameters read through rules, the other rules around it."""
    own = [rule for rule, _ in rules]
    path = call.module.scope.path
    inherited = [
        extent.rule
        for extent in extents
        if path[: len(extent.path)] == extent.path and extent.rule.concerns(call)
    ]
    reading = [rule for rule in own if rule.at_weight(call)]
    _refuse_clashes(call, [*own, *inherited])
    covering = tuple(
        _Extent(path, rule, source) for rule, source in rules if rule.covers_children
    )

    def proceed() -> Any:
        with contextlib.ExitStack() as stack:
            if covering:
                state = _STATE.get()
                stack.enter_context(
                    _using(dataclasses.replace(state, extents=(*state.extents, *covering)))
                )
            if reading or inherited:
                ordered = sorted([*reading, *inherited], key=lambda rule: rule.order)
                stack.enter_context(_reading_through(call, ordered))
            return next_fun(*call.args, **call.kwargs)

    for rule in own:
        proceed = functools.partial(rule.around, call, proceed)
    return proceed()


@contextlib.contextmanager
def _reading_through(call: Call, rules: list[Rule]) -> Iterator[None]:
    """The module's ``self.param`` returns what the rules make of each parameter."""
    module = call.module
    original = module.param

    def param(name: str, init_fn: Any, *init_args: Any, unbox: bool = True, **kwargs: Any) -> Any:
        stored = original(name, init_fn, *init_args, unbox=False, **kwargs)
        value = meta.unbox(stored)
        for rule in rules:
            value = rule.transform(call, name, value)
        return value if unbox else meta.replace_boxed(stored, value)

    with patched(module, "param", param):
        yield


@contextlib.contextmanager
def patched(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of a bound module for the length of a call."""
    missing = object()
    before = module.__dict__.get(name, missing)
    object.__setattr__(module, name, value)
    try:
        yield
    finally:
        if before is missing:
            object.__delattr__(module, name)
        else:
            object.__setattr__(module, name, before)
