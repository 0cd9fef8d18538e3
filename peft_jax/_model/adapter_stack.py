"""Several adapters of one model: which act, which are taken off, which are merged."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Self

from flax import linen as nn

from peft_jax._config import LoraConfig, alpha_of, rank_of, tokens_of
from peft_jax._model.named_adapters import delete_adapter, merge_adapters, without_adapters
from peft_jax._spec import LoraSpec
from peft_jax._surgery import Transparent, lora_specs, mute_adapters
from peft_jax._trees import DEFAULT, TOKENS, Layer, Path, dense_spec, map_layers, named_as

# The `with` statements of models that have not ended, the innermost last.
_ENTERED: ContextVar[tuple[contextlib.ExitStack, ...]] = ContextVar("peft_jax_entered", default=())


class SeveralAdapters(Transparent):
    """The methods of a `PeftModel` that are about its adapters, one or several.

    Each adapter is a model around the one before; what they add to a layer adds up.
    """

    _: dataclasses.KW_ONLY
    peft_config: LoraConfig
    adapter_name: str = DEFAULT
    active: bool = True
    _replication: Any = None

    @property
    def peft_configs(self) -> dict[str, LoraConfig]:
        """The config of each adapter, by its name, the first one first."""
        return {part.adapter_name: part.peft_config for part in reversed(self._parts())}

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """Names of the adapters that act."""
        return tuple(part.adapter_name for part in reversed(self._parts()) if part.active)

    @nn.nowrap
    def get_base_model(self) -> nn.Module:
        """The model without adapters."""
        return self._parts()[-1].wrapped

    @nn.nowrap
    def set_adapter(self, adapter_name: str | Sequence[str]) -> Self:
        """The model in which these adapters act, and no others; what they add adds up.

        Which adapters act belongs to the program: ``jax.jit`` traces each choice once. To switch
        without another trace, keep adapters of one shape in trees of their own, and put the one
        that is wanted into the parameters (`peft.add_adapter`); or choose one for each example
        (`stack_adapters`).

        Raises:
          ValueError: on a name that the model lacks, with close ones.
        """
        names = _names(adapter_name)
        for name in names:
            self._part(name)
        return self._with_active(names)

    @nn.nowrap
    def disable_adapter_layers(self) -> Self:
        """The model in which no adapter acts.

        In a ``with`` statement it has no adapter of any model act within, and at the end what was
        before holds again: it is `disable_adapters` there.
        """
        return self._with_active(())

    @nn.nowrap
    def enable_adapter_layers(self) -> Self:
        """The model in which all adapters act; in a ``with`` statement it is `enable_adapters`."""
        return self._with_active(tuple(self.peft_configs))

    @nn.nowrap
    def __enter__(self) -> Self:
        active = self.active_adapters
        if active and len(active) < len(self.peft_configs):
            raise ValueError(
                f"A `with` statement switches all adapters on or off; of this model's only "
                f"{[*active]} act. Call what `set_adapter` returns."
            )
        stack = contextlib.ExitStack()
        stack.enter_context(mute_adapters(muted=not active))
        _ENTERED.set((*_ENTERED.get(), stack))
        return self

    @nn.nowrap
    def __exit__(self, *exception: object) -> None:
        *outer, stack = _ENTERED.get()
        _ENTERED.set(tuple(outer))
        stack.close()

    @nn.nowrap
    def delete_adapter(
        self, params: Any, adapter_name: str, *, base: Any = None
    ) -> tuple[nn.Module, Any]:
        """The model and its parameters without one adapter; the others act as they did.

        Args:
          params: of this model.
          adapter_name: of the adapter; where it is the only one, the plain model is returned.
          base: the base's parameters, for an adapter that trained some of them in place.

        Raises:
          ValueError: on a name that the model or the parameters lack; or where the adapter trained
            parameters in place and ``base`` is not given.
        """
        part = self._part(adapter_name)
        _refuse_lost(part, base)
        return self._less(adapter_name), delete_adapter(params, adapter_name, base=base)

    @nn.nowrap
    def unload(self, params: Any, *, base: Any = None) -> tuple[nn.Module, Any]:
        """The plain model and its parameters, all adapters taken off; see `delete_adapter`."""
        for part in self._parts():
            _refuse_lost(part, base)
        return self._plain(), without_adapters(params) if base is None else base

    @nn.nowrap
    def merge_and_unload(
        self,
        params: Any,
        *inputs: Any,
        specs: Mapping[str, LoraSpec] | None = None,
        adapter_names: str | Sequence[str] | None = None,
        safe_merge: bool = False,
        progress: bool = False,
        **kwargs: Any,
    ) -> tuple[nn.Module, Any]:
        """The plain model, and parameters into which adapters are fused; see `fuse_params`.

        Args:
          params: of this model.
          *inputs: arguments of the model's call (arrays or ``jax.ShapeDtypeStruct``), from which
            the specs are told by `lora_specs`.
          specs: of all adapters, in place of ``inputs``. Without either, weights are read as those
            of Dense layers, and what is plainly none is refused.
          adapter_names: of the adapters to fuse; None: those that act. The others are taken off.
          safe_merge: whether to refuse a sum that holds NaN or infinity.
          progress: whether to show a bar.
          **kwargs: further arguments of the model's call.

        Raises:
          ValueError: as `fuse_params`; with ``safe_merge``, with the path of the parameter.
        """
        names = self.active_adapters if adapter_names is None else _names(adapter_names)
        for name in names:
            self._part(name)
        if specs is None:
            given = bool(inputs or kwargs)
            if given:
                specs = lora_specs(self, *inputs, **kwargs)
            else:
                specs = dense_specs(self.peft_configs, params)
        merged = merge_adapters(params, specs, names, safe_merge=safe_merge, progress=progress)
        return self._plain(), merged

    @nn.nowrap
    def _parts(self) -> list[SeveralAdapters]:
        """This model and the adapted models inside it, the last adapter first."""
        parts = [self]
        while isinstance(parts[-1].wrapped, SeveralAdapters):
            parts.append(parts[-1].wrapped)
        return parts

    @nn.nowrap
    def _part(self, name: str) -> SeveralAdapters:
        found = [part for part in self._parts() if part.adapter_name == name]
        if not found:
            close = difflib.get_close_matches(str(name), self.peft_configs, 3)
            raise ValueError(
                f"The model has no adapter named {name!r}. Close names: {close}; it has "
                f"{[*self.peft_configs][:10]}."
            )
        return found[0]

    @nn.nowrap
    def _with_active(self, names: tuple[str, ...]) -> Self:
        inside = self.wrapped
        if isinstance(inside, SeveralAdapters):
            inside = inside._with_active(names)
        return self.clone(wrapped=inside, active=self.adapter_name in names)

    @nn.nowrap
    def _less(self, name: str) -> nn.Module:
        """The model without the adapter of this name."""
        if self.adapter_name == name:
            return self.wrapped
        assert isinstance(self.wrapped, SeveralAdapters)
        return self.clone(wrapped=self.wrapped._less(name))

    @nn.nowrap
    def _plain(self) -> nn.Module:
        replicated = [part for part in self._parts() if part._replication is not None]
        if replicated:
            raise ValueError(
                "The model has layer_replication: layers that share weights have adapters of "
                "their own, and the plain model has no weights of their own to fuse those into. "
                "Keep the adapted model."
            )
        return self.get_base_model()


def _names(given: Any) -> tuple[str, ...]:
    """One name or several."""
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list | tuple | set | frozenset):
        raise ValueError(f"Adapters are told by a name, or a list of names, got {given!r}.")
    return tuple(given)


def _refuse_lost(part: SeveralAdapters, base: Any) -> None:
    config = part.peft_config
    if base is None and (config.modules_to_save or config.bias != "none"):
        raise ValueError(
            f"The adapter {part.adapter_name!r} trained parameters of the base in place "
            f"(modules_to_save={config.modules_to_save}, bias={config.bias!r}). Give base=, the "
            "base's own, to have them back."
        )


def dense_specs(configs: Mapping[str, LoraConfig], params: Any) -> dict[str, LoraSpec]:
    """Specs of adapters on layers that are read as Dense ones (or tables), by their configs.

    Raises:
      ValueError: where the arrays of a layer leave a doubt; see `fuse_params`.
    """
    specs: dict[str, LoraSpec] = {}

    def note(path: Path, rest: Layer, adapters: Layer) -> Layer:
        for branch, adapter in adapters.items():
            config = configs.get(named_as(branch))
            if config is not None:
                specs["/".join((*path, branch))] = _dense_spec(config, path, rest, branch, adapter)
        return rest

    map_layers(params, note)
    return specs


def _dense_spec(
    config: LoraConfig, path: Path, rest: Layer, branch: str, adapter: Mapping[str, Any]
) -> LoraSpec:
    if branch.partition(".")[0] == TOKENS:
        tokens = tokens_of(config, path, is_table=True)
        equation = "vr,rf->vf"
        return LoraSpec("embedding", equation, len(tokens), variant="tokens", tokens=tokens)
    products = {name: adapter[name] for name in ("a", "b")}
    spec = dense_spec((*path, branch), rest, products)
    rank, alpha = rank_of(config, path), alpha_of(config, path)
    bias = (spec.param if spec.param == "embedding" else "bias") if "bias" in adapter else None
    return dataclasses.replace(
        spec,
        rank=rank,
        alpha=alpha,
        scaling=alpha / (rank**0.5 if config.use_rslora else rank),
        variant="dora" if "magnitude" in adapter else "lora",
        bias=bias,
    )
