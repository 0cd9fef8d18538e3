"""Operations on adapters and on the trees they lie in: trees in, trees out."""

from peft_jax._model import replicate_layers
from peft_jax._trees import SharedStack
from peft_jax.adapters._bank import AdapterBank
from peft_jax.adapters._bank_model import MultiAdapterModel
from peft_jax.adapters._combine import CombinedLora, add_weighted_adapter
from peft_jax.adapters._combine_table import COMBINATIONS
from peft_jax.adapters._selection import Selection
from peft_jax.adapters._stack import stack_adapters
from peft_jax.adapters._train import adapter_value_and_grad, per_adapter

__all__ = [
    "COMBINATIONS",
    "AdapterBank",
    "CombinedLora",
    "MultiAdapterModel",
    "Selection",
    "SharedStack",
    "adapter_value_and_grad",
    "add_weighted_adapter",
    "per_adapter",
    "replicate_layers",
    "stack_adapters",
]
