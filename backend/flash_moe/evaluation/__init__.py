"""Judge a model: perplexity, right replies, divergence from another run."""
