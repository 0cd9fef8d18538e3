"""Parameter-efficient fine-tuning of Flax Linen models."""

from peft_jax._adapters import (
    LoRAConvAdapter,
    LoRADenseAdapter,
    LoRADenseGeneralAdapter,
    LoRAEinsumAdapter,
    LoRAEmbedAdapter,
)
from peft_jax._checkpoint import dequantize_checkpoint, quantize_checkpoint
from peft_jax._config import LoraConfig
from peft_jax._config_parts import CordaConfig, EvaConfig, LoftQConfig, PeftType, TaskType
from peft_jax._interceptor import Interceptor, ModuleInterceptor
from peft_jax._lora import (
    LoRAConv,
    LoRADense,
    LoRADenseGeneral,
    LoRAEinsum,
    LoRAEmbed,
    LoRAWeight,
)
from peft_jax._methods import QuantizationMethod
from peft_jax._model import layer_specs, lora_specs
from peft_jax._named import (
    adapter_names,
    add_adapter,
    delete_adapter,
    disable_adapters,
    enable_adapters,
    get_adapter,
    rename_adapter,
)
from peft_jax._params import fuse_params, merge_params, split_params
from peft_jax._peft_model import PeftModel, get_peft_model
from peft_jax._quantize import dequantize, quantize, simulate_quantize
from peft_jax._quantized import (
    Int4Conv,
    Int4Dense,
    Int4DenseGeneral,
    Int4Einsum,
    Int4Embed,
    SimulateQuantizedConv,
    SimulateQuantizedDense,
    SimulateQuantizedDenseGeneral,
    SimulateQuantizedEinsum,
    SimulateQuantizedEmbed,
)
from peft_jax._registry import register_layer
from peft_jax._specs import LayerSpec, LoraSpec
from peft_jax._status import AdapterRow, AdapterStatus, adapter_status
from peft_jax._stored import StoredValues
from peft_jax._summary import Summary, SummaryRow, summarize
from peft_jax._trainable import print_trainable_parameters, trainable_mask
from peft_jax._unfuse import unfuse_params
from peft_jax.adapters import (
    AdapterBank,
    CombinedLora,
    MultiAdapterModel,
    Selection,
    SharedStack,
    adapter_value_and_grad,
    add_weighted_adapter,
    per_adapter,
    replicate_layers,
    stack_adapters,
)
from peft_jax.initializers import (
    collect_covariances,
    get_eva_state_dict,
    init_lora_weights,
    initialize_lora_eva_weights,
    redistribute_ranks,
    replace_lora_weights_loftq,
    subtract_mutated_init,
)
from peft_jax.io import (
    export_gguf,
    export_gguf_adapter,
    load_adapter,
    load_gguf_adapter,
    restore_orbax,
    save_adapter,
    save_orbax,
)

__all__ = [
    "AdapterBank",
    "AdapterRow",
    "AdapterStatus",
    "CombinedLora",
    "CordaConfig",
    "EvaConfig",
    "Int4Conv",
    "Int4Dense",
    "Int4DenseGeneral",
    "Int4Einsum",
    "Int4Embed",
    "Interceptor",
    "LayerSpec",
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
    "LoftQConfig",
    "LoraConfig",
    "LoraSpec",
    "ModuleInterceptor",
    "MultiAdapterModel",
    "PeftModel",
    "PeftType",
    "QuantizationMethod",
    "Selection",
    "SharedStack",
    "SimulateQuantizedConv",
    "SimulateQuantizedDense",
    "SimulateQuantizedDenseGeneral",
    "SimulateQuantizedEinsum",
    "SimulateQuantizedEmbed",
    "StoredValues",
    "Summary",
    "SummaryRow",
    "TaskType",
    "adapter_names",
    "adapter_status",
    "adapter_value_and_grad",
    "add_adapter",
    "add_weighted_adapter",
    "collect_covariances",
    "delete_adapter",
    "dequantize",
    "dequantize_checkpoint",
    "disable_adapters",
    "enable_adapters",
    "export_gguf",
    "export_gguf_adapter",
    "fuse_params",
    "get_adapter",
    "get_eva_state_dict",
    "get_peft_model",
    "init_lora_weights",
    "initialize_lora_eva_weights",
    "layer_specs",
    "load_adapter",
    "load_gguf_adapter",
    "lora_specs",
    "merge_params",
    "per_adapter",
    "print_trainable_parameters",
    "quantize",
    "quantize_checkpoint",
    "redistribute_ranks",
    "register_layer",
    "rename_adapter",
    "replace_lora_weights_loftq",
    "replicate_layers",
    "restore_orbax",
    "save_adapter",
    "save_orbax",
    "simulate_quantize",
    "split_params",
    "stack_adapters",
    "subtract_mutated_init",
    "summarize",
    "trainable_mask",
    "unfuse_params",
]
