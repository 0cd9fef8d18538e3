"""Arrays in, arrays out: low-rank products, quantized values, layouts. JAX, no Flax."""

from peft_jax._numerics.dora import *
from peft_jax._numerics.einsum import *
from peft_jax._numerics.jax_internals import *
from peft_jax._numerics.layout import *
from peft_jax._numerics.lazy import *
from peft_jax._numerics.low_rank import *
from peft_jax._numerics.quantized.dot import *
from peft_jax._numerics.quantized.encoding import *
from peft_jax._numerics.quantized.methods import *
from peft_jax._numerics.quantized.products import *
from peft_jax._numerics.quantized.values import *
from peft_jax._numerics.quantized.weight import *
from peft_jax._numerics.sharding import *
from peft_jax._numerics.sparsify import *
from peft_jax._numerics.spectra import *
from peft_jax._numerics.weight_change import *
