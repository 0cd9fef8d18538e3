"""A quantization flow for adapters: simulate, calibrate the base once, swap adapters, export."""

from peft_jax.quantsim._calibrate import compute_encodings
from peft_jax.quantsim._encoding import Encoding, freeze, learnable_mask, merge_encodings, unfreeze
from peft_jax.quantsim._files import export_adapter, export_base, load_encodings
from peft_jax.quantsim._grid import fake_quantize
from peft_jax.quantsim._metadata import AdapterLayer, AdapterMetadata, adapter_metadata, use_adapter
from peft_jax.quantsim._model import SimulatedModel, find_sites, simulate
from peft_jax.quantsim._quantizer import Quantizer, QuantizerRule, SimulationConfig
from peft_jax.quantsim._sites import Site, SiteSpec
from peft_jax.quantsim._to_integers import integer_params

__all__ = [
    "AdapterLayer",
    "AdapterMetadata",
    "Encoding",
    "Quantizer",
    "QuantizerRule",
    "SimulatedModel",
    "SimulationConfig",
    "Site",
    "SiteSpec",
    "adapter_metadata",
    "compute_encodings",
    "export_adapter",
    "export_base",
    "fake_quantize",
    "find_sites",
    "freeze",
    "integer_params",
    "learnable_mask",
    "load_encodings",
    "merge_encodings",
    "simulate",
    "unfreeze",
    "use_adapter",
]
