"""Pairs of images side by side, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from magsd.data.cache import prepare_image
from magsd.data.sources.base import Source
from magsd.errors import DataError
from magsd.evaluation.plots import one_line, save_figure, set_name

if TYPE_CHECKING:
    from magsd.audit.report import CopiedImage, CopyPair

_SIZE = 256
_COLUMNS = 2
_INCHES = 2.3


def draw_pairs(path: Path, source: Source, pairs: Sequence[CopyPair], most: int = 24) -> Path:
    """Write a PNG of the first `most` pairs: images, keys, labels, sides, patients, distance."""
    shown = pairs[:most]
    rows = -(-len(shown) // _COLUMNS)
    figure = Figure(figsize=(2 * _COLUMNS * _INCHES, rows * (_INCHES + 0.75)), layout="constrained")
    axes = figure.subplots(rows, 2 * _COLUMNS, squeeze=False).ravel()
    records = {record.key: record for record in source.records}
    for ax in axes:
        ax.axis("off")
    for number, pair in enumerate(shown):
        for ax, image in zip(axes[2 * number :], (pair.first, pair.second), strict=False):
            try:
                pixels = prepare_image(source.read_image(records[image.key]), _SIZE)
                ax.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            except DataError:  # it could be read a minute ago
                ax.text(0.5, 0.5, "cannot be read", ha="center", transform=ax.transAxes)
            ax.set_title(_caption(image), fontsize=6, loc="left")
        left = axes[2 * number]
        across = [w for w in ("sides", "classes", "patients") if getattr(pair, f"across_{w}")]
        text = f"{pair.kind}, distance {pair.distance:.3f}"
        text += f", other {', '.join(across)}" if across else ""
        left.text(0, -0.06, text, fontsize=7, transform=left.transAxes, va="top")
    return save_figure(figure, path)


def _caption(image: CopiedImage) -> str:
    lines = (
        one_line(image.key, 44),
        ", ".join(filter(None, (image.label, image.side))),
        f"patient {image.patient}",
    )
    return "\n".join(set_name(line, 44) for line in lines)
