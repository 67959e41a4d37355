"""The machine: what computes the experts here and what would be faster."""
