"""Triton kernels, one module per operation; imported when the backend first runs."""
