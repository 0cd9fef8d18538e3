"""What is active where: the state of the dispatcher, which `jax.jit` caches know of."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator
from contextvars import ContextVar

import jax
from flax import linen as nn
from flax.core import Scope

from peft_jax._rules import ADAPTER, Rule


@dataclasses.dataclass(frozen=True)
class Entry:
    """An interceptor in a ``with`` statement, and the module call in which that stands."""

    interceptor: Hashable
    frame: object | None
    exits: contextlib.ExitStack = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Local:
    """Rules of a wrapper that is being called, waiting for their module (maybe inside a lift)."""

    path: tuple[str, ...]
    type: type[nn.Module]
    rules: tuple[Rule, ...]


@dataclasses.dataclass(frozen=True)
class Extent:
    """A rule on a module whose submodules are running."""

    path: tuple[str, ...]
    rule: Rule
    source: Hashable


@dataclasses.dataclass(frozen=True)
class State:
    """All that the dispatcher knows; what changes the meaning of a traced function is in `key`."""

    entries: tuple[Entry, ...] = ()
    local: tuple[Local, ...] = ()
    extents: tuple[Extent, ...] = ()
    recording: bool = False
    muted: bool = False
    frame: object | None = None
    root: Scope | None = None
    running: tuple[nn.Module, ...] = ()
    skipped: tuple[tuple[nn.Module, Hashable], ...] = ()

    def inside(self, scope: Scope) -> State:
        """The state inside the call of a module: a frame of its own, and the root it belongs to."""
        root, frame = scope.root, object()
        if type(root) is not Scope:
            # Flax checks `setup` under a lift on a scope without variables or keys.
            return dataclasses.replace(self, frame=frame, entries=(), local=(), extents=())
        if root.debug_path or root == self.root:  # inside a lift, the root's path names it
            return dataclasses.replace(self, frame=frame)
        if self.root is None:
            return dataclasses.replace(self, frame=frame, root=root)
        # Another apply inside a module's call, on parameters of its own making: no target, but for
        # interceptors that stand right around it.
        entries = tuple(entry for entry in self.entries if entry.frame is self.frame)
        return State(entries=entries, frame=frame, root=root, running=self.running)

    @property
    def idle(self) -> bool:
        """Whether no rule can apply."""
        return not (self.entries or self.local or self.extents)

    @property
    def key(self) -> Hashable:
        """What a traced function depends on, by value."""
        if self.idle and not self.recording:
            return None
        return (
            tuple(entry.interceptor for entry in self.entries),
            self.local,
            tuple((extent.path, extent.source) for extent in self.extents),
            self.recording,
            self.muted,
        )


_IDLE = State()
STATE: ContextVar[State] = ContextVar("peft_jax_state", default=_IDLE)
# jax.jit keys its caches by this value: a function traced under other rules is another program.
_JIT_KEY = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def using(state: State) -> Iterator[None]:
    """Within, this is the state, for jit's caches too."""
    before = STATE.get()
    token = STATE.set(state)
    try:
        if _same_meaning(before, state):
            yield
        else:
            with _JIT_KEY(state.key):
                yield
    finally:
        STATE.reset(token)


def _same_meaning(one: State, other: State) -> bool:
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
    return STATE.get().recording


@contextlib.contextmanager
def record() -> Iterator[None]:
    """Within, adapters that are initialized label their arrays with their specs.

    The model that runs within is a whole of its own, wherever this stands.
    """
    state = dataclasses.replace(
        STATE.get(), recording=True, root=None, running=(), local=(), extents=()
    )
    with using(state):
        yield


@contextlib.contextmanager
def mute_adapters() -> Iterator[None]:
    """Within, adapter rules do nothing; storage and simulation still act."""
    state = STATE.get()
    extents = tuple(extent for extent in state.extents if extent.rule.order != ADAPTER)
    with using(dataclasses.replace(state, muted=True, extents=extents)):
        yield
