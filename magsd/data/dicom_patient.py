"""The patient that a DICOM file names, without the name."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from magsd.data.dicom import SUFFIXES, is_dicom
from magsd.data.images import IMAGE_SUFFIXES

#: Values of PatientID that name nobody, in lower case without what is neither letter nor digit.
_NOBODY = frozenset({
    *("", "anon", "anonym", "anonymous", "anonymized", "anonymised", "anonymousid"),
    *("deidentified", "deid", "removed", "redacted", "masked", "hidden", "deleted", "blank"),
    *("unknown", "unspecified", "undefined", "notavailable", "notapplicable", "notassigned"),
    *("none", "null", "nil", "na", "nan", "empty", "noid", "nopatientid", "missing", "default"),
    *("patient", "patientid", "id", "pid", "subject", "name", "noname", "test", "dummy"),
})  # fmt: skip
# A file without its preamble begins with an element of these groups.
_FIRST_GROUPS = (b"\x02\0", b"\x08\0")
_log = logging.getLogger(__name__)


def dicom_patient(path: Path) -> str | None:
    """A name for the patient of a DICOM file: equal for equal PatientID, and made by a hash.

    None where the file is no DICOM or cannot be read, where it names no patient or one such as
    "ANONYMOUS" or "0", and without pydicom. Never raises.

    The hash keeps numbers of a hospital out of files and messages. It is no protection against
    someone who tries all numbers.
    """
    try:
        import pydicom

        with path.open("rb") as file:
            head = file.read(132)
            if not is_dicom(head):
                named = path.suffix.lower() in SUFFIXES
                if not (named and head.startswith(_FIRST_GROUPS)):
                    return None
            file.seek(0)
            dataset = pydicom.dcmread(
                file, stop_before_pixels=True, specific_tags=["PatientID"], force=True
            )
            # As stored: a conversion may warn, and name the value.
            value = dataset.get_item("PatientID")
    except Exception:  # pydicom raises many kinds of its own; decoding will say what is wrong
        return None
    stored = None if value is None else value.value
    text = stored.decode("latin-1") if isinstance(stored, bytes) else str(stored or "")
    return _name(text.strip(" \0\t\r\n"))


def _name(patient: str) -> str | None:
    plain = re.sub(r"[\W_]", "", patient).lower()
    # Zeros, and what is painted over: 00000000, XXXX.
    if plain in _NOBODY or not plain.strip("0") or not plain.strip("x"):
        return None
    digest = hashlib.blake2b(patient.encode(), digest_size=8, person=b"magsd patient")
    return f"dicom-{digest.hexdigest()}"


def dicom_patients(files: Mapping[str, Path], origin: str) -> dict[str, str]:
    """Key -> patient, as `dicom_patient`, of those files that name one.

    A patient whom all of several files name tells none apart: then there is none. Warnings, which
    name `origin`, say so, and of how many files no patient is known. Files that are no DICOM by
    their suffix, or without a known one by their content, are passed over.
    """
    dicom = {key: path for key, path in files.items() if _is_dicom_file(path)}
    with ThreadPoolExecutor() as pool:
        names = pool.map(dicom_patient, dicom.values())
        found = {key: name for key, name in zip(dicom, names, strict=True) if name}
    lacking = len(dicom) - len(found)
    if len(found) > 1 and len(set(found.values())) == 1:
        _log.warning(
            "%s: %d DICOM files have the same PatientID, which tells no patients apart: each"
            " image is its own patient", origin, len(found),
        )  # fmt: skip
        return {}
    if lacking:
        _log.warning(
            "%s: %d of %d DICOM files have no PatientID: each of these is its own patient",
            origin, lacking, len(dicom),
        )  # fmt: skip
    return found


def _is_dicom_file(path: Path) -> bool:
    """Whether an image is DICOM by its suffix, or without a known one by its content."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return suffix in SUFFIXES
    try:
        with path.open("rb") as file:
            return is_dicom(file.read(132))
    except OSError:
        return False
