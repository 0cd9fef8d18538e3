"""A model that computes as if it were quantized."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import jax
from flax import linen as nn

from peft_jax._surgery import ModuleInterceptor, Transparent, model_init, traced_boxes
from peft_jax._trees import children, is_branch, rebuild
from peft_jax.quantsim._encoding import Encoding, check_arrays, flattened
from peft_jax.quantsim._quantizer import SimulationConfig
from peft_jax.quantsim._rule import Census, Simulate
from peft_jax.quantsim._sites import ENCODINGS, OFFSET, SCALE, Site, check_rules, site_of

Leaves = Mapping[str, Any]


class SimulatedModel(Transparent):
    """A Linen module that computes as if its arrays were quantized; made by `simulate`.

    Its parameters are those of the model. What is known of the grids is a tree of encodings of its
    own, which `compute_encodings` makes and ``apply`` takes::

      y = sim.apply({"params": params}, x, encodings=encodings)

    It is differentiated by ``params`` (straight through the rounding) and by ``encodings``
    (learnt ranges), runs under jit, scan and remat, and computes in the dtypes of the model.
    ``peft.disable_adapters()`` leaves the base alone, quantized.

    Attributes:
      wrapped: the model, with adapters or without.
      config: what is simulated.
    """

    config: SimulationConfig

    @nn.nowrap
    def init_with_output(
        self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """As of the model, which is initialized as it is: encodings are about weights that are."""
        method = self._own_method(method)
        return self.wrapped.init_with_output(rngs, *args, method=method, **kwargs)

    @nn.nowrap
    def apply(
        self, variables: Any, *args: Any, encodings: Any = None, method: Any = None, **kwargs: Any
    ) -> Any:
        """As of any Linen module, with simulated quantization.

        Args:
          variables: of the model.
          *args: of the method.
          encodings: from `compute_encodings`.
          method: as for ``nn.Module.apply``.
          **kwargs: further arguments of ``nn.Module.apply`` and of the method.

        Raises:
          ValueError: where an encoding is missing, was made for another quantizer, or belongs to
            no module of these parameters.
        """
        if encodings is None:
            raise ValueError(
                "SimulatedModel.apply takes encodings=..., from `quantsim.compute_encodings`. "
                "Without simulation, run the model itself."
            )
        if not isinstance(variables, Mapping):
            raise ValueError(
                f"SimulatedModel.apply takes variables, such as {{'params': params}}, got "
                f"{type(variables).__name__}."
            )
        flat = dict(flattened(encodings))
        for path, encoding in flat.items():
            check_arrays(path, encoding)
        leaves = {path: encoding_leaves(encoding) for path, encoding in flat.items()}
        known = tuple((path, flat[path].quantizer) for path in sorted(flat))
        adapters = {path for path, encoding in flat.items() if encoding.of_adapter}
        params = with_leaves(variables.get("params", {}), leaves, adapters)
        simulation = Simulate(self.config, known)
        result = self.run(
            simulation, {**variables, "params": params}, *args, method=method, **kwargs
        )
        if kwargs.get("mutable", False) is False:
            return result
        y, state = result
        if "params" in state:
            state = {**state, "params": _without_leaves(state["params"])}
        return y, state

    @nn.nowrap
    def run(
        self, simulation: Simulate, variables: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> Any:
        """The model under a rule of simulation, with all that it needs among the variables."""
        with ModuleInterceptor(simulation):
            return self.wrapped.apply(variables, *args, method=self._own_method(method), **kwargs)

    @nn.nowrap
    def _forward(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise ValueError(
            "A SimulatedModel is run by `sim.apply({'params': params}, ..., encodings=encodings)`; "
            "bound, or inside another module, it would know no encodings. Simulate the whole model."
        )


def simulate(model: nn.Module, config: SimulationConfig | None = None) -> SimulatedModel:
    """The model with simulated quantization; still a Linen module, with the same parameters.

    Example::

      model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
      sim = quantsim.simulate(model, quantsim.SimulationConfig())
      with peft.disable_adapters():
        encodings = quantsim.compute_encodings(sim, params, batches)

    Args:
      model: a Linen module, unbound.
      config: what is simulated, and how; by default all layers and adapters in 8 bits.

    Raises:
      ValueError: where the model is no Linen module, or simulated already.
    """
    if not isinstance(model, nn.Module) or isinstance(model, SimulatedModel) or model.scope:
        what = "one that is simulated or bound" if isinstance(model, nn.Module) else type(model)
        raise ValueError(f"simulate takes an unbound Linen module, got {what}.")
    config = SimulationConfig() if config is None else config
    if not isinstance(config, SimulationConfig):
        raise ValueError(f"simulate takes a SimulationConfig, got {type(config).__name__}.")
    return SimulatedModel(wrapped=model, config=config)


def find_sites(
    sim: SimulatedModel, *inputs: Any, method: Any = None, rngs: Any = None, **kwargs: Any
) -> dict[str, Site]:
    """Every array that is simulated when the model is called on these inputs, adapters and all.

    As `lora_specs`, which see for the arguments: the model is initialized abstractly, and no array
    is made.

    Returns:
      From the slashed path of each array to its `Site`.

    Raises:
      ValueError: where a rule of the configuration matches nothing.
    """
    if not isinstance(sim, SimulatedModel):
        raise ValueError(
            f"find_sites takes a model from `quantsim.simulate`, got {type(sim).__name__}."
        )
    census = Census()
    init, given = model_init(sim.wrapped, "find_sites", method, rngs)
    with ModuleInterceptor(Simulate(sim.config, census=census)):
        boxes = traced_boxes(init, given, inputs, kwargs)
    marked = {path: box for path, box in boxes.items() if ENCODINGS in path.split("/")}
    sites = {
        "/".join(part for part in path.split("/") if part != ENCODINGS): site_of(box)
        for path, box in marked.items()
    }
    check_rules(sim.config, census.possible)
    return sites


def encoding_leaves(encoding: Encoding) -> Leaves:
    """What of an encoding lies among the parameters while the model runs."""
    leaves = {SCALE: encoding.scale, OFFSET: encoding.offset}
    if encoding.symmetric:
        leaves[OFFSET] = jax.lax.stop_gradient(encoding.offset)
    return leaves if encoding.is_learnt else jax.lax.stop_gradient(leaves)


def with_leaves(params: Any, leaves: Mapping[str, Leaves], adapters: Collection[str]) -> Any:
    """The parameters with what is known of each site beside the arrays of its module.

    Args:
      params: of the model.
      leaves: by path.
      adapters: the paths that belong to adapters.

    Raises:
      ValueError: where there is no such module.
    """
    by_module: dict[tuple[str, ...], dict[str, Leaves]] = {}
    for path, found in leaves.items():
        parts = path.split("/")
        depth = 2 if path in adapters else 1
        by_module.setdefault(tuple(parts[:-depth]), {})["/".join(parts[-depth:])] = found
    left = dict(by_module)
    tree = _inserted(params, left, ())
    if left:
        path = "/".join(next(iter(left)))
        close = difflib.get_close_matches(path, _paths(params), 3, 0.0)
        raise ValueError(
            f"There are encodings for '{path}', which these parameters lack. Close paths: {close}. "
            "Give the encodings that were computed with parameters of this model."
        )
    return tree


def _inserted(tree: Any, left: dict[tuple[str, ...], Any], path: tuple[str, ...]) -> Any:
    """The tree with its share of what is left, which is taken out of there."""
    if not is_branch(tree):
        return tree
    own = left.pop(path, None)
    here = {key: _inserted(value, left, (*path, str(key))) for key, value in children(tree)}
    return rebuild(tree, here if own is None else {**here, ENCODINGS: own})


def _without_leaves(tree: Any) -> Any:
    """The parameters alone; inverse of `with_leaves`."""
    if not is_branch(tree):
        return tree
    pairs = [(key, _without_leaves(value)) for key, value in children(tree) if key != ENCODINGS]
    return rebuild(tree, dict(pairs))


def _paths(tree: Any, path: tuple[str, ...] = ()) -> list[str]:
    if not is_branch(tree):
        return []
    inner = [found for key, value in children(tree) for found in _paths(value, (*path, str(key)))]
    return ["/".join(path), *inner]
