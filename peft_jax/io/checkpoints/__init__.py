"""Whole checkpoints, tensor by tensor: read, fused, quantized and written."""
