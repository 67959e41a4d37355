"""Prepare a checkpoint: one aligned record an expert, with fewer bits or in two planes if asked."""
