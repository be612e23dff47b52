"""Tests of `magsd_kernels`: every line of its contract, on every backend that can run here."""
