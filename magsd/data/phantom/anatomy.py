"""A thorax in the plane, as curves.

Coordinates: x in -1..1 from the left of the picture (the patient's right) to its right, y in
-1..1 downwards, the midline at x = 0. `side` is -1 for the lung at the left of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

# Lateral distance from the midline and height; the doubled point is the sharp angle between
# chest wall and diaphragm.
_LUNG: Points = np.array([
    [0.27, -0.79], [0.41, -0.73], [0.53, -0.55], [0.61, -0.28], [0.665, 0.02], [0.69, 0.32],
    [0.695, 0.58], [0.695, 0.58], [0.60, 0.475], [0.47, 0.40], [0.34, 0.385], [0.22, 0.43],
    [0.13, 0.50], [0.10, 0.40], [0.105, 0.10], [0.10, -0.25], [0.12, -0.52], [0.17, -0.71],
])  # fmt: skip
_LOWER = slice(6, 14)
_HEART = np.array([
    [-0.12, -0.22], [-0.145, -0.05], [-0.195, 0.12], [-0.205, 0.28], [-0.165, 0.42],
    [-0.08, 0.50], [0.12, 0.53], [0.33, 0.52], [0.445, 0.46], [0.455, 0.35], [0.39, 0.18],
    [0.29, 0.02], [0.205, -0.11], [0.165, -0.22], [0.06, -0.30],
])  # fmt: skip
_MEDIASTINUM = np.array([
    [-0.13, -1.05], [-0.135, -0.75], [-0.145, -0.5], [-0.145, -0.3], [-0.15, -0.1], [-0.13, 0.6],
    [0.13, 0.6], [0.15, -0.1], [0.155, -0.22], [0.16, -0.29], [0.195, -0.34], [0.20, -0.41],
    [0.165, -0.47], [0.13, -0.52], [0.125, -0.75], [0.12, -1.05],
])  # fmt: skip
_BODY_Y = np.array([-1.6, -1.0, -0.92, -0.85, -0.78, -0.70, -0.58, -0.4, -0.2, 0.0, 0.3, 1.0, 1.6])
_BODY_W: Points = np.array(
    [0.20, 0.23, 0.27, 0.42, 0.66, 0.88, 1.04, 1.08, 0.98, 0.90, 0.87, 0.90, 0.92]
)
RIBS = 10


@dataclass(frozen=True)
class Anatomy:
    """What differs between patients.

    width, height: factors of the thorax. heart: factor of the heart's width. stout: soft tissue
    outside the ribs, as a factor. diaphragm: shift of the domes (left and right of the
    picture). tilt: how far ribs fall from back to front. breasts: size, 0 for none.
    bubble: gas in the stomach, 0 for none. bone: brightness of bone.
    """

    width: float
    height: float
    heart: float
    stout: float
    diaphragm: tuple[float, float]
    tilt: float
    breasts: float
    bubble: float
    bone: float


def draw_anatomy(random: np.random.Generator) -> Anatomy:
    """A patient's thorax."""
    return Anatomy(
        width=random.uniform(0.92, 1.08),
        height=random.uniform(0.93, 1.06),
        heart=random.uniform(0.86, 1.18),
        stout=random.uniform(0.94, 1.12),
        diaphragm=(random.uniform(-0.06, 0.05), random.uniform(-0.03, 0.10)),
        tilt=random.uniform(0.34, 0.50),
        breasts=random.uniform(0.8, 1.2) * (random.random() < 0.45),
        bubble=random.uniform(0.6, 1.2) * (random.random() < 0.6),
        bone=random.uniform(0.8, 1.25),
    )


def smooth_closed(points: Points, steps: int = 8) -> Points:
    """A closed Catmull-Rom curve through points (P, 2), as (P * steps, 2)."""
    return _catmull_rom(
        np.roll(points, 1, 0), points, np.roll(points, -1, 0), np.roll(points, -2, 0), steps
    )


def smooth_open(points: Points, steps: int = 8) -> Points:
    """A Catmull-Rom curve from the first of points (P, 2) to the last."""
    padded = np.vstack([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    curve = _catmull_rom(padded[:-3], padded[1:-2], padded[2:-1], padded[3:], steps)
    return np.vstack([curve, points[-1:]])


def _catmull_rom(before: Points, start: Points, end: Points, after: Points, steps: int) -> Points:
    t = (np.arange(steps) / steps)[None, :, None]
    before, start, end, after = (p[:, None] for p in (before, start, end, after))
    curve = start + 0.5 * t * (
        end
        - before
        + t * (2 * before - 5 * start + 4 * end - after + t * (3 * (start - end) + after - before))
    )
    return curve.reshape(-1, 2)


def lung_outline(anatomy: Anatomy, side: int, breath: float) -> Points:
    """The lung's outline (P, 2). breath: how far the diaphragm stands lower."""
    points = _LUNG * [anatomy.width, anatomy.height]
    points[_LOWER, 1] += anatomy.diaphragm[(side + 1) // 2] + breath
    return smooth_closed(points * [side, 1])


def heart_outline(anatomy: Anatomy, breath: float) -> Points:
    """Heart and great vessels' root (P, 2)."""
    shape = [anatomy.heart * anatomy.width, anatomy.height]
    return smooth_closed(_HEART * shape + [0, breath + anatomy.diaphragm[1] / 2])


def mediastinum_outline(anatomy: Anatomy) -> Points:
    """Upper mediastinum with the aortic knob (P, 2)."""
    return smooth_closed(_MEDIASTINUM * [anatomy.width, anatomy.height])


def body_half_width(anatomy: Anatomy, y: NDArray[np.float32]) -> NDArray[np.floating]:
    """Half of the body's width at heights y."""
    return np.interp(y, _BODY_Y, _BODY_W).astype(np.float32) * anatomy.stout * anatomy.width


def cage_half_width(anatomy: Anatomy, y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half of the rib cage's width at heights y."""
    wall = _LUNG[:7]
    return np.interp(y / anatomy.height, wall[:, 1], wall[:, 0]) * anatomy.width


def ribs(anatomy: Anatomy, side: int) -> list[tuple[Points, Points]]:
    """Back and front part of each rib, (P, 2) each.

    A rib is half a ring round the chest, from the spine (angle 0) by the side to the breastbone
    (angle pi), in a plane that falls towards the front; the picture looks along that depth.
    """
    angle = np.linspace(0.05, 1.0, 20) * np.pi
    curves = []
    for number in range(RIBS):
        start = (-0.80 + 0.128 * number) * anatomy.height
        fall = anatomy.tilt * (0.55 + 0.45 * min(1.0, number / 4))
        depth = (1 - np.cos(angle)) / 2
        hump = 0.05 * np.sin(2 * angle) * (angle < np.pi / 2)
        y = start + fall * depth - hump
        reach = float(cage_half_width(anatomy, np.array(start + 0.5 * fall)))
        x = 0.05 + (reach + 0.012 - 0.05) * np.sin(angle) ** 0.85
        points = np.stack([side * x, y], 1)
        # The front end is cartilage, which does not show; it is longer for the lower ribs.
        end = 17 - min(number // 2, 4)
        curves.append((points[:11], points[10:end]))
    return curves


def clavicle(anatomy: Anatomy, side: int, lift: float) -> Points:
    """The collar bone's axis (P, 2). lift: how high the shoulder stands."""
    points = np.array([[0.07, -0.50], [0.20, -0.545], [0.36, -0.60], [0.52, -0.66], [0.72, -0.70]])
    points[:, 1] -= lift * np.array([0, 0.1, 0.4, 0.8, 1.0])
    return smooth_open(points * [side * anatomy.width, anatomy.height])
