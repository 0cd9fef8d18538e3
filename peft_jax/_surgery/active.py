"""What is active where: the state of the dispatcher, which `jax.jit` caches know of."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Hashable, Iterator
from contextvars import ContextVar

from flax import linen as nn

from peft_jax._surgery.flax_internals import (
    Scope,
    has_returned,
    inside_lift,
    is_setup_check,
    root_of,
)
from peft_jax._surgery.jit_key import JIT_KEY, set_jit_key
from peft_jax._surgery.rules import ADAPTER, Rule
from peft_jax._trees import adapter_paths

__all__ = [
    "mute_adapters",
    "muted",
    "record",
    "recording",
]


@dataclasses.dataclass(frozen=True)
class Entry:
    """An interceptor in a ``with`` statement, and where that stands.

    Attributes:
      interceptor: compares by value.
      frame: the module call in which the statement stands.
      running: the model whose ``init`` or ``apply`` was running then; see `_running_root`.
      thread: Flax's interceptors belong to a thread, while a context may be copied to another.
      hook: what the statement has put on Flax's stack.
    """

    interceptor: Hashable
    frame: object | None
    running: Scope | None
    thread: int
    hook: contextlib.AbstractContextManager[None] = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Local:
    """Rules of a wrapper that is being called, waiting for their module (maybe inside a lift)."""

    path: tuple[str, ...]
    type: type[nn.Module]
    rules: tuple[Rule, ...]
    frame: object | None = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Extent:
    """A rule on a module whose submodules are running."""

    path: tuple[str, ...]
    rule: Rule
    source: Hashable


@dataclasses.dataclass(frozen=True)
class State:
    """All that the dispatcher knows; what changes the meaning of a traced function is in `key`.

    ``muted_in`` is the thread in which adapters are off (a context may be copied to another).
    """

    entries: tuple[Entry, ...] = ()
    local: tuple[Local, ...] = ()
    extents: tuple[Extent, ...] = ()
    recording: bool = False
    muted_in: int | None = None
    frame: object | None = None
    root: Scope | None = None
    call: object | None = None
    running: tuple[nn.Module, ...] = ()
    skipped: tuple[tuple[nn.Module, Hashable], ...] = ()

    def inside(self, module: nn.Module) -> State:
        """The state inside the call of a module: a frame of its own, and the root it belongs to."""
        assert module.scope is not None
        root, frame = root_of(module.scope), object()
        if is_setup_check(module.scope):
            return dataclasses.replace(self, frame=frame, entries=(), local=(), extents=())
        if inside_lift(module.scope) or root == self.root:
            return dataclasses.replace(self, frame=frame, root=self.root or root)
        outer = _running_root()
        if self.root is None and (outer in (None, root) or not _is_part(module)):
            _ROOT.set(weakref.ref(root))
            return dataclasses.replace(self, frame=frame, root=root)
        # Another apply inside a module's call (or inside a function that `apply` was given as its
        # method), on parameters of its own making: no target, but for what stands right around it.
        entries = tuple(
            entry
            for entry in self.entries
            if entry.frame is self.frame and (self.root is not None or entry.running == outer)
        )
        local = tuple(local for local in self.local if local.frame is self.frame)
        return State(
            entries=entries,
            local=local,
            muted_in=self.muted_in,
            frame=frame,
            root=root,
            running=self.running,
        )

    def skips(self, interceptor: Hashable) -> bool:
        """Whether a replacement that the interceptor made is running.

        What a replacement makes by itself is not replaced again; the module that it stands for, and
        the modules inside that one, are.
        """
        return any(
            by == interceptor and not any(module is original for module in self.running)
            for original, by in self.skipped
        )

    @property
    def muted(self) -> bool:
        """Whether adapters are off."""
        return self.muted_in is not None

    @property
    def acting(self) -> tuple[Extent, ...]:
        """The extents whose rules act."""
        if not self.muted:
            return self.extents
        return tuple(extent for extent in self.extents if extent.rule.order != ADAPTER)

    @property
    def idle(self) -> bool:
        """Whether no rule can apply."""
        return not (self.entries or self.local or self.extents)

    @property
    def around(self) -> tuple[bool, ...]:
        """For each entry, whether it stands right around this frame (see `inside`)."""
        return tuple(entry.frame is self.frame for entry in self.entries)

    @property
    def key(self) -> Hashable:
        """What a traced function depends on, by value."""
        if self.idle and not self.recording and not self.muted:
            return None
        return (
            tuple(entry.interceptor for entry in self.entries),
            self.around,
            self.local,
            tuple((extent.path, extent.source) for extent in self.extents),
            self.recording,
            self.muted,
        )

    def means(self, other: State) -> bool:
        """Whether both states have the same key, told without building it."""
        return (
            self.entries is other.entries
            and self.local is other.local
            and self.extents is other.extents
            and self.recording == other.recording
            and self.muted == other.muted
            and self.around == other.around
        )


_IDLE = State()
_STATE: ContextVar[State] = ContextVar("peft_jax_state", default=_IDLE)


# The root of the model that ran last.
_ROOT: ContextVar[weakref.ref[Scope] | None] = ContextVar("peft_jax_root", default=None)


def _running_root() -> Scope | None:
    """The root of the model whose ``init`` or ``apply`` has not returned yet, if one is known."""
    reference = _ROOT.get()
    root = None if reference is None else reference()
    return None if root is None or has_returned(root) else root


def _is_part(module: nn.Module) -> bool:
    """Whether a root module is a part of another that is applied to parameters of its own making.

    Flax names parts, not whole models; a whole model that has a name comes with its adapters.
    """
    if module.name is None or module.is_initializing():
        return False
    return not adapter_paths(module.variables.get("params", {}))


def current() -> State:
    """What is active here; entries of another thread, whose context was copied, are not."""
    state = _STATE.get()
    thread = threading.get_ident()
    own = all(entry.thread == thread for entry in state.entries)
    return state if own and state.muted_in in (None, thread) else _IDLE


@contextlib.contextmanager
def using(state: State) -> Iterator[None]:
    """Within, this is the state, for jit's caches too."""
    before = current()
    token = _STATE.set(state)
    changed = not before.means(state)
    try:
        if changed:
            set_jit_key(state.key)
        yield
    finally:
        _STATE.reset(token)
        if changed:
            set_jit_key(before.key)


def check_task() -> None:
    """Refuses to go on where another task of this thread is inside a ``with`` statement.

    jit's caches know the thread, not the task: they would serve one task's program to the other.
    """
    if JIT_KEY.value != current().key:
        raise ValueError(
            "A model runs while another asyncio task of this thread is inside `with "
            "peft.ModuleInterceptor(...)`. Do not await inside that statement: open it around "
            "the calls of the model alone."
        )


def open_entry(interceptor: Hashable, hook: contextlib.AbstractContextManager[None]) -> None:
    """Enters an interceptor, until `close_entry`."""
    check_task()
    state = current()
    entry = Entry(interceptor, state.frame, _running_root(), threading.get_ident(), hook)
    _replace(dataclasses.replace(state, entries=(*state.entries, entry)))
    hook.__enter__()


def close_entry(interceptor: Hashable) -> None:
    """Leaves the innermost statement of this very interceptor."""
    state = current()
    own = [entry for entry in state.entries if entry.interceptor is interceptor]
    if own:
        rest = tuple(entry for entry in state.entries if entry is not own[-1])
        _replace(dataclasses.replace(state, entries=rest))
        own[-1].hook.__exit__(None, None, None)


def _replace(state: State) -> None:
    _STATE.set(state)
    set_jit_key(state.key)


def recording() -> bool:
    """Whether adapters are to label their arrays with their specs (see `lora_specs`)."""
    return current().recording


@contextlib.contextmanager
def record() -> Iterator[None]:
    """Within, adapters that are initialized label their arrays with their specs.

    The model that runs within is a whole of its own, wherever this stands.
    """
    state = dataclasses.replace(
        current(), recording=True, muted_in=None, root=None, running=(), local=(), extents=()
    )
    with using(state):
        yield


@contextlib.contextmanager
def mute_adapters(*, muted: bool = True) -> Iterator[None]:
    """Within, adapter rules do nothing (or act again); storage and simulation still act."""
    thread = threading.get_ident() if muted else None
    with using(dataclasses.replace(current(), muted_in=thread)):
        yield


def muted() -> bool:
    """Whether adapter rules do nothing here."""
    return current().muted
