"""Quantized values: methods, encoding, and products that read them."""

from peft_jax._numerics.quantized.dot import *
from peft_jax._numerics.quantized.encoding import *
from peft_jax._numerics.quantized.methods import *
from peft_jax._numerics.quantized.products import *
from peft_jax._numerics.quantized.values import *
from peft_jax._numerics.quantized.weight import *
