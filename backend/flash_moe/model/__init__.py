"""mlx-lm's models with streamed experts, one file a family."""
