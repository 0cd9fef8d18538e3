"""A model each of whose examples is adapted by an adapter of its own."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from peft_jax._surgery import ModuleInterceptor, Transparent
from peft_jax.adapters._bank_rule import banked
from peft_jax.adapters._selection import Selection


class MultiAdapterModel(Transparent):
    """A Linen module that computes each example of a batch with an adapter of its own.

    Its parameters are those of the model and of a bank (`stack_adapters`), merged; any method runs
    so. Axis 0 of the input of each layer in the bank counts the examples; an input of length 1
    there is shared by all. Layers that are adapted beside their weight can be in a bank, which are
    all but ``nn.ConvTranspose(transpose_kernel=True)``, masked convolutions, layers with injected
    functions, and `target_parameters`; on stored weights as on others.

    Example::

      model = peft.MultiAdapterModel(wrapped=base_model)
      y = model.apply({"params": bank.merge(base)}, x, adapters=bank.select(names))

    Attributes:
      wrapped: the model, without adapters.
    """

    @nn.nowrap
    def init_with_output(
        self, rngs: Any, *args: Any, adapters: Selection | None = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """As of the wrapped module; adapters come from a bank, and are not drawn."""
        return super().init_with_output(rngs, *args, **kwargs)

    @nn.nowrap
    def apply(
        self, variables: Any, *args: Any, adapters: Selection | None = None, **kwargs: Any
    ) -> Any:
        """As of any Linen module, with the adapter of each example.

        Args:
          variables: with the bank among the parameters.
          *args: of the method.
          adapters: from `AdapterBank.select`.
          **kwargs: further arguments of ``nn.Module.apply`` and of the method.

        Raises:
          ValueError: where ``adapters`` is not given, the parameters lack the bank, or a layer of
            the bank cannot tell the examples apart.
        """
        if not isinstance(adapters, Selection):
            raise ValueError(
                "MultiAdapterModel.apply takes adapters=bank.select(names), one for each example, "
                f"got {type(adapters).__name__}."
            )
        params = adapters.insert(variables.get("params", {}))
        return super().apply({**variables, "params": params}, *args, **kwargs)

    @nn.nowrap
    def _forward(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with ModuleInterceptor(banked):
            return getattr(self.wrapped, method)(*args, **kwargs)
