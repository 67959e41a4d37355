"""Code that computes experts: Metal and CUDA from one source, C, or plain MLX."""
