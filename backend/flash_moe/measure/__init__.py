"""The machine: what computes the experts here, what would be faster, and where the time goes."""
