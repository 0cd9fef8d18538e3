"""What adapters and quantization do to one layer, and the public wrappers."""

from peft_jax._layers.adapter_variants import *
from peft_jax._layers.lora import *
from peft_jax._layers.lora_norm import *
from peft_jax._layers.lora_rules import *
from peft_jax._layers.quantized import *
from peft_jax._layers.tokens import *
