"""From a seed to a radiograph: attenuation along the beam, summed, then exposed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.data.phantom import anatomy as body
from magsd.data.phantom.anatomy import Anatomy, Points
from magsd.data.phantom.lesions import Chest, Lesion, cloud, draw_lesion

Picture = NDArray[np.integer | np.floating]
VERSION = 3  # part of the cache's key: raise it when a picture changes
_BITS = 4  # of the subpixel in opencv's drawing
_SIDES = (-1, 1)


@dataclass(frozen=True)
class Pose:
    """What differs between images of one patient: place in the picture, breath, shoulders."""

    matrix: NDArray[np.float64]  # (2, 3), from the anatomy's plane to the picture's, both -1..1
    breath: float
    lift: float


class Canvas:
    """Draws curves of the anatomy's plane on (size, size) pictures."""

    def __init__(self, size: int, pose: Pose) -> None:
        self.size = size
        self._matrix = pose.matrix
        inverse = cv2.invertAffineTransform(pose.matrix).astype(np.float32)
        ticks = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
        columns, rows = ticks[None, :], ticks[:, None]
        self.x = inverse[0, 0] * columns + inverse[0, 1] * rows + inverse[0, 2]
        self.y = inverse[1, 0] * columns + inverse[1, 1] * rows + inverse[1, 2]

    def _points(self, curve: Points) -> NDArray[np.int32]:
        plane = curve @ self._matrix[:, :2].T + self._matrix[:, 2]
        pixels = (plane + 1) * (self.size / 2) - 0.5
        points: NDArray[np.int32] = np.rint(pixels * (1 << _BITS)).astype(np.int32)
        return points

    def fill(self, outlines: list[Points]) -> NDArray[np.uint8]:
        """(S, S) uint8, 255 inside any of the outlines."""
        picture = np.zeros((self.size, self.size), np.uint8)
        for outline in outlines:
            cv2.fillPoly(picture, [self._points(outline)], 255, cv2.LINE_AA, _BITS)
        return picture

    def lines(
        self,
        curves: Sequence[Points] | Points,
        width: float,
        picture: NDArray[np.uint8] | None = None,
        value: int = 255,
    ) -> NDArray[np.uint8]:
        """(S, S) uint8 with the curves in the width (in the plane's units) and value given."""
        if picture is None:
            picture = np.zeros((self.size, self.size), np.uint8)
        thickness = max(1, round(width * self.size / 2))
        if isinstance(curves, np.ndarray):  # (N, P, 2), of equal lengths
            points = list(self._points(curves))
        else:
            points = [self._points(curve) for curve in curves]
        cv2.polylines(picture, points, False, value, thickness, cv2.LINE_AA, _BITS)
        return picture

    def soft(self, picture: NDArray[np.uint8], sigma: float) -> NDArray[np.float32]:
        """The picture as float32 in 0..1, blurred by sigma in the plane's units."""
        return blur(picture, sigma * self.size / 2).astype(np.float32) * np.float32(1 / 255)


def blur(picture: Picture, sigma: float) -> Picture:
    """Gaussian blur of sigma pixels; wide ones are done at a quarter of the size."""
    if sigma < 0.3:
        return picture
    if sigma > 6:
        size = picture.shape[::-1]
        small = cv2.resize(picture, (size[0] // 4, size[1] // 4), interpolation=cv2.INTER_AREA)
        return cv2.resize(cv2.GaussianBlur(small, (0, 0), sigma / 4), size)
    return cv2.GaussianBlur(picture, (0, 0), sigma)


def sigmoid(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """1 / (1 + exp(-values)), by tanh, which does not overflow."""
    share: NDArray[np.floating] = 0.5 + 0.5 * np.tanh(0.5 * values)
    return share


def draw_phantom(
    label: str, *, size: int, seed: int, patient: int, number: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One image (size, size) uint8 and its lesion's mask (size, size) bool.

    The patient's anatomy depends on (seed, patient), all else on (seed, number).
    """
    anatomy = body.draw_anatomy(np.random.default_rng([seed, 1, patient]))
    random = np.random.default_rng([seed, 2, number])
    pose = _draw_pose(random)
    canvas = Canvas(size, pose)
    heart = canvas.soft(canvas.fill([body.heart_outline(anatomy, pose.breath)]), 0.012)
    middle = canvas.soft(canvas.fill([body.mediastinum_outline(anatomy)]), 0.018)
    dense = np.maximum(heart, middle)
    chest, air = _lungs(canvas, anatomy, pose, dense)
    lesion = draw_lesion(label, chest, random)
    attenuation = 0.07 * heart + 0.04 * middle
    attenuation += _lung_tissue(canvas, anatomy, chest, air, lesion, random)
    attenuation += _chest_wall(canvas, anatomy, pose, random)
    image = _expose(attenuation, canvas, random)
    mask = lesion.mask if lesion is not None else np.zeros((size, size), bool)
    return image, mask


def _draw_pose(random: np.random.Generator) -> Pose:
    turn = np.deg2rad(random.normal(0, 2.0))
    scale = random.uniform(1.02, 1.20)
    matrix = np.array([
        [scale * np.cos(turn), -scale * np.sin(turn), random.normal(0, 0.03)],
        [scale * np.sin(turn), scale * np.cos(turn), random.normal(0.09, 0.03)],
    ])  # fmt: skip
    return Pose(matrix, breath=random.uniform(-0.04, 0.06), lift=random.uniform(-0.03, 0.07))


def _lungs(
    canvas: Canvas, anatomy: Anatomy, pose: Pose, dense: NDArray[np.floating]
) -> tuple[Chest, NDArray[np.floating]]:
    """The lungs as lesions need them, and the air along the beam (S, S) in 0..1."""
    outlines = [body.lung_outline(anatomy, side, pose.breath) for side in _SIDES]
    filled = canvas.fill(outlines)
    distance = cv2.distanceTransform((filled > 127).astype(np.uint8), cv2.DIST_L2, 3)
    depth = distance * np.float32(1 / max(1.0, float(distance.max())))
    inward = 1 - np.minimum(1, depth * 1.5)
    air = blur(np.sqrt(1 - inward * inward), 0.01 * canvas.size)
    heights = np.vstack(outlines)[:, 1]
    chest = Chest(
        x=canvas.x,
        y=canvas.y,
        lungs=canvas.soft(filled, 0.008),
        depth=depth,
        dense=dense,
        top=float(heights.min()),
        bottom=float(heights.max()),
    )
    return chest, canvas.soft(filled, 0.006) * (0.45 + 0.55 * air) * (1 - 0.75 * dense)


def _lung_tissue(
    canvas: Canvas,
    anatomy: Anatomy,
    chest: Chest,
    air: NDArray[np.floating],
    lesion: Lesion | None,
    random: np.random.Generator,
) -> NDArray[np.floating]:
    """What vessels add, and what the air that is left takes away."""
    vessels = _vessels(canvas, anatomy, random) * chest.lungs * (1 - 0.8 * chest.dense)
    if lesion is not None:
        air = air * (1 - lesion.alpha)
        vessels *= 1 - lesion.solid * lesion.alpha
    tissue: NDArray[np.floating] = 0.10 * vessels - 0.62 * air - _airways(canvas, anatomy)
    return tissue


def _chest_wall(
    canvas: Canvas, anatomy: Anatomy, pose: Pose, random: np.random.Generator
) -> NDArray[np.floating]:
    """Soft tissue and bone."""
    ratio = canvas.x / body.body_half_width(anatomy, canvas.y)
    tissue: NDArray[np.floating] = np.sqrt(np.maximum(0, 1 - ratio * ratio))
    tissue *= 0.86 + 0.16 * np.tanh(1.5 * canvas.y)
    inside = tissue > 0
    tissue += _soft_parts(canvas, anatomy, pose)
    tissue += 0.012 * cloud(canvas.size, 24, random, octaves=2) * inside
    return tissue + _bones(canvas, anatomy, pose) * (0.35 + 0.65 * inside)


def _bones(canvas: Canvas, anatomy: Anatomy, pose: Pose) -> NDArray[np.floating]:
    pairs = [pair for side in _SIDES for pair in body.ribs(anatomy, side)]
    back, front = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    # A tube of cortex round marrow: the rim stops more of the beam than the middle.
    picture = canvas.lines(back, 0.052, value=190)
    canvas.lines(back, 0.030, picture, 120)
    total = canvas.soft(picture, 0.006) * 0.145
    picture = canvas.lines(front, 0.056, value=150)
    canvas.lines(front, 0.034, picture, 105)
    total += canvas.soft(picture, 0.009) * 0.095
    collar = [body.clavicle(anatomy, side, pose.lift) for side in _SIDES]
    picture = canvas.lines(collar, 0.062, value=230)
    canvas.lines(collar, 0.034, picture, 150)
    total += canvas.soft(picture, 0.007) * 0.17
    return (total + _spine(canvas, anatomy)) * np.float32(anatomy.bone)


def _spine(canvas: Canvas, anatomy: Anatomy) -> NDArray[np.floating]:
    """A column of vertebrae with darker discs and the knobs of their arches."""
    x, y = canvas.x, canvas.y
    column = sigmoid((0.075 * anatomy.width - np.abs(x)) * 90)
    phase = y * (2 * np.pi / (0.128 * anatomy.height))
    vertebra = 0.80 + 0.20 * np.tanh(2.5 * np.cos(phase) + 1.2)
    knobs = np.exp(-np.square(np.abs(x) - 0.045) / 0.0004)
    knobs *= np.square(np.square(np.maximum(0, np.cos(phase))))
    ridge = np.exp(-np.square(x) / 0.0003) * np.square(np.maximum(0, np.cos(phase + 1.5)))
    spine: NDArray[np.floating] = 0.10 * vertebra * column + 0.04 * knobs + 0.03 * ridge
    return spine


def _soft_parts(canvas: Canvas, anatomy: Anatomy, pose: Pose) -> NDArray[np.floating]:
    """Breasts, shoulder blades, heads of the arm bones, liver and the gas in the stomach."""
    x, y = canvas.x, canvas.y
    total: NDArray[np.floating] = np.zeros_like(x)
    if anatomy.breasts:
        size = anatomy.breasts
        radius = ((np.abs(x) - 0.44) / (0.34 * size)) ** 2 + ((y - 0.30) / (0.30 * size)) ** 2
        total += 0.14 * np.sqrt(np.maximum(0, 1 - radius))
    blade = [
        np.array([[0.60, -0.62], [0.80, -0.60], [0.86, -0.40], [0.74, -0.02], [0.68, 0.02],
                  [0.63, -0.25]]) * [side, 1] - [0, pose.lift]
        for side in _SIDES
    ]  # fmt: skip
    total += 0.07 * canvas.soft(canvas.fill([body.smooth_closed(b) for b in blade]), 0.012)
    arm = ((np.abs(x) - 0.93) / 0.13) ** 2 + ((y + 0.60 + pose.lift) / 0.13) ** 2
    total += 0.13 * sigmoid((1 - arm) * 8)
    if anatomy.bubble:
        size = anatomy.bubble
        low = 0.58 + anatomy.diaphragm[1] + pose.breath
        gas = ((x - 0.34) / (0.14 * size)) ** 2 + ((y - low) / (0.07 * size)) ** 2
        total -= 0.20 * sigmoid((1 - gas) * 2.5)
    return total


def _airways(canvas: Canvas, anatomy: Anatomy) -> NDArray[np.floating]:
    """Windpipe and main bronchi."""
    fork = -0.30 * anatomy.height
    pipe = body.smooth_open(np.array([[0.0, -1.3], [0.005, -0.7], [-0.012, fork]]))
    right = np.array([[-0.012, fork], [-0.09, fork + 0.10], [-0.15, fork + 0.20]])
    left = np.array([[-0.012, fork], [0.09, fork + 0.09], [0.19, fork + 0.15]])
    picture = canvas.lines([pipe], 0.062, value=220)
    canvas.lines([right, left], 0.045, picture, 150)
    return canvas.soft(picture, 0.012) * 0.13


def _vessels(canvas: Canvas, anatomy: Anatomy, random: np.random.Generator) -> NDArray[np.floating]:
    """Branching vessels from each hilum, thinner with every branching, (S, S) in 0..1."""
    total = np.zeros((canvas.size, canvas.size), np.float32)
    side = np.repeat(_SIDES, 9)
    angle = np.tile(np.linspace(-1.35, 1.40, 9), 2) + random.normal(0, 0.10, 18)
    start = np.stack([0.15 * anatomy.width * side, np.full(18, -0.12)], 1)
    heading = np.stack([side * np.cos(angle), np.sin(angle)], 1)
    length = (0.30 + 0.16 * np.sin(angle) ** 2) * random.uniform(0.85, 1.15, 18)
    for width, value in ((0.034, 220), (0.020, 170), (0.012, 120), (0.008, 90)):
        reach = heading * length[:, None]
        bend = random.normal(0, 0.08, (len(reach), 1))
        middle = start + 0.5 * reach + bend * reach[:, ::-1] * [-1, 1]
        end = start + reach
        curves = np.stack([start, middle, end], 1)
        total += canvas.soft(canvas.lines(curves, width, value=value), 0.006)
        start = np.concatenate([middle, end])
        turn = random.normal(0, 0.14, len(start)) + np.repeat([0.42, -0.42], len(reach))
        cos, sin = np.cos(turn)[:, None], np.sin(turn)[:, None]
        onward = np.tile(heading, (2, 1))
        heading = cos * onward + sin * onward[:, ::-1] * [-1, 1]
        length = np.tile(length * 0.62, 2)
    for sign in _SIDES:
        knot = ((canvas.x - sign * 0.17) / 0.075) ** 2 + ((canvas.y + 0.10) / 0.16) ** 2
        total += 0.9 * np.exp(-knot)
    return np.minimum(total, 1.6)


def _expose(
    attenuation: NDArray[np.floating], canvas: Canvas, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Film of the beam that is left: scatter, noise, exposure, contrast, marker."""
    size = canvas.size
    scatter = blur(attenuation, 0.09 * size)
    beam = 0.90 * attenuation + 0.10 * scatter
    middle = random.uniform(0.56, 0.66)
    slope = random.uniform(3.6, 4.6)
    film = sigmoid((beam - middle) * slope)
    low, high = sigmoid(np.array([-middle, 1.18 - middle]) * slope)
    film = (film - low) / (high - low)
    grain = random.standard_normal((size, size), np.float32)
    film += blur(grain, 0.5) * (random.uniform(0.010, 0.024) * (0.5 + film))
    image: NDArray[np.uint8] = np.clip(film * 245 + 4, 0, 255).astype(np.uint8)
    _mark(image, random)
    return image


def _mark(image: NDArray[np.uint8], random: np.random.Generator) -> None:
    """A letter at the side, as radiographers lay it on the plate."""
    side = random.random()
    if side > 0.5:
        return
    size = len(image)
    letter, x = ("L", 0.90) if side < 0.25 else ("R", 0.05)
    place = (round(x * size), round(0.13 * size))
    thickness = max(1, round(size / 160))
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(image, letter, place, font, size / 380, 235, thickness, cv2.LINE_AA)
