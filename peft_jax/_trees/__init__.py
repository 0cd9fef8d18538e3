"""Parameter trees in, parameter trees out."""

from peft_jax._trees.adapter_leaves import *
from peft_jax._trees.arguments import *
from peft_jax._trees.boxes import *
from peft_jax._trees.fuse import *
from peft_jax._trees.paths import *
from peft_jax._trees.progress import *
from peft_jax._trees.quantize import *
from peft_jax._trees.quantized_leaves import *
from peft_jax._trees.shared_stack import *
from peft_jax._trees.unfuse import *
