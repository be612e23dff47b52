"""Radiograph-like images drawn from a seed, with the masks of their lesions."""

from __future__ import annotations

from magsd.data.phantom.draw import VERSION, draw_phantom
from magsd.data.phantom.lesions import CLASSES

__all__ = ["CLASSES", "VERSION", "draw_phantom"]
