"""Frames: lazy weights as values of JAX, which every operation meets.

A frame is a trace of JAX between a function and the trace around it. Its only tracers are lazy
weights; all other values are those of the trace around it, so nothing is staged, Python that
branches on values works, and loops, vmap, grad and checkpoints inside the function go on as ever.
An operation on a lazy weight gives a view (lazy again), a finished product, or forms the dense
weight, which is always right.

Example::

  with frame() as opened:
      y = fn(opened.lazy(weight), x)  # any function of arrays
      y = opened.plain(y)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax

from peft_jax._numerics.jax_internals import (
    Trace,
    current_trace,
    is_subfunction,
    jit_p,
    remat_p,
    run_inside,
    run_program,
    scan_p,
    set_current_trace,
)
from peft_jax._numerics.lazy.dense import dense
from peft_jax._numerics.lazy.flow import mark, mark_dense
from peft_jax._numerics.lazy.loops import rebuilt_checkpoint, rebuilt_scan
from peft_jax._numerics.lazy.operations import OPERATIONS
from peft_jax._numerics.lazy.products import PRODUCTS, Product
from peft_jax._numerics.lazy.tracer import LazyTracer, is_lazy, weight_of
from peft_jax._numerics.lazy.weight import LazyWeight, Part, Scaled, has_dropout, with_keys

__all__ = [
    "Frame",
    "Use",
    "frame",
    "in_frame",
]


@dataclasses.dataclass(frozen=True)
class Use:
    """What one operation did with one parameter.

    Attributes:
      source: names the parameter.
      shape: of the parameter as it is stored.
      operation: name of JAX's operation.
      roles: for each stored axis, the roles that its parts had in a product; None if the operation
        needed the dense weight.

    In the traced program a `mark` with the number of the use in the record stands at each product.
    """

    source: Hashable
    shape: tuple[int, ...]
    operation: str
    roles: tuple[frozenset[str], ...] | None


class Frame(Trace):
    """A trace whose tracers are lazy weights.

    Attributes:
      parent: the trace around it.
      record: where uses are noted, or None.
    """

    def __init__(
        self, parent: Trace, record: list[Use] | None, draws: Iterator[int] | None = None
    ) -> None:
        super().__init__()
        self.parent = parent
        self.record = record
        self.is_closed = False
        self.requires_low = False  # whether types are lowered is the parent's affair
        self._draws = itertools.count() if draws is None else draws
        # What was broadcast last, and from what: `w * s[None, :]` is a view.
        self._broadcasts: collections.deque[tuple[Any, Any, Any]] = collections.deque(maxlen=8)

    # --- Values in and out -----------------------------------------------------------------------

    def lazy(self, weight: LazyWeight | Scaled) -> Any:
        """The weight as a value for functions of arrays."""
        return LazyTracer(self, weight)

    def plain(self, tree: Any, reason: str = "output") -> Any:
        """A tree with dense weights in the place of lazy ones."""
        return jax.tree.map(lambda x: self._dense(x, reason), tree, is_leaf=is_lazy)

    def _dense(self, value: Any, reason: str) -> Any:
        if not isinstance(value, LazyTracer):
            return value
        with set_current_trace(self.parent):
            return self._noted(weight_of(value.lazy), reason, None, self._sum_of(value), mark_dense)

    def _sum_of(self, tracer: LazyTracer) -> Any:
        if tracer._trace is not self:  # computed in another trace, it would not outlive this one
            return dense(tracer.lazy)
        if tracer.dense is None:
            tracer.dense = dense(tracer.lazy)
        return tracer.dense

    def _noted(
        self,
        weight: LazyWeight,
        operation: str,
        roles: Sequence[str] | None,
        value: Any,
        marked: Callable[[Any, int], Any],
    ) -> Any:
        """The value, with a mark for each parameter of the weight if uses are recorded."""
        if self.record is None:
            return value
        for part in weight.parts:
            value = marked(value, len(self.record))
            stored = None if roles is None else _stored_roles(part, roles)
            self.record.append(Use(part.source, part.shape, operation, stored))
        return value

    @contextlib.contextmanager
    def nested(self) -> Iterator[Frame]:
        """A frame in the trace of a loop's body, with the same record."""
        with _opened(Frame(current_trace(), self.record, self._draws)) as inner:
            yield inner

    # --- The contract of a trace -----------------------------------------------------------------

    def stage_value(self, value: Any) -> Any:
        return value if isinstance(value, LazyTracer) else self.parent.stage_value(value)

    def process_primitive(self, primitive: Any, args: Sequence[Any], params: Any, /) -> Any:
        with set_current_trace(self.parent):
            if not any(isinstance(arg, LazyTracer) for arg in args):
                return self._ordinary(primitive, args, params)
            if primitive is jit_p:  # jnp.dot, x @ w, a jitted function: as if written here
                with set_current_trace(self):
                    return run_program(params["jaxpr"], args)
            result = self._operation(primitive, args, params)
            if result is None:
                plain = [self._dense(arg, primitive.name) for arg in args]
                return primitive.bind(*plain, **params)
            if isinstance(result, list):
                return [self._traced(one) for one in result]
            return [self._traced(result)] if primitive.multiple_results else self._traced(result)

    def _traced(self, result: Any) -> Any:
        return LazyTracer(self, result) if isinstance(result, LazyWeight | Scaled) else result

    def _ordinary(self, primitive: Any, args: Sequence[Any], params: Any) -> Any:
        result = primitive.bind(*args, **params)
        if primitive.name == "broadcast_in_dim" and len(args) == 1:
            self._broadcasts.append((result, args[0], params["broadcast_dimensions"]))
        return result

    def _operation(self, primitive: Any, args: Sequence[Any], params: Any) -> Any:
        """A view, a product's value, a list of results, or None."""
        if primitive is scan_p:
            return rebuilt_scan(self.nested, args, params)
        if primitive is remat_p:
            return rebuilt_checkpoint(self.nested, args, params)
        operation = OPERATIONS.get(primitive.name)
        if operation is None:
            return None
        given = [arg.lazy if isinstance(arg, LazyTracer) else arg for arg in args]
        if primitive.name in PRODUCTS:
            given = [self._fresh(x) if isinstance(x, LazyWeight | Scaled) else x for x in given]

        def bind(*plain: Any) -> Any:
            return primitive.bind(*plain, **params)

        found = operation(self, given, bind, params)
        if not isinstance(found, Product):
            return found
        weight = next(weight_of(one) for one in given if isinstance(one, LazyWeight | Scaled))

        def marked(value: Any, use: int) -> Any:
            return mark(value, found.operand, use)

        return self._noted(weight, primitive.name, found.roles, found.value, marked)

    def _fresh(self, lazy: LazyWeight | Scaled) -> LazyWeight | Scaled:
        """The weight with masks of its own for this operation, if it draws some."""
        weight = weight_of(lazy)
        if not has_dropout(weight):
            return lazy
        number = next(self._draws)
        drawn = with_keys(
            weight, lambda key, term: jax.random.fold_in(jax.random.fold_in(key, number), term)
        )
        return dataclasses.replace(lazy, weight=drawn) if isinstance(lazy, Scaled) else drawn

    def spread(self, value: Any) -> tuple[Any, Any] | None:
        """What a value was broadcast from, and along which axes."""
        return next(((x, axes) for made, x, axes in self._broadcasts if made is value), None)

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, args: Any, /, **params: Any
    ) -> Any:
        return self._handed_on("process_custom_jvp_call")(primitive, fun, jvp, args, **params)

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, args: Any, /, **params: Any
    ) -> Any:
        run = self._handed_on("process_custom_vjp_call")
        return run(primitive, fun, fwd, bwd, args, **params)

    def __getattr__(self, name: str) -> Any:
        # What JAX asks of a trace besides, in this version or another (process_shard_map,
        # process_call): the parent's, on dense weights.
        if not name.startswith("process_"):
            raise AttributeError(name)
        return self._handed_on(name)

    def _handed_on(self, name: str) -> Callable[..., Any]:
        run = getattr(self.parent, name)
        reason = name.removeprefix("process_").removesuffix("_call")

        def inside(run: Callable[..., Any], *args: Any) -> Any:
            with self.nested() as inner:
                return plain(run(*args), inner)

        def plain(value: Any, frame: Frame) -> Any:
            if is_subfunction(value):  # it may close over lazy weights
                return run_inside(value, inside)
            if type(value) in (list, tuple):
                return type(value)(plain(one, frame) for one in value)
            if hasattr(value, "map") and hasattr(value, "vals"):  # a flat tree, from jax 0.11 on
                return value.map(lambda one: frame._dense(one, reason))
            return frame._dense(value, reason)

        def process(*args: Any, **params: Any) -> Any:
            return run(*(plain(arg, self) for arg in args), **params)

        return process


def _stored_roles(part: Part, roles: Sequence[str]) -> tuple[frozenset[str], ...]:
    """The roles of a view's axes, for each axis that is stored."""
    return tuple(
        frozenset(role for role, axes in zip(roles, part.origin, strict=True) if axis in axes)
        for axis in range(len(part.shape))
    )


def in_frame() -> Frame | None:
    """The frame that operations are bound in here, if it is one."""
    trace = current_trace()
    return trace if isinstance(trace, Frame) else None


@contextlib.contextmanager
def frame(record: list[Use] | None = None) -> Iterator[Frame]:
    """Within, operations may be given lazy weights of this frame."""
    with _opened(Frame(current_trace(), record)) as opened:
        yield opened


@contextlib.contextmanager
def _opened(frame: Frame) -> Iterator[Frame]:
    try:
        with set_current_trace(frame):
            yield frame
    finally:
        frame.is_closed = True
