"""The patient that a DICOM file names."""

from __future__ import annotations

from pathlib import Path

import pytest

from magsd.data.dicom_patient import dicom_patient

pydicom = pytest.importorskip("pydicom")


def test_equal_for_equal_patients_and_not_the_number(tmp_path: Path, write_dicom) -> None:
    names = [
        dicom_patient(write_dicom(tmp_path / f"{i}.dcm", patient))
        for i, patient in enumerate(["MRN-4711", "MRN-4711 ", "MRN-4712"])
    ]
    assert names[0] == names[1] != names[2]
    assert all("MRN" not in str(name) and "4711" not in str(name) for name in names)
    assert all(len(str(name)) == 22 for name in names)


@pytest.mark.parametrize("name", ["IM0001", "1.2.840.113", "a.dcm", "b.ima"])
def test_any_name(tmp_path: Path, write_dicom, name: str) -> None:
    assert dicom_patient(write_dicom(tmp_path / name, "7"))


@pytest.mark.parametrize("name", ["a.dcm", "a.dicom", "a.dic"])
def test_without_preamble(tmp_path: Path, write_dicom, name: str) -> None:
    path = write_dicom(tmp_path / name, "7", preamble=False)
    assert path.read_bytes()[128:132] != b"DICM"
    assert dicom_patient(path) == dicom_patient(write_dicom(tmp_path / "whole", "7"))


@pytest.mark.parametrize(
    "patient",
    [None, "", "0", "000000", "ANONYMOUS", "Anonymized", "anon^", "UNKNOWN", "N/A", "XXXXXX",
     "De-Identified", "none", "-", "NoID", "[removed]", "patient_id"],
)  # fmt: skip
def test_nobody(tmp_path: Path, write_dicom, patient: str | None) -> None:
    assert dicom_patient(write_dicom(tmp_path / "a.dcm", patient)) is None


def test_what_is_no_dicom(tmp_path: Path) -> None:
    files = {
        "a.dcm": b"", "b.dcm": b"\x89PNG\r\n\x1a\n" + bytes(200), "c.png": b"\x08\0" + bytes(200),
        "d.dcm": bytes(128) + b"DICM" + b"\xff" * 40, "e.dcm": b"\x08\0\x05",
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert dicom_patient(tmp_path / name) is None, name
    assert dicom_patient(tmp_path / "gone.dcm") is None
    assert dicom_patient(tmp_path) is None


def test_pixels_are_not_read(tmp_path: Path, write_dicom) -> None:
    path = write_dicom(tmp_path / "a.dcm", "7")
    whole = dicom_patient(path)
    path.write_bytes(path.read_bytes()[:-40])
    assert dicom_patient(path) == whole
