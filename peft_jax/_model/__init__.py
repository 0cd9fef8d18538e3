"""A whole model under a config."""

from peft_jax._model.batches import *
from peft_jax._model.functions import *
from peft_jax._model.named_adapters import *
from peft_jax._model.peft_model import *
from peft_jax._model.replication.layers import *
from peft_jax._model.replication.model import *
from peft_jax._model.replication.rule import *
from peft_jax._model.summary import *
from peft_jax._model.trainable import *
