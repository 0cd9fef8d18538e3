"""A model adapted as a config says: `get_peft_model`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from peft_jax._config import LoraConfig, with_targets
from peft_jax._model.adapter_stack import SeveralAdapters
from peft_jax._model.named_adapters import enable_adapters
from peft_jax._model.replication import (
    Replication,
    given,
    reading_rules,
    replicated_model,
    with_adapters_of,
)
from peft_jax._model.targeting import Adapt, Structure, needs_structure, structure
from peft_jax._model.unmatched_targets import check_adapted
from peft_jax._surgery import ModuleInterceptor, Untouched, init_of_copy, muted, recording, rngs_of
from peft_jax._trees import DEFAULT, check_adapter_name

__all__ = [
    "PeftModel",
    "get_peft_model",
]


class PeftModel(SeveralAdapters):
    """A Linen module whose layers are adapted as a config says; made by `get_peft_model`.

    It has the methods, the attributes and the parameter paths of ``wrapped``, and any method runs
    adapted: ``model.apply(variables, x, method="encode")``. Its submodules, as seen from a bound
    model, are adapted too.

    Attributes:
      wrapped: the model.
      peft_config: which layers are adapted, and how.
      adapter_name: of the adapters, which lie at ``lora`` if it is ``default``, else at
        ``lora.<name>``.
      active: whether the adapters act. ``init`` draws them in any case.
      _base_path: of a part of an adapted model: the path of the whole. None: this is the whole.
      _structure: what the config means by the output layer and the embedding, once it is known.
      _replication: where the config has ``layer_replication``: how ``wrapped`` was made.
    """

    _: dataclasses.KW_ONLY
    peft_config: LoraConfig
    adapter_name: str = DEFAULT
    active: bool = True
    _base_path: tuple[str, ...] | None = None
    _structure: Structure | None = None
    _replication: Replication | None = None

    @nn.nowrap
    def init_with_output(
        self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """As of any Linen module; raises where an entry of the config matches nothing."""
        model, method = self, self._own_method(method)
        of_method = {name: kwargs[name] for name in kwargs if name not in _OF_INIT}
        if needs_structure(self.peft_config) and self._structure is None:

            def init(rngs: Any, args: Any, kwargs: Any) -> Any:
                return self.wrapped.init(rngs, *args, method=method, **kwargs).get("params", {})

            found = structure(self.peft_config, (), init, rngs, args, of_method)
            model = self.clone(_structure=found)
        base = None
        if self._replication is not None and not recording():
            base = self._replication.base(rngs, *args, method=method, **of_method)
            method = given(base, method)
        with enable_adapters():
            y, variables = super(PeftModel, model).init_with_output(
                rngs, *args, method=method, **kwargs
            )
        if base is not None:
            variables = {**variables, "params": with_adapters_of(base, variables["params"])}
        if "params" in variables and not (recording() and method is not None):
            check_adapted(self.peft_config, variables["params"], self.adapter_name, at_init=True)
        return y, variables

    @nn.nowrap
    def _forward(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = getattr(self.wrapped, method)
        if self.scope is None:
            return run(*args, **kwargs)
        params = self.scope.variables().get("params", {})
        rules = reading_rules(params, self.scope.path)
        if self.is_initializing() or (self.active and not muted()):
            rules = (self._adapt(method, args, kwargs), *rules)
        with contextlib.ExitStack() as stack:
            for rule in rules:
                stack.enter_context(ModuleInterceptor(rule))
            return run(*args, **kwargs)

    @nn.nowrap
    def _adapt(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Adapt:
        """The rule by which this call is adapted."""
        scope, config = self.scope, self.peft_config
        assert scope is not None
        base = scope.path if self._base_path is None else self._base_path
        adapt = Adapt(config, base, self.adapter_name)
        if self.is_initializing():
            found = self._structure
            if needs_structure(config) and found is None:
                init = init_of_copy(self.wrapped, method)
                found = structure(config, base, init, rngs_of(scope), args, kwargs)
            return adapt if found is None else dataclasses.replace(adapt, **found._asdict())
        params = scope.variables().get("params", {})
        if self._base_path is None:
            check_adapted(config, params, self.adapter_name, at_init=False)
        return adapt.for_params(params)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        """What this model lacks is the wrapped model's; submodules are shown adapted."""
        value = super().__getattr__(name)
        return value if self.scope is None else self._shown(value)

    @nn.nowrap
    def _shown(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._shown(item) for key, item in value.items()}
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(map(self._shown, value))
        if not isinstance(value, nn.Module) or value.scope is None or isinstance(value, Untouched):
            return value
        assert self.scope is not None
        return PeftModel(
            wrapped=value,
            peft_config=self.peft_config,
            adapter_name=self.adapter_name,
            active=self.active,
            _base_path=self.scope.path if self._base_path is None else self._base_path,
            _structure=self._structure,
        )

    @nn.nowrap
    def add_adapter(self, adapter_name: str, peft_config: LoraConfig) -> PeftModel:
        """The model with one more adapter, which acts beside those that do.

        Its arrays come from ``init``, from `init_lora_weights` or from a file, by
        `peft.add_adapter(params, lora, adapter_name)`.

        Raises:
          ValueError: where the name is taken; as `get_peft_model`.
        """
        if len(self.peft_configs) == _MOST_ADAPTERS:
            raise ValueError(
                f"A model has at most {_MOST_ADAPTERS} adapters beside each other, each a rule "
                "more in every call. Keep more of them as trees, put in by `peft.add_adapter`, or "
                "in a bank (`peft.stack_adapters`)."
            )
        return get_peft_model(self, peft_config, adapter_name)


_MOST_ADAPTERS = 64
_OF_INIT = frozenset({"mutable", "capture_intermediates"})


def get_peft_model(
    model: nn.Module, peft_config: LoraConfig, adapter_name: str = DEFAULT
) -> PeftModel:
    """The model with the adapters that a config speaks of; still a Linen module.

    Example::

      config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
      model = peft.get_peft_model(model, config)
      params = model.init(key, x)["params"]
      specs = peft.lora_specs(model, x)
      base, lora = peft.init_lora_weights(pretrained, specs, key, config=config)
      y = model.apply({"params": peft.merge_params(base, lora)}, x)

    ``init`` draws the adapters so that they change nothing. What looks at the base's weights (the
    magnitude of DoRA; ``init_lora_weights`` of pissa, olora, loftq, corda) or at data (eva, corda)
    is set by `init_lora_weights` from the weights that the model is to have.

    ``layer_replication`` makes the model larger: the number of layers is the model's one attribute
    of that meaning, or its ``config``'s (see `replicated_model`). ``init`` then draws the smaller
    model's base, and lays it out as `replicate_layers` does pretrained parameters.

    Whether an entry of the config matches nothing is judged by the whole parameter tree: by the
    one that ``init`` makes, and by the one that ``apply`` is given. (Of a model inside another
    module by the latter alone, for what ``init`` makes is not complete before the outer one ends.)

    Args:
      model: a Linen module; also one inside another module. (Of a ``transformers`` Flax model,
        its ``module``.) An adapted model is adapted once more, under another ``adapter_name``.
      peft_config: a `LoraConfig`.
      adapter_name: see `PeftModel`.

    Raises:
      ValueError: where the model is none, the config is none, or ``target_modules`` is None and
        the model's ``config.model_type`` is not known; or where it is not clear how many layers a
        model has that ``layer_replication`` makes larger.
    """
    if not isinstance(model, nn.Module):
        inner = getattr(model, "module", None)
        remedy = " Give its `module`." if isinstance(inner, nn.Module) else ""
        raise ValueError(
            f"get_peft_model takes a Linen module, got {type(model).__name__}.{remedy}"
        )
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(
            f"get_peft_model takes a LoraConfig, got {type(peft_config).__name__}. Read plain data "
            "by `peft.LoraConfig.from_dict`."
        )
    check_adapter_name("get_peft_model", adapter_name)
    if isinstance(model, PeftModel) and adapter_name in model.peft_configs:
        raise ValueError(
            f"get_peft_model: the model has an adapter named {adapter_name!r} already. Give this "
            "one an adapter_name of its own."
        )
    config = with_targets(peft_config, _model_type(model))
    replication = None
    if config.layer_replication:
        model, replication = replicated_model(model, config.layer_replication)
    return PeftModel(
        wrapped=model,
        peft_config=config,
        adapter_name=adapter_name,
        _replication=replication,
    )


def _model_type(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        return config.get("model_type")
    return getattr(config, "model_type", None)
