"""How files look: safetensors headers, expert records, manifests, sealed files. No MLX."""
