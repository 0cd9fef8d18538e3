"""Larger models made of a smaller one's layers, whose weights they share."""

from peft_jax._model.replication.layers import *
from peft_jax._model.replication.model import *
from peft_jax._model.replication.rule import *
