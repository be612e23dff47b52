"""Heat maps over radiographs: single pictures and contact sheets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import cv2
import numpy as np
from contourpy import LineType, contour_generator
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from magsd.evaluation.localization import Box
from magsd.evaluation.plots import one_line, write_figure
from magsd.outputs import save_png

# Nonzero inside.
Mask = NDArray[np.bool_ | np.number]
# Perceptually uniform, and its dark end fades into a radiograph's.
COLORMAP = "inferno"
# Opacity of the hottest pixel; below it opacity falls with the heat, so that anatomy stays legible.
OPACITY = 0.7
OUTLINE = (90, 230, 215)
BOX = (255, 255, 255)
# Shorter side of a drawn picture in pixels: outlines of small inputs are smooth in print, too.
DRAW_SIZE = 672
# A strip is drawn smaller, so that its longer side has at most so many times `size` pixels, and a
# thin one wider than it is: lines need some pixels.
_LONGEST, _THINNEST = 4, 1 / 21
# The names that `save_items` gives its pictures.
_NUMBERED = re.compile(r"\d{3,}_[\w-]*\.png")


# Pictures of a contact sheet: Matplotlib draws at most 65536 pixels in a row or column.
_SHEET = 64


@dataclass(frozen=True)
class OverlayItem:
    """One picture of a contact sheet.

    image: (H, W) or (H, W, 3) uint8. saliency: (h, w), not negative. mask: (H, W), nonzero inside,
    or None. inside and uniform: shares of attention and of area inside the mask, where known.
    boxes: in pixels of the image.
    """

    image: NDArray[np.uint8]
    saliency: NDArray[np.floating]
    predicted: str
    probability: float
    label: str | None = None
    mask: Mask | None = None
    inside: float | None = None
    uniform: float | None = None
    name: str | None = None
    boxes: Sequence[Box] = ()

    def caption(self) -> str:
        """One or two lines: true and predicted class, share of attention inside the mask."""
        first = f"{one_line(self.predicted)} {self.probability:.0%}"
        if self.label is not None and self.label != self.predicted:
            first = f"{one_line(self.label)}, taken for {first}"
        if self.inside is None or not np.isfinite(self.inside):
            return first
        share = f"{self.inside:.0%} of attention in mask"
        if self.uniform is not None:
            share += f" ({self.uniform:.0%} of area)"
        return f"{first}\n{share}"


def overlay_image(
    image: NDArray[np.uint8],
    saliency: NDArray[np.floating],
    mask: Mask | None = None,
    *,
    boxes: Sequence[Box] = (),
    size: int = DRAW_SIZE,
) -> NDArray[np.uint8]:
    """Image with its heat map, the mask's outline and boxes, RGB uint8.

    image: (H, W) or (H, W, 3) uint8, resized as by `fitted`.
    saliency: (h, w), shown from its minimum (transparent) to its maximum; a constant map leaves the
    image as it is. mask: of any size, nonzero inside. boxes: in pixels of `image`.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"image: expected (H, W[, 3]) uint8, got {image.shape} {image.dtype}")
    base = fitted(image, size).astype(np.float32)
    heat = heat_map(saliency, base.shape[:2])
    colors = colormaps[COLORMAP](heat)[..., :3].astype(np.float32) * 255.0
    opacity = OPACITY * heat[..., None]
    picture = (base + opacity * (colors - base)).round().clip(0, 255).astype(np.uint8)
    if mask is not None:
        picture = with_outline(picture, mask)
    scales = picture.shape[1] / image.shape[1], picture.shape[0] / image.shape[0]
    return with_boxes(picture, [box.scaled(*scales) for box in boxes])


def heat_map(saliency: NDArray[np.floating], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Map (h, w) upsampled (align_corners=False) to `shape`; its minimum is 0, its maximum 1.

    Bicubic without undershoot, since the creases of a bilinear map look like findings. Zero where
    the map is constant or not finite.
    """
    if saliency.ndim != 2:
        raise ValueError(f"saliency: expected (h, w), got shape {saliency.shape}")
    low = np.ascontiguousarray(saliency, dtype=np.float32)
    bottom, top = float(low.min()), float(low.max())
    if not np.isfinite(top - bottom) or top - bottom <= 1e-6 * abs(top):
        return np.zeros(shape, dtype=np.float32)
    scaled = (low - bottom) / (top - bottom)
    resized = cv2.resize(scaled, shape[::-1], interpolation=cv2.INTER_CUBIC)
    heat: NDArray[np.float32] = resized.clip(0.0, None)
    heat /= heat.max()
    return heat


def with_outline(picture: NDArray[np.uint8], mask: Mask) -> NDArray[np.uint8]:
    """A copy of the picture (H, W, 3) with the outline of a mask of any size drawn on it."""
    height, width = picture.shape[:2]
    soft = (np.asarray(mask) > 0).astype(np.float32)
    smooth = cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR)
    # Blurring by most of a mask pixel takes its steps off; the half-way line moves by less.
    steps = max(height / soft.shape[0], width / soft.shape[1])
    smooth = cv2.GaussianBlur(smooth, (0, 0), sigmaX=max(0.8 * steps, 0.5))
    # A rim of zeros closes the outline where the mask reaches the picture's edge.
    separate = contour_generator(z=np.pad(smooth, 1), line_type=LineType.Separate)
    # Its type is that of all kinds of lines.
    lines = cast("list[NDArray[np.float64]]", separate.lines(0.5))
    bits = 4  # fixed-point fraction of the coordinates: the line runs between pixels
    points = [np.round((line - 1.0) * (1 << bits)).astype(np.int32) for line in lines]
    thickness = max(round(min(height, width) / 300), 1)
    drawn = picture.copy()
    # A dark line under the bright one keeps the outline visible on hot and on white ground.
    cv2.polylines(drawn, points, True, (0, 0, 0), 2 * thickness, cv2.LINE_AA, bits)
    cv2.polylines(drawn, points, True, OUTLINE, thickness, cv2.LINE_AA, bits)
    return drawn


def with_boxes(picture: NDArray[np.uint8], boxes: Sequence[Box]) -> NDArray[np.uint8]:
    """A copy of the picture (H, W, 3) with boxes, in its pixels, drawn on it."""
    height, width = picture.shape[:2]
    thickness = max(round(min(height, width) / 300), 1)
    drawn = picture.copy()
    for color, extra in (((0, 0, 0), thickness), (BOX, 0)):
        for box in boxes:
            # A box ends where its last pixel does; at the picture's edge the line stays inside.
            first = (max(round(box.x0), thickness), max(round(box.y0), thickness))
            last = (
                min(round(box.x1), width - 1 - thickness),
                min(round(box.y1), height - 1 - thickness),
            )
            cv2.rectangle(drawn, first, last, color, thickness + extra, cv2.LINE_AA)
    return drawn


def fitted(image: NDArray[np.uint8], size: int = DRAW_SIZE) -> NDArray[np.uint8]:
    """RGB version whose shorter side has `size` pixels; at most 4 `size` by `size` pixels in all.

    An image more than four times as long as wide gets 4 `size` pixels along its longer side, and at
    least 1/21 of `size` across. What is fitted already stays as it is.
    """
    short, long = sorted(image.shape[:2])
    factor = min(size / short, _LONGEST * size / long)
    least = max(round(_THINNEST * size), 1)
    height, width = (max(round(side * factor), least) for side in image.shape[:2])
    # A large image is made small first: it need not be in memory in three channels.
    if factor >= 1:
        image = _rgb(image)
    if (height, width) != image.shape[:2]:
        interpolation = cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA
        # Opencv keeps the dtype, here and below; its types do not say so.
        image = np.asarray(
            cv2.resize(image, (width, height), interpolation=interpolation), np.uint8
        )
    return _rgb(image)


def _rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if image.ndim == 3:
        return image
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_GRAY2RGB), np.uint8)


def save_overlay(path: str | Path, item: OverlayItem, *, size: int = DRAW_SIZE) -> Path:
    """Write one overlay as PNG and return its path; raises OSError where it cannot be written."""
    picture = overlay_image(item.image, item.saliency, item.mask, boxes=item.boxes, size=size)
    save_png(Path(path), picture)
    return Path(path)


def save_items(
    folder: str | Path, items: Sequence[OverlayItem], *, title: str | None = None
) -> Path:
    """Write one PNG an item, named by number and class, and `contact_sheet.png`; its path.

    Pictures that an earlier call left beside a contact sheet are removed.
    """
    folder = Path(folder)
    sheet = folder / "contact_sheet.png"
    if sheet.is_file():
        for path in folder.glob("*.png"):
            if _NUMBERED.fullmatch(path.name):
                path.unlink()
    for number, item in enumerate(items):
        # A file's name has 255 bytes at most, a character four.
        label = "".join(c if c.isalnum() or c in "-_" else "-" for c in (item.label or "")[:60])
        save_overlay(folder / f"{number:03d}_{label}.png", item)
    return contact_sheet(sheet, items, title=title)


def contact_sheet(
    path: str | Path,
    items: Sequence[OverlayItem],
    *,
    columns: int = 4,
    title: str | None = None,
    dpi: int = 160,
) -> Path:
    """Write a PNG with each radiograph above its overlay, with a caption, and return its path.

    Of more than 64 items the first 64 are shown.
    """
    if not items:
        raise ValueError("items: expected at least one")
    items = items[:_SHEET]
    columns = min(columns, len(items))
    rows = -(-len(items) // columns)
    # Lengths in inches, counted from the top left corner of the page.
    side, gap, caption, between, margin = 2.1, 0.04, 0.34, 0.16, 0.12
    top = 0.42 if title else 0.06
    width = max(columns * (side + gap) - gap + 2 * margin, 4.4)
    left = (width - columns * (side + gap) + gap) / 2
    height = top + rows * (caption + 2 * side + gap + between) + 0.26
    figure = Figure(figsize=(width, height), facecolor="white")
    for k, item in enumerate(items):
        x = left + (k % columns) * (side + gap)
        y = top + (k // columns) * (caption + 2 * side + gap + between) + caption
        color = "#202020" if item.label in (None, item.predicted) else "#b00020"
        text = item.caption()
        if "\n" not in text and len(text) > 50:
            text = text.replace(", taken for ", ",\ntaken for ")
        # At 7 points some 38 characters stand over a picture; long class names are set smaller.
        points = 7.0 * min(1.0, 38 / max(map(len, text.split("\n"))))
        _text(figure, x + side / 2, y - 0.05, text, points, "bottom", color=color)
        overlay = overlay_image(item.image, item.saliency, item.mask, boxes=item.boxes)
        for picture in (fitted(item.image), overlay):
            axes = figure.add_axes(_place(figure, x, y, side, side))
            axes.imshow(picture, interpolation="antialiased")
            axes.set_axis_off()
            y += side + gap
    if title:
        _text(figure, width / 2, 0.12, one_line(title, 80), 10.5, "top")
    marks = {"mask": OUTLINE} if any(item.mask is not None for item in items) else {}
    marks |= {"box": BOX} if any(item.boxes for item in items) else {}
    _legend(figure, marks)
    return write_figure(figure, path, dpi=dpi)


def _legend(figure: Figure, marks: Mapping[str, tuple[int, int, int]]) -> None:
    """Color scale of the attention, and what the lines' colors are, along the lower edge."""
    y, bar, each = figure.get_figheight() - 0.2, 1.1, 0.65
    x = figure.get_figwidth() / 2 - bar / 2 + each / 2 * len(marks)
    axes = figure.add_axes(_place(figure, x, y, bar, 0.1))
    axes.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=COLORMAP)
    axes.set_axis_off()
    _text(figure, x - 0.06, y + 0.05, "least attention", 7.0, "center", ha="right")
    _text(figure, x + bar + 0.06, y + 0.05, "most", 7.0, "center", ha="left")
    x -= 0.9 + each * len(marks)
    for name, color in marks.items():
        axes = figure.add_axes(_place(figure, x, y + 0.035, 0.22, 0.03))
        red, green, blue = (channel / 255 for channel in color)
        axes.set_facecolor((red, green, blue))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color="black", linewidth=0.6)
        _text(figure, x + 0.28, y + 0.05, name, 7.0, "center", ha="left")
        x += each


def _place(
    figure: Figure, x: float, y: float, width: float, height: float
) -> tuple[float, float, float, float]:
    """Axes rectangle from inches, y counted downwards."""
    w, h = figure.get_figwidth(), figure.get_figheight()
    return x / w, 1 - (y + height) / h, width / w, height / h


def _text(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    size: float,
    va: str,
    ha: str = "center",
    color: str = "#202020",
) -> None:
    w, h = figure.get_figwidth(), figure.get_figheight()
    figure.text(
        x / w,
        1 - y / h,
        text,
        fontsize=size,
        va=va,
        ha=ha,
        color=color,
        linespacing=1.25,
        parse_math=False,
    )
