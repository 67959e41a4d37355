"""Prepare a checkpoint: one aligned record an expert, with fewer bits if asked."""
