"""Whether a JPEG holds a whole image: decoders fill what is damaged with gray, unasked."""

from __future__ import annotations

import functools
import logging
import re
from importlib.util import find_spec

from magsd.errors import DataError

_END, _SCAN, _PROGRESSIVE = 0xD9, 0xDA, 0xC2
_FRAMES = {0xC0, 0xC1, 0xC2}  # Huffman coded; the others are rare, and opencv refuses them
_COEFFICIENTS = 64
#: What libjpeg says of pixels that are lost; its other warnings are of headers.
_DAMAGE = re.compile(
    "corrupt|premature end|inconsistent progression|unsupported marker|file structure|bogus"
    "|invalid sos",
    re.IGNORECASE,
)
_FOUR_COLORS = "Unsupported color conversion"
_AFTER_PIXELS = re.compile(r"(\d+) extraneous bytes before marker 0xd9", re.IGNORECASE)
_log = logging.getLogger(__name__)


def check_jpeg(data: bytes, name: str) -> bytes:
    """The JPEG with its end marker.

    Raises DataError where it is cut off, lacks a scan, or holds pixels that are damaged.

    Bytes after the end are accepted; equal bytes between pixels and end, and an end marker alone
    that is missing, with a warning. Without simplejpeg no pixels are looked at.
    """
    end, lacks = _end(data)
    if lacks:
        raise DataError(f"{name}: truncated JPEG ({lacks})")
    endless = end == len(data)
    if find_spec("simplejpeg") is None:
        _warn_once()
        if endless:
            raise DataError(f"{name}: truncated JPEG (no end marker)")
        return data
    if endless:  # the decoder finds whether more is missing
        data += b"\xff\xd9"
    reason = _complaint(data, "GRAY")
    if _FOUR_COLORS in reason:
        reason = _complaint(data, "CMYK")
    if reason:
        after = _AFTER_PIXELS.search(reason)
        if after and len(set(data[max(0, end - int(after[1])) : end])) == 1:
            _log.warning("%s: %s", name, reason)
        elif _DAMAGE.search(reason):
            kind = "truncated" if endless else "damaged"
            raise DataError(f"{name}: {kind} JPEG ({reason})")
    if endless:
        _log.warning("%s: a JPEG without an end marker", name)
    return data


def _complaint(data: bytes, colors: str) -> str:
    """What libjpeg says of a JPEG while it decodes it; empty where that is nothing."""
    import simplejpeg

    try:
        # The smallest picture: every coded pixel is read all the same.
        simplejpeg.decode_jpeg(data, colors, min_height=1, min_width=1, min_factor=1)
    except ValueError as error:
        return str(error)
    return ""


@functools.cache
def _warn_once() -> None:
    _log.warning("simplejpeg is not installed: damage among the pixels of a JPEG is not found")


def _end(data: bytes) -> tuple[int, str]:
    """Where the end marker stands, and what is missing before it, in words.

    Source: ITU-T T.81, annex B.
    """
    frame = b""
    progressive = False
    # Component -> the lowest bit that was sent of each coefficient; 1 where nothing was.
    lowest: dict[int, list[int]] = {}
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        marker = data[at + 1]
        if marker == _END:
            break
        # Fill bytes, a 0xff of coded pixels, restarts, and a thumbnail's begin have no length.
        if marker in (0x00, 0x01, 0xD8) or 0xD0 <= marker <= 0xD7:
            at += 2
            continue
        if marker == 0xFF:
            at += 1
            continue
        content = data[at + 4 : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
        at += 4 + len(content)
        if marker in _FRAMES and not frame and len(content) > 8:
            frame, progressive = content, marker == _PROGRESSIVE
            lowest = {frame[k]: [1] * _COEFFICIENTS for k in range(6, len(frame) - 2, 3)}
        elif marker == _SCAN and frame and len(content) > 5:
            first, last, bits = content[-3:]
            for component in content[1 : len(content) - 3 : 2]:
                for k in range(first, min(last, _COEFFICIENTS - 1) + 1):
                    lowest.setdefault(component, [1] * _COEFFICIENTS)[k] = bits & 15
        elif marker in range(0xC3, 0xD0) and marker not in (0xC4, 0xC8, 0xCC):
            lowest = {0: [0] * _COEFFICIENTS}  # another coding: its scans are not known here
    else:
        at = len(data)
    sent = (bit for bits in lowest.values() for bit in (bits if progressive else bits[:1]))
    return at, "a scan is missing" if any(sent) or not lowest else ""
