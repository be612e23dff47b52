"""Speed and memory of `magsd_kernels`, measured beside what else computes the same; see README."""
