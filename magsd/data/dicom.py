"""DICOM images as uint8 arrays, as a viewer shows them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from magsd.data.jpeg import check_jpeg
from magsd.data.levels import Values, by_rows, sample_of, scaled, span_of
from magsd.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIXES = frozenset({".dcm", ".dicom", ".dic"})
_OTHERS = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
_log = logging.getLogger(__name__)

Levels = NDArray[np.uint8]
#: Gray values of stored ones, in 0..1.
Window = Callable[[Values], NDArray[np.floating]]
#: Which stored values are padding.
Padding = Callable[[Values], NDArray[np.bool_]]


def is_dicom(data: bytes) -> bool:
    """Whether the content of a file says that it is DICOM."""
    return data[128:132] == b"DICM"


def decode_dicom(data: bytes, name: str, notes: list[str] | None = None) -> Levels:
    """(H, W), or (H, W, 3) RGB, uint8, of a file's content; `name` is named in errors.

    notes: what was read and changed on the way is added to it, in words.

    Modality table or rescale, then the first VOI table or window that tells pixels apart, else the
    span between the percentiles 0.5 and 99.5; MONOCHROME1 is inverted, so that bone is bright.
    Padding counts in no percentile and becomes 0. Raises DataError for what is no DICOM image, has
    several frames, or needs a package that is not installed.
    """
    try:
        import pydicom
    except ImportError:
        raise DataError(
            f"{name}: reading DICOM needs pydicom (pip install 'magsd[dicom]')"
        ) from None
    if not is_dicom(data):
        for start, kind in _OTHERS.items():
            if data.startswith(start):
                raise DataError(f"{name}: named as DICOM, but its content is {kind}; rename it")
    try:
        dataset = pydicom.dcmread(BytesIO(data), force=not is_dicom(data))
        if "Rows" not in dataset:
            raise DataError(f"{name}: not a DICOM image")
        if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
            raise DataError(f"{name}: DICOM with several frames is not a radiograph")
        _complete_header(dataset)
        _check_frames(dataset, name)
        pixels = np.asarray(dataset.pixel_array)
        return _decode(dataset, pixels, name, [] if notes is None else notes)
    except DataError:
        raise
    except Exception as error:  # pydicom and its decoders raise many kinds of their own
        raise DataError(f"{name}: DICOM image cannot be read ({error})") from error


def _complete_header(dataset: Dataset) -> None:
    """A file without its meta header is encoded as it was read."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit = dataset.original_encoding[0]
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = syntax


def _check_frames(dataset: Dataset, name: str) -> None:
    """Raise DataError where a frame that is coded as JPEG is damaged."""
    from pydicom.encaps import generate_frames
    from pydicom.uid import JPEGBaseline8Bit

    if dataset.file_meta.TransferSyntaxUID == JPEGBaseline8Bit:
        for frame in generate_frames(dataset.PixelData, number_of_frames=1):
            check_jpeg(frame, name)


def _decode(dataset: Dataset, pixels: Values, name: str, notes: list[str]) -> Levels:
    from pydicom.pixels.processing import apply_color_lut

    kind = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    size = "x".join(map(str, pixels.shape[1::-1]))
    syntax = dataset.file_meta.TransferSyntaxUID.name
    notes.append(f"DICOM, {kind}, {syntax}, {size} pixels, {pixels.dtype}")
    if kind == "PALETTE COLOR":
        notes.append("palette applied")
        colors = np.asarray(apply_color_lut(pixels, dataset))
        return (colors >> 8).astype(np.uint8) if colors.dtype.itemsize > 1 else colors
    if not kind.startswith("MONOCHROME"):
        if pixels.ndim != 3:
            raise DataError(f"{name}: DICOM with {kind} pixels is not supported")
        if pixels.dtype == np.uint8:
            return pixels.astype(np.uint8, copy=False)
        low, high = span_of(sample_of(pixels))
        notes.append(f"levels {low:g} to {high:g} (percentiles 0.5 and 99.5) become 0 to 255")
        return scaled(pixels, (low, high))
    if kind == "MONOCHROME2" and dataset.get("PresentationLUTShape") == "INVERSE":
        _log.warning(
            "%s: MONOCHROME2 with PresentationLUTShape INVERSE is read without inversion", name
        )
    padding, sample = _padding(dataset, pixels.dtype), sample_of(pixels)
    if padding is not None:
        kept = sample[~padding(sample)]
        # An image of nothing else shows it.
        sample, padding = (kept, padding) if kept.size else (sample, None)
    if dataset.get("ModalityLUTSequence"):
        notes.append("modality table applied")
    elif dataset.get("RescaleSlope") is not None:
        intercept = dataset.get("RescaleIntercept", 0)
        notes.append(f"rescaled: slope {dataset.RescaleSlope}, intercept {intercept}")
    if padding is not None:
        notes.append("padding becomes 0")
    window = _window(dataset, sample, notes)
    if window is None:
        _log.warning("%s: all pixels are equal", name)
        notes.append("all pixels are equal")
        return np.zeros(pixels.shape, np.uint8)
    if kind == "MONOCHROME1":
        notes.append("MONOCHROME1: inverted, so that bone is bright")

    def levels(block: Values) -> NDArray[np.floating]:
        gray = np.nan_to_num(np.clip(window(block), 0, 1))
        if kind == "MONOCHROME1":
            gray = 1 - gray
        return gray if padding is None else np.where(padding(block), 0, gray)

    return by_rows(pixels, levels)


def _padding(dataset: Dataset, dtype: np.dtype[Any]) -> Padding | None:
    """What tells padding apart, if the file says that it has any."""
    value = dataset.get("PixelPaddingValue")
    if value is None or value == "" or dtype.kind not in "iu":
        return None
    # The element may have been read with the other sign.
    ends = [value, dataset.get("PixelPaddingRangeLimit", value)]
    low, high = sorted(int(np.array(int(end)).astype(dtype)) for end in ends)
    return lambda pixels: (pixels >= low) & (pixels <= high)


def _window(dataset: Dataset, sample: Values, notes: list[str]) -> Window | None:
    """The first that tells the sample's pixels apart; None where they are all equal."""
    if sample.min() == sample.max():
        return None
    for what, window in _windows(dataset, sample):
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                shown = np.clip(window(sample), 0, 1)
        except (ValueError, NotImplementedError, IndexError):  # pydicom's, of what is not valid
            continue
        if np.nanmax(shown) > np.nanmin(shown):
            notes.append(what)
            return window
    return None


def _windows(dataset: Dataset, sample: Values) -> Iterator[tuple[str, Window]]:
    """VOI tables, then windows, as the file lists them, then the percentiles; each in words."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi, apply_windowing

    def modality(pixels: Values) -> Values:
        return np.asarray(apply_modality_lut(pixels, dataset))

    def by_table(index: int) -> Window:
        def window(pixels: Values) -> NDArray[np.floating]:
            shown = np.asarray(apply_voi(modality(pixels), dataset, index), np.float32)
            # Tables often hold fewer bits than they say.
            return shown / max(_largest(dataset.VOILUTSequence[index]), 1)

        return window

    def by_window(index: int) -> Window:
        def window(pixels: Values) -> NDArray[np.floating]:
            # What lies far outside shows the range of the results, whatever the function is.
            with np.errstate(over="ignore"):
                ends = np.asarray(apply_windowing(np.array([-1e30, 1e30]), dataset, index))
            shown = np.asarray(apply_windowing(modality(pixels), dataset, index))
            share: NDArray[np.floating] = (shown - ends[0]) / (ends[1] - ends[0])
            return share

        return window

    for index in range(len(dataset.get("VOILUTSequence") or ())):
        yield f"VOI LUT {index + 1}", by_table(index)
    if all(dataset.get(name) not in (None, "") for name in ("WindowCenter", "WindowWidth")):
        centers, widths = np.atleast_1d(dataset.WindowCenter), np.atleast_1d(dataset.WindowWidth)
        function = dataset.get("VOILUTFunction") or "LINEAR"
        for index, (center, width) in enumerate(zip(centers, widths, strict=False)):
            what = f"window {index + 1} of {len(centers)}: center {center}, width {width}"
            yield f"{what}, {function}", by_window(index)
    low, high = span_of(modality(sample))
    if low < high:
        what = f"levels {low:g} to {high:g} (percentiles 0.5 and 99.5) become 0 to 255"
        yield what, lambda pixels: (modality(pixels).astype(np.float32) - low) / (high - low)


def _largest(table: Dataset) -> int:
    """The largest entry of a table."""
    data = table.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if table.LUTDescriptor[2] > 8 else np.uint8)
    return int(np.max(data))
