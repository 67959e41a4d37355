"""Experts from disk to the matrix product: layout, store, reader, bank, streamed module."""
