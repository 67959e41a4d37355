"""A model from mlx-lm with its experts left on disk, and the loop that makes tokens with it."""
