"""Parameter-efficient fine-tuning of Flax Linen models."""

from peft_jax._adapters import (
    LoRAConvAdapter,
    LoRADenseAdapter,
    LoRADenseGeneralAdapter,
    LoRAEinsumAdapter,
    LoRAEmbedAdapter,
)
from peft_jax._interceptor import Interceptor, ModuleInterceptor
from peft_jax._lora import (
    LoRAConv,
    LoRADense,
    LoRADenseGeneral,
    LoRAEinsum,
    LoRAEmbed,
    LoRAWeight,
)
from peft_jax._model import lora_specs
from peft_jax._params import fuse_params, merge_params, split_params
from peft_jax._registry import register_layer
from peft_jax._specs import LoraSpec
from peft_jax._unfuse import unfuse_params

__all__ = [
    "Interceptor",
    "LoRAConv",
    "LoRAConvAdapter",
    "LoRADense",
    "LoRADenseAdapter",
    "LoRADenseGeneral",
    "LoRADenseGeneralAdapter",
    "LoRAEinsum",
    "LoRAEinsumAdapter",
    "LoRAEmbed",
    "LoRAEmbedAdapter",
    "LoRAWeight",
    "LoraSpec",
    "ModuleInterceptor",
    "fuse_params",
    "lora_specs",
    "merge_params",
    "register_layer",
    "split_params",
    "unfuse_params",
]
