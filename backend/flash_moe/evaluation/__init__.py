"""Judge a model: perplexity, right replies, and divergence from another run, on held-out data."""
