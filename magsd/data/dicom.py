"""DICOM images as uint8 arrays, as a viewer shows them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from magsd.data.formats import format_of
from magsd.data.jpeg import check_jpeg
from magsd.data.levels import Values, by_rows, described, sample_of, scaled, span_of
from magsd.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIXES = frozenset({".dcm", ".dicom", ".dic"})
_log = logging.getLogger(__name__)

Levels = NDArray[np.uint8]
#: What the file's table or rescale makes of stored values.
Modality = Callable[[Values], Values]
#: Gray values of those, in 0..1.
Window = Callable[[Values], NDArray[np.floating]]
#: Which stored values are padding.
Padding = Callable[[Values], NDArray[np.bool_]]


def is_dicom(data: bytes) -> bool:
    """Whether the content of a file says that it is DICOM."""
    return format_of(data) == "DICOM"


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
    # Its lines name no file, and hold tracebacks of errors that are raised as well. Its import sets
    # a level of its own.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    if (kind := format_of(data)) not in (None, "DICOM"):
        raise DataError(f"{name}: named as DICOM, but its content is {kind}; rename it")
    try:
        dataset = pydicom.dcmread(BytesIO(data), force=not is_dicom(data))
        if "Rows" not in dataset:
            cut = ", or truncated" if is_dicom(data) else ""
            raise DataError(f"{name}: not a DICOM image{cut}")
        if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
            raise DataError(f"{name}: DICOM with several frames is not a radiograph")
        _complete_header(dataset)
        _check_frames(dataset, name)
        stored = _stored_bits(dataset)
        pixels = np.asarray(dataset.pixel_array)
        notes = [] if notes is None else notes
        levels = _decode(dataset, pixels, stored, name, notes)
    except DataError:
        raise
    except Exception as error:  # pydicom and its decoders raise many kinds of their own
        raise DataError(f"{name}: DICOM image cannot be read ({error})") from error
    if levels.min() == levels.max():
        _log.warning("%s: all pixels are equal", name)
        notes.append("all pixels are equal")
    return levels


def _complete_header(dataset: Dataset) -> None:
    """A file without its meta header is encoded as it was read."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        syntax = ImplicitVRLittleEndian if implicit else explicit
        dataset.file_meta.TransferSyntaxUID = syntax


def _check_frames(dataset: Dataset, name: str) -> None:
    """Raise DataError where a frame that is coded as JPEG is damaged."""
    from pydicom.encaps import generate_frames
    from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit

    if dataset.file_meta.TransferSyntaxUID in (JPEGBaseline8Bit, JPEGExtended12Bit):
        for frame in generate_frames(dataset.PixelData, number_of_frames=1):
            check_jpeg(frame, name)


def _stored_bits(dataset: Dataset) -> tuple[int, int] | None:
    """Highest bit and number of bits of gray values that are decoded with all that surrounds them.

    Padding may be a value of all bits, and pydicom takes the lowest, wherever the highest is.
    """
    allocated, bits = dataset.get("BitsAllocated"), dataset.get("BitsStored")
    gray = str(dataset.get("PhotometricInterpretation", "")).startswith("MONOCHROME")
    compressed = dataset.file_meta.TransferSyntaxUID.is_compressed
    if not gray or compressed or allocated not in (8, 16, 32) or not bits or bits >= allocated:
        return None
    high = int(dataset.get("HighBit") or bits - 1)
    dataset.BitsStored, dataset.HighBit = allocated, allocated - 1
    return (high if bits - 1 <= high < allocated else bits - 1), bits


def _without_others(pixels: Values, stored: tuple[int, int], highest: int) -> Values:
    """Pixels of their stored bits alone; highest: the largest of all pixels."""
    high, bits = stored
    if highest < 1 << bits:  # they are the lowest, whatever the file says
        high = bits - 1
    size = 8 * pixels.dtype.itemsize
    kept: Values = np.left_shift(pixels, size - 1 - high) >> (size - bits)
    return kept


def _decode(
    dataset: Dataset,
    pixels: Values,
    stored: tuple[int, int] | None,
    name: str,
    notes: list[str],
) -> Levels:
    kind = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    size = "x".join(map(str, pixels.shape[1::-1]))
    syntax = dataset.file_meta.TransferSyntaxUID.name
    notes.append(f"DICOM, {kind}, {syntax}, {size} pixels, {pixels.dtype}")
    if kind == "PALETTE COLOR":
        notes.append("palette applied")
        return _palette(dataset, pixels)
    if not kind.startswith("MONOCHROME"):
        if pixels.ndim != 3:
            raise DataError(f"{name}: DICOM with {kind} pixels is not supported")
        if pixels.dtype == np.uint8:
            return pixels.astype(np.uint8, copy=False)
        span = span_of(sample_of(pixels))
        notes.append(described(span))
        return scaled(pixels, span)
    if kind == "MONOCHROME2" and dataset.get("PresentationLUTShape") == "INVERSE":
        _log.warning(
            "%s: MONOCHROME2 with PresentationLUTShape INVERSE is read without inversion", name
        )
    padding, sample = _padding(dataset, pixels.dtype), sample_of(pixels)
    if padding is not None:
        kept = sample[~padding(sample)]
        # An image of nothing else shows it.
        sample, padding = (kept, padding) if kept.size else (sample, None)
    highest = int(pixels.max()) if stored else 0

    def values(block: Values) -> Values:
        return _without_others(block, stored, highest) if stored else block

    modality = _modality(dataset, values(sample), name, notes)
    if padding is not None:
        notes.append("padding becomes 0")
    window = _window(dataset, modality(values(sample)), name, notes)
    if window is None:
        return np.zeros(pixels.shape, np.uint8)
    if kind == "MONOCHROME1":
        notes.append("MONOCHROME1: inverted, so that bone is bright")

    def levels(block: Values) -> NDArray[np.floating]:
        with np.errstate(over="ignore", invalid="ignore"):
            gray = np.nan_to_num(np.clip(window(modality(values(block))), 0, 1))
        if kind == "MONOCHROME1":
            gray = 1 - gray
        return gray if padding is None else np.where(padding(block), 0, gray)

    return by_rows(pixels, levels)


def _palette(dataset: Dataset, pixels: Values) -> Levels:
    from pydicom.pixels.processing import apply_color_lut

    start = "{}PaletteColorLookupTable{}"
    names = [start.format(color, "{}") for color in ("Red", "Green", "Blue")]
    if all(name.format("Data") in dataset for name in names):
        tables = [
            _table(dataset, dataset, pixels, name.format("Descriptor"), name.format("Data"))
            for name in names
        ]
        colors = np.dstack([table(pixels) for table, _ in tables])
    else:  # in segments
        colors = np.asarray(apply_color_lut(pixels, dataset))
    # Tables often hold fewer bits than they say.
    return (colors // 256 if colors.max() > 255 else colors).astype(np.uint8)


def _numbers(dataset: Dataset, name: str) -> list[float]:
    """The values of an element; NaN for what is no number, nothing where it is not there."""
    value = dataset.get(name)
    values = [value] if isinstance(value, (str, int, float)) else value or ()
    numbers = []
    for item in values:
        try:
            numbers.append(float(item))
        except (TypeError, ValueError):
            numbers.append(math.nan)
    return numbers


def _padding(dataset: Dataset, dtype: np.dtype[Any]) -> Padding | None:
    """What tells padding apart, if the file says that it has any."""
    value = _numbers(dataset, "PixelPaddingValue")[:1]
    ends = [end for end in (*value, *_numbers(dataset, "PixelPaddingRangeLimit")[:1]) if end == end]
    if not value or not ends or dtype.kind not in "iu":
        return None
    known = np.iinfo(dtype)
    # The element may have been read with the other sign.
    turn = {"i": -1 << 16, "u": 1 << 16}[dtype.kind]
    ends = [end if known.min <= end <= known.max else end + turn for end in ends]
    low, high = min(ends), max(ends)
    return lambda pixels: (pixels >= low) & (pixels <= high)


def _modality(dataset: Dataset, sample: Values, name: str, notes: list[str]) -> Modality:
    """What the modality's table or rescale makes of stored pixels."""
    if dataset.get("ModalityLUTSequence"):
        try:
            table, _ = _table(dataset, dataset.ModalityLUTSequence[0], sample)
        except ValueError as error:
            raise DataError(f"{name}: the modality table is not valid ({error})") from None
        notes.append("modality table applied")
        return table
    slope, intercept = (
        (_numbers(dataset, element) or [missing])[0]
        for element, missing in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise DataError(f"{name}: RescaleSlope or RescaleIntercept is no number")
    if slope == 0:
        _log.warning("%s: a RescaleSlope of 0 is ignored: it makes all pixels equal", name)
        slope = 1.0
    if (slope, intercept) == (1.0, 0.0):
        return lambda pixels: pixels
    notes.append(f"rescaled: slope {slope}, intercept {intercept}")
    return lambda pixels: pixels.astype(np.float64) * slope + intercept


def _table(
    dataset: Dataset,
    item: Dataset,
    sample: Values,
    described: str = "LUTDescriptor",
    held: str = "LUTData",
) -> tuple[Modality, float]:
    """The function that a table is, and its largest entry.

    sample: of its inputs. Raises ValueError where the table is none.
    """
    descriptor, data = _numbers(item, described), item.get(held)
    if len(descriptor) != 3 or data is None:
        raise ValueError("it has no entries")
    count, first, bits = map(int, descriptor)
    count = count % (1 << 16) or 1 << 16
    if isinstance(data, bytes):
        # Entries of 8 bits have a byte or two.
        narrow = bits <= 8 and len(data) < 2 * count
        order = "<" if dataset.original_encoding[1] else ">"
        entries = np.frombuffer(data[: len(data) // 2 * 2], np.uint8 if narrow else f"{order}u2")
    else:
        entries = np.atleast_1d(np.asarray(data, np.int64)) % (1 << 16)
    if len(entries) < count:
        raise ValueError(f"it holds {len(entries)} of {count} entries")
    if first >= 1 << 15 and np.nanmin(sample) < 0:
        first -= 1 << 16  # it was read without its sign
    levels: Values = entries[:count].astype(np.float32)

    def look_up(pixels: Values) -> Values:
        places = np.nan_to_num(pixels.astype(np.float64)) - first
        found: Values = levels[np.rint(places.clip(0, count - 1)).astype(np.int64)]
        return found

    return look_up, float(levels.max())


def _window(dataset: Dataset, sample: Values, name: str, notes: list[str]) -> Window | None:
    """The first that tells the sample's pixels apart; None where they are all equal."""
    low, high = span_of(sample)
    if not low < high:
        return None
    for what, window in _windows(dataset, sample, name):
        with np.errstate(over="ignore", invalid="ignore"):
            shown = np.clip(window(sample), 0, 1)
        if np.nanmax(shown) > np.nanmin(shown):
            notes.append(what)
            return window
    notes.append(described((low, high)))
    return lambda pixels: (pixels.astype(np.float32) - low) / (high - low)


def _windows(dataset: Dataset, sample: Values, name: str) -> Iterator[tuple[str, Window]]:
    """VOI tables, then windows, as the file lists them; each in words."""
    for index, item in enumerate(dataset.get("VOILUTSequence") or ()):
        try:
            table, largest = _table(dataset, item, sample)
        except ValueError as error:
            _log.warning("%s: VOI LUT %d is not valid (%s)", name, index + 1, error)
        else:
            # Tables often hold fewer bits than they say.
            yield f"VOI LUT {index + 1}", partial(_share, table, max(largest, 1))
    function = str(dataset.get("VOILUTFunction") or "").strip().upper() or "LINEAR"
    centers, widths = _numbers(dataset, "WindowCenter"), _numbers(dataset, "WindowWidth")
    for index, (center, width) in enumerate(zip(centers, widths, strict=False)):
        window = _by_function(function, center, width)
        if window is not None:
            what = f"window {index + 1} of {len(centers)}: center {center}, width {width}"
            yield f"{what}, {function}", window


def _share(table: Modality, largest: float, pixels: Values) -> NDArray[np.floating]:
    return table(pixels).astype(np.float32) / largest


def _by_function(function: str, center: float, width: float) -> Window | None:
    """A window as PS3.3, C.11.2.1, defines it; None where it is not valid."""
    least = 1 if function == "LINEAR" else 5e-324
    if not (math.isfinite(center) and math.isfinite(width) and width >= least):
        return None
    if function == "SIGMOID":
        return lambda pixels: 1 / (1 + np.exp(-4 * (pixels.astype(np.float64) - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        return None
    if width == 0:
        return lambda pixels: (pixels > center).astype(np.float32)
    return lambda pixels: (pixels.astype(np.float64) - center) / width + 0.5
