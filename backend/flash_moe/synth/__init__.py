"""Checkpoints of random weights, for tests and measurements."""
