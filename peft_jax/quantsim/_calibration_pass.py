"""What flows through a model on given batches, gathered where encodings are to come from it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax._numerics import is_laid_out
from peft_jax._surgery import folded
from peft_jax._trees import progress_bar
from peft_jax.quantsim._encoding import Encoding
from peft_jax.quantsim._model import SimulatedModel, encoding_leaves, with_leaves
from peft_jax.quantsim._quantizer import Quantizer
from peft_jax.quantsim._ranges import METHODS
from peft_jax.quantsim._rule import Simulate
from peft_jax.quantsim._sites import INDEX, Site
from peft_jax.quantsim._statistics import empty, fold

Array = jax.Array
Forward = Callable[[Any, Any, Any], Any]
_KEPT = 16  # programs, with the models that they belong to


@dataclasses.dataclass(frozen=True)
class Form:
    """A batch without its arrays: flags and names, which belong to the program.

    Attributes:
      tree: its structure.
      rest: its leaves, None in the places of arrays.
      is_array: which leaves are arrays.
    """

    tree: Any
    rest: tuple[Any, ...]
    is_array: tuple[bool, ...]

    @classmethod
    def of(cls, batch: Any) -> tuple[list[Any], Form]:
        """The arrays of a batch, and its form."""
        leaves, tree = jax.tree.flatten(batch)
        is_array = tuple(isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves)
        pairs = list(zip(leaves, is_array, strict=True))
        rest = tuple(None if array else leaf for leaf, array in pairs)
        return [leaf for leaf, array in pairs if array], cls(tree, rest, is_array)

    def filled(self, arrays: Iterable[Any]) -> Any:
        """The batch."""
        left = iter(arrays)
        pairs = zip(self.rest, self.is_array, strict=True)
        return jax.tree.unflatten(
            self.tree, [next(left) if array else leaf for leaf, array in pairs]
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What runs on each batch. Equal ones share a trace: adapter after adapter, there is one.

    Attributes:
      sim: the model.
      forward: runs it on a batch.
      simulation: the rule, which says what acts and what is observed.
      observed: the observed sites, by path.
      adapters: paths of the sites that belong to adapters.
    """

    sim: SimulatedModel
    forward: Forward
    simulation: Simulate
    observed: tuple[tuple[str, Site], ...]
    adapters: frozenset[str]

    @classmethod
    def of(
        cls,
        sim: SimulatedModel,
        forward: Forward,
        acting: Mapping[str, Encoding],
        observed: Mapping[str, Site],
    ) -> Program:
        """For encodings that act, and sites that are observed, by path."""
        known = tuple((path, acting[path].quantizer) for path in sorted(acting))
        simulation = Simulate(sim.config, known, frozenset(observed))
        adapters = [path for path, encoding in acting.items() if encoding.of_adapter]
        adapters += [path for path, site in observed.items() if site.spec.of_adapter]
        return cls(sim, forward, simulation, tuple(sorted(observed.items())), frozenset(adapters))

    @functools.cached_property
    def _key(self) -> Any:
        """Models need not be hashable, and functions compare by identity anyhow."""
        return (id(self.sim), id(self.forward), self.simulation, self.observed, self.adapters)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands for the model's: encodings lie among the parameters."""
        return self.sim.run(self.simulation, variables, *args, **kwargs)

    def step(self, params: Any, leaves: Any, arrays: Any, form: Form) -> dict[str, Any]:
        """What is known of each observed site after one batch."""
        sites = dict(self.observed)

        def run(params: Any, leaves: Any, arrays: Any) -> Any:
            batch = form.filled(arrays)
            return self.forward(self, with_leaves(params, leaves, self.adapters), batch)

        def folding(path: str, state: Any, index: Array, x: Array) -> Any:
            quantizer, groups = sites[path].quantizer, sites[path].groups
            return fold(statistic_of(quantizer), state, index, _columns(x, groups))

        start = {
            path: empty(statistic_of(site.quantizer), site.layers, site.groups)
            for path, site in self.observed
        }
        return folded(run, folding)(start, params, leaves, arrays)[1]


@functools.lru_cache(maxsize=_KEPT)
def _compiled(program: Program) -> Callable[..., dict[str, Any]]:
    return jax.jit(program.step, static_argnums=3)


def gathered(
    program: Program,
    params: Any,
    acting: Mapping[str, Encoding],
    batches: Iterable[Any],
    *,
    progress: bool,
) -> dict[str, Any]:
    """What is known of the observed sites after all batches, by path.

    Raises:
      ValueError: on NaN and infinite values, and where nothing was seen.
    """
    observed, step = dict(program.observed), _compiled(program)
    leaves = {path: encoding_leaves(encoding) for path, encoding in acting.items()}
    leaves |= {path: {INDEX: site.indices()} for path, site in observed.items()}
    totals: dict[str, Any] = dict.fromkeys(observed)
    shown = progress_bar(batches, "calibrating", shown=progress, unit=" batches")
    for number, batch in enumerate(shown):
        states = jax.device_get(step(params, leaves, *Form.of(batch)))
        for path, state in states.items():
            _check_finite(path, state, number)
            totals[path] = _accumulated(observed[path].quantizer, totals[path], state)
    for path, total in totals.items():
        if not np.all(total["seen"]):
            raise ValueError(
                f"Nothing was seen at '{path}'"
                f"{' in some layers of the stack' if np.any(total['seen']) else ''}: the batches "
                "do not reach it, or are empty. Give batches that do, or leave it out by "
                f"`QuantizerRule({path!r}, None)`."
            )
    return totals


def _columns(x: Array, groups: int) -> Array:
    """The values of each group: ``(groups, values)`` in float32."""
    x = gathered_on_mesh(x).astype(jnp.float32)
    if groups == 1:
        return x.reshape(1, -1)
    return jnp.moveaxis(x.reshape(-1, groups, x.shape[-1] // groups), 1, 0).reshape(groups, -1)


def gathered_on_mesh(x: Array) -> Array:
    """The array, whole on every device where its axes are laid out explicitly on a mesh.

    JAX reshapes no other; axes that it lays out by itself are reshaped where they are.
    """
    if not is_laid_out(x):
        return x
    whole = jax.sharding.NamedSharding(jax.typeof(x).sharding.mesh, jax.sharding.PartitionSpec())
    return jax.sharding.reshard(x, whole)


def _check_finite(path: str, state: Any, number: int) -> None:
    if not np.all(state["finite"]):
        raise ValueError(
            f"NaN or infinity flows through '{path}' in batch {number} (counted from 0). Mend the "
            "data or the parameters: no encodings were computed."
        )


def statistic_of(quantizer: Quantizer) -> str:
    """The kind of statistic that its calibration needs."""
    return METHODS[quantizer.calibration].statistic


def _accumulated(quantizer: Quantizer, total: Any, state: Any) -> Any:
    settings = {"momentum": quantizer.momentum} if quantizer.calibration == "moving_average" else {}
    return METHODS[quantizer.calibration].accumulate(total, state, **settings)


def range_of(quantizer: Quantizer, total: Any) -> tuple[np.ndarray, np.ndarray]:
    """The range of each group, ``(layers, groups)``."""
    return METHODS[quantizer.calibration].range(
        total, quantizer.bitwidth, quantizer.symmetric, **settings_of(quantizer)
    )


def settings_of(quantizer: Quantizer) -> dict[str, Any]:
    """What its way to choose a range takes besides the grid."""
    return {"percentile": quantizer.percentile} if quantizer.calibration == "percentile" else {}
