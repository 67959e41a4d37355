"""The expert kernels: one Metal source for Metal and CUDA, a native one for the CPU."""
