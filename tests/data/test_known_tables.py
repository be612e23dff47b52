"""Headers of public tables, and how they are read."""

from __future__ import annotations

import re

import pytest

from magsd.data.sources.known_tables import _KNOWN, mapping_hint

CHEXPERT = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,"
    "Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,"
    "Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("patientId,x,y,width,height,Target", "file=patientId,label=Target,patient=patientId"),
        ("patientId,class", "file=patientId,label=class,patient=patientId"),
        (",X_ray_image_name,Label,Dataset_type", "file=X_ray_image_name,label=Label"),
        ("lesion_id,image_id,dx,dx_type,age,sex", "file=image_id,label=dx,patient=lesion_id"),
        ("image_name,patient_id,sex,benign_malignant,target",
         "file=image_name,label=benign_malignant,patient=patient_id"),
        ("id_code,diagnosis", "file=id_code,label=diagnosis"),
        ("image,level", "file=image,label=level"),
        ("Filename,Category", "file=Filename,label=Category"),
        ("image_path, diagnosis ,Subject ID", "file=image_path,label=diagnosis,patient=Subject ID"),
        ("filename,patient_id,class", "file=filename,label=class,patient=patient_id"),
        ("image_id,patient_id,labels", "file=image_id,label=labels,patient=patient_id"),
        ("file,class", "file=file,label=class"),
        ("patientid,x,y,width,height,target", "file=patientid,label=target,patient=patientid"),
    ],
)  # fmt: skip
def test_options(header: str, options: str) -> None:
    assert mapping_hint(header.split(",")) == options


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (CHEXPERT, "several findings .*one class.*file=Path,label="),
        ("subject_id,study_id,Atelectasis,No Finding", "several.*patient=subject_id"),
        ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age",
         "nih:DIR.*file=Image Index,label=Finding Labels,patient=Patient ID"),
        (",ImageID,ImageDir,StudyID,PatientID,Projection,Labels", "several.*patient=PatientID"),
        ("image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max", "a row for each box"),
        ("image_id,rad_ID,Aortic enlargement,No finding", "several findings.*file=image_id"),
        ("ImageId,EncodedPixels", "no classes.*file=ImageId"),
        ("id,Negative for Pneumonia,Typical Appearance", "a column for each class.*file=id"),
        ("patientid,offset,finding,view,folder,filename", "cohen:DIR.*label=finding"),
    ],
)  # fmt: skip
def test_sentences(header: str, said: str) -> None:
    hint = mapping_hint(header.split(","))
    assert hint is not None
    assert not hint.startswith("file=")
    assert re.search(said, hint)


@pytest.mark.parametrize("header", ["", "a,b", "file,label,patient", "File,Label", "age,label"])
def test_nothing_to_say(header: str) -> None:
    assert mapping_hint(header.split(",")) is None


def test_every_known_table_fills_its_advice() -> None:
    for known in _KNOWN:
        hint = mapping_hint([name.upper() for name in known.columns])
        assert hint is not None
        assert "{" not in hint
