"""Experts from disk to the matrix product."""
