"""Tables of public sets that `csv:` meets, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MANY = "it names several findings of an image, and an image here has one class: "
_ADD_LABEL = "add a column with one class for each image, and read the table with "


@dataclass(frozen=True)
class _Known:
    """A table, known by columns that it has.

    columns: plain names (see `_plain`), all of which are there. advice: what to say; {a} stands for
    the column of the plain name a as the table spells it. alone: the table has no other columns.
    """

    columns: tuple[str, ...]
    advice: str
    alone: bool = False


#: The first one that fits is taken.
_KNOWN = (
    # RSNA Pneumonia Detection: boxes, and the classes in detail.
    _Known(("patientid", "x", "y", "width", "height", "target"),
           "file={patientid},label={target},patient={patientid}"),
    _Known(("patientid", "class"), "file={patientid},label={class},patient={patientid}", True),
    _Known(("patientid", "target"), "file={patientid},label={target},patient={patientid}", True),
    # CheXpert; its paths name the patient.
    _Known(("path", "nofinding", "frontallateral"),
           f"{_MANY}{_ADD_LABEL}file={{path}},label=COLUMN"),
    # MIMIC-CXR, with the findings of CheXpert.
    _Known(("subjectid", "studyid", "nofinding"),
           f"{_MANY}{_ADD_LABEL}file=COLUMN,label=COLUMN,patient={{subjectid}}"),
    # NIH ChestX-ray14.
    _Known(("imageindex", "findinglabels", "patientid"),
           "some images have several findings, and an image here has one class: read the set with"
           " nih:DIR, which leaves them out, or, where each image has one, with"
           " file={imageindex},label={findinglabels},patient={patientid}"),
    # PadChest.
    _Known(("imageid", "imagedir", "patientid", "labels"),
           f"{_MANY}{_ADD_LABEL}file={{imageid}},label=COLUMN,patient={{patientid}}"),
    # VinDr-CXR: a row for each box of each reader, or a column for each finding.
    _Known(("imageid", "classname", "xmin"),
           f"it has a row for each box: {_ADD_LABEL}file={{imageid}},label=COLUMN"),
    _Known(("imageid", "radid"), f"{_MANY}{_ADD_LABEL}file={{imageid}},label=COLUMN"),
    _Known(("imageid", "nofinding"), f"{_MANY}{_ADD_LABEL}file={{imageid}},label=COLUMN"),
    # SIIM-ACR Pneumothorax and SIIM-FISABIO-RSNA COVID-19.
    _Known(("imageid", "encodedpixels"),
           f"its outlines are no classes: {_ADD_LABEL}file={{imageid}},label=COLUMN"),
    _Known(("id", "negativeforpneumonia"),
           f"it has a column for each class: {_ADD_LABEL}file={{id}},label=COLUMN"),
    # The COVID-19 image data collection.
    _Known(("patientid", "finding", "filename"),
           "read the set with cohen:DIR, or with"
           " file={filename},label={finding},patient={patientid}"),
    # CoronaHack.
    _Known(("xrayimagename", "label"), "file={xrayimagename},label={label}"),
    # ISIC 2020, HAM10000.
    _Known(("imagename", "patientid", "benignmalignant"),
           "file={imagename},label={benignmalignant},patient={patientid}"),
    _Known(("lesionid", "imageid", "dx"), "file={imageid},label={dx},patient={lesionid}"),
    # Diabetic retinopathy: APTOS, EyePACS.
    _Known(("idcode", "diagnosis"), "file={idcode},label={diagnosis}"),
    _Known(("image", "level"), "file={image},label={level}"),
)  # fmt: skip

#: What such columns are called elsewhere, the more telling names first.
_FILES = (
    *("file", "filename", "filepath", "imagepath", "imagefile", "imagefilename", "imagename"),
    *("path", "imageid", "imageindex", "imgpath", "imgname", "image", "img", "images", "dicomid"),
    *("sopinstanceuid", "name", "id"),
)
_LABELS = (
    *("label", "class", "classname", "category", "diagnosis", "target", "finding", "labels"),
    *("classes", "disease", "condition", "dx", "y"),
)
_PATIENTS = ("patientid", "patient", "subjectid", "subject", "personid", "caseid")


def mapping_hint(columns: Sequence[str]) -> str | None:
    """How `csv:` reads a table with these columns, as text that may follow in an error.

    Either options that follow the path, such as "file=patientId,label=Target,patient=patientId",
    or a sentence that says why the table has no class for each image and what is to be done. None
    where nothing in the header tells of images and classes, or the columns are named as expected.
    """
    names: dict[str, str] = {}
    for column in columns:
        names.setdefault(_plain(column), column.strip())
    for known in _KNOWN:
        fits = all(name in names for name in known.columns)
        if fits and not (known.alone and len(names) > len(known.columns)):
            return known.advice.format(**names)
    file, label, patient = (
        next((names[name] for name in words if name in names), None)
        for words in (_FILES, _LABELS, _PATIENTS)
    )
    if file is None or label is None or file == label:
        return None
    if (file.lower(), label.lower()) == ("file", "label"):
        return None
    return f"file={file},label={label}" + (f",patient={patient}" if patient else "")


def _plain(column: str) -> str:
    return "".join(filter(str.isalnum, column.lower()))
