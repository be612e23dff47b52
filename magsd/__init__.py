"""Attention-guided classification of chest radiographs on the kernels of `magsd_kernels`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("magsd")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"
