"""Files: formats, safetensors, and outputs that appear whole or not at all."""
