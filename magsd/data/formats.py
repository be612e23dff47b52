"""What an image file is, by its first bytes."""

from __future__ import annotations

_STARTS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}


def format_of(head: bytes) -> str | None:
    """PNG, JPEG, GIF, TIFF, WebP, BMP or DICOM; None for anything else.

    head: the first 132 bytes of a file, or more.
    """
    if head[128:132] == b"DICM":
        return "DICOM"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    # Two letters are too few: four bytes that are always zero follow the size.
    if head.startswith(b"BM") and len(head) > 26 and head[6:10] == bytes(4):
        return "BMP"
    return next((name for start, name in _STARTS.items() if head.startswith(start)), None)
