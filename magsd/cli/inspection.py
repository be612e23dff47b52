"""The command `magsd inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from magsd.cli.common import make_console
from magsd.console import say
from magsd.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.text import Text

    from magsd.config import Config

_COLUMNS = 64


def inspect(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="PNG, JPEG, DICOM ...")],
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Prepare images as this run does; default: as training."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write each as PNG, as the network gets it.")
    ] = None,
) -> None:
    """What is read of image files, what is changed on the way, and what a network gets.

    Exit code 1 where a file cannot be read.
    """
    from magsd.config import load_config
    from magsd.data.cache import prepare_image
    from magsd.data.images import read_image_file
    from magsd.data.run_data import preprocessing_of
    from magsd.evaluation.predict import check_overlays, overlay_names
    from magsd.outputs import check_folder, disk_errors, save_png
    from magsd.training.run_folder import RunFolder

    config = RunFolder(run).load_config() if run is not None else load_config()
    names: list[Path] = []
    if out is not None:
        check_folder(out, "--out")
        names = overlay_names(images, out)
        check_overlays(names, images)
    console = make_console()

    refused = 0
    prepared = preprocessing_of(config)
    for number, path in enumerate(images):
        say(console, str(path))
        notes: list[str] = []
        try:
            image = read_image_file(path, notes)
        except DataError as error:
            say(console, f"  refused: {error}")
            refused += 1
            continue
        shown = prepare_image(image, prepared.image_size, config.model.in_channels, prepared.clahe)
        for note in [*notes, *_preparation(image, config)]:
            say(console, f"  {note}")
        if console.is_terminal:
            console.print(preview(shown))
        if out is not None:
            with disk_errors(out, "free some space and run the command again"):
                save_png(names[number], shown)
            say(console, f"  written: {names[number]}")
    if refused:
        raise typer.Exit(1)


def _preparation(image: NDArray[np.uint8], config: Config) -> list[str]:
    """What happens to a decoded image before it is given to the network, in words."""
    size = config.data.image_size
    steps = []
    if config.model.in_channels == 1 and image.ndim == 3:
        steps.append("color made gray")
    if image.min() == image.max():
        steps.append("all pixels are equal: nothing to see")
    steps.append(f"resized to {size}x{size}, whatever the proportions")
    if config.data.clahe:
        steps.append(
            f"CLAHE, clip limit {config.data.clahe_clip:g}, {config.data.clahe_tiles} tiles a side"
        )
    return [*steps, "mean 0 and standard deviation 1, by the image's own pixels"]


def preview(image: NDArray[np.uint8]) -> Text:
    """A small picture for the terminal, of two pixels a character."""
    import cv2
    from rich.text import Text

    small = cv2.resize(image, (_COLUMNS, _COLUMNS), interpolation=cv2.INTER_AREA)
    if small.ndim == 2:
        small = cv2.cvtColor(small, cv2.COLOR_GRAY2RGB)
    text = Text()
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        for top, bottom in zip(upper, lower, strict=True):
            text.append("\u2580", style=f"rgb({_rgb(top)}) on rgb({_rgb(bottom)})")
        text.append("\n")
    return text


def _rgb(pixel: NDArray[np.uint8]) -> str:
    return ",".join(str(int(value)) for value in pixel)
