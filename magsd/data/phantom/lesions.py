"""Opacities of the lung, by class."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

CLASSES = ("normal", "focal", "diffuse", "ground-glass")
_Drawn = tuple[NDArray[np.floating], float, float]  # shape, strength, how far vessels vanish
_MASK_LEVEL = 0.3  # share of the lesion's own strength from which a pixel counts as lesion


@dataclass(frozen=True)
class Chest:
    """What a lesion has to know of the drawn lungs; all (S, S) float32.

    x, y: coordinates of each pixel. lungs: 1 inside. depth: 0 at a lung's border to 1 at its
    innermost. dense: 1 behind heart and mediastinum. top, bottom: the lungs' ends in y.
    """

    x: NDArray[np.floating]
    y: NDArray[np.floating]
    lungs: NDArray[np.floating]
    depth: NDArray[np.floating]
    dense: NDArray[np.floating]
    top: float
    bottom: float


@dataclass(frozen=True)
class Lesion:
    """alpha: (S, S) float32, the share of air replaced. solid: how far vessels vanish in it.

    mask: (S, S) bool, where the lesion is plain to see.
    """

    alpha: NDArray[np.floating]
    solid: float
    mask: NDArray[np.bool_]


def draw_lesion(label: str, chest: Chest, random: np.random.Generator) -> Lesion | None:
    """The lesion of one of `CLASSES`; None for "normal"."""
    if label == "normal":
        return None
    draw = {"focal": _focal, "diffuse": _diffuse, "ground-glass": _ground_glass}[label]
    shape, strength, solid = draw(chest, random)
    shape = np.clip(shape, 0, 1) * chest.lungs
    return Lesion(shape * strength, solid, shape * (1 - chest.dense) > _MASK_LEVEL)


def cloud(
    size: int, cells: int, random: np.random.Generator, octaves: int = 3
) -> NDArray[np.float32]:
    """(size, size) float32 smooth noise of about unit deviation, `cells` waves across."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        count = min(size, cells << octave) + 1
        grid = random.standard_normal((count, count), np.float32) * 0.6**octave
        waves = cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
        total += waves.astype(np.float32, copy=False)  # its type has no dtype
    return total


def _ramp(values: NDArray[np.floating], low: float, high: float) -> NDArray[np.floating]:
    """0 below low, 1 above high, smooth between."""
    t: NDArray[np.floating] = np.clip((values - low) / (high - low), 0, 1)
    ramp: NDArray[np.floating] = t * t * (3 - 2 * t)
    return ramp


def _focal(chest: Chest, random: np.random.Generator) -> _Drawn:
    """One dense consolidation with an uneven edge."""
    inside = np.flatnonzero(chest.depth * (1 - chest.dense) > 0.5)
    place = inside[random.integers(len(inside))]
    center_x, center_y = chest.x.flat[place], chest.y.flat[place]
    radius = random.uniform(0.18, 0.29)
    stretch = random.uniform(0.75, 1.3)
    turn = random.uniform(0, np.pi)
    dx, dy = chest.x - center_x, chest.y - center_y
    along = (np.cos(turn) * dx + np.sin(turn) * dy) / stretch
    across = (np.cos(turn) * dy - np.sin(turn) * dx) * stretch
    distance = np.sqrt(along * along + across * across) / radius
    distance += 0.16 * cloud(len(chest.x), 7, random, octaves=4)
    patches = 0.88 + 0.09 * cloud(len(chest.x), 20, random, octaves=2)
    return _ramp(-distance, -1.35, -0.35) * patches, random.uniform(0.8, 0.95), 0.75


def _diffuse(chest: Chest, random: np.random.Generator) -> _Drawn:
    """Patches all over both lungs, denser towards hila and bases."""
    size = len(chest.x)
    patches = 0.62 + 0.24 * cloud(size, 8, random, octaves=4)
    height = (chest.y - chest.top) / (chest.bottom - chest.top)
    weight = 0.75 + 0.35 * _ramp(height, 0.1, 0.8)
    return _ramp(patches * weight, -0.1, 1.0), random.uniform(0.58, 0.74), 0.55


def _ground_glass(chest: Chest, random: np.random.Generator) -> _Drawn:
    """Haze along the chest wall of both lungs, mostly low; vessels stay visible."""
    size = len(chest.x)
    wall = np.abs(chest.x) - (0.40 + 0.16 * _ramp(chest.y, -0.7, 0.2))
    width = random.uniform(0.03, 0.08)
    band = _ramp(wall + 0.06 * cloud(size, 5, random, octaves=2) + width, -0.06, 0.08)
    height = (chest.y - chest.top) / (chest.bottom - chest.top)
    low = _ramp(height, 0.12, 0.45)
    patches = 0.8 + 0.14 * cloud(size, 6, random, octaves=3)
    return band * low * patches, random.uniform(0.66, 0.82), 0.1
