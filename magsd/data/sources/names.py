"""Patients in the names of files and folders."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

#: The patient in the names of the radiographs of children (Kermany et al., 2018).
PATIENT_IN_NAME = re.compile(r"(person\d+)_|((?:NORMAL2-)?IM-\d+)-")

_LONG, _SHORT = "person|patients?|subjects?", "pat|pt|pid|subj|sub|case|mrn"
# "patient00012", "sub-S03047", "Patient ID 7": a letter may precede the number after a separator.
_NUMBER = r"(?:[ _-]?(?:id|no|nr))?[ _.-]?(?:(?<=[ _.-])[a-z])?\d+"
_IN_FILE = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"((?:{_LONG}){_NUMBER})",
        rf"(?<![a-z0-9])((?:{_SHORT}){_NUMBER})",
        r"^(p\d+)(?![a-z0-9])",
        r"^((?:[a-z]+\d?-)?IM-\d+)-",  # IM-0115-0001, NORMAL2-IM-0115-0001
        r"^midrc-ricord-\w+-(\w+-\d+)-",
        r"^([a-z]+-\d{4,})-\d+$",  # VIRUS-1003233-0001
        # NIH's 00000013_005, but no date.
        r"^(?!(?:19|20)\d\d(?:0\d|1[0-2])[0-3]\d[_-])(\d{4,})[_-]\d{1,4}(?!\d)",
    )
]
_FOLDER = re.compile(
    rf"(?:{_LONG}|{_SHORT}){_NUMBER}|p\d+|(?!(?:19|20)\d\d$)\d{{3,}}", re.IGNORECASE
)


def patient_in_path(path: str) -> str | None:
    """The patient that a path within its class seems to name, as in "patient00012/view1.png".

    That of the first folder which names one, else of the file's name; None where none does.
    """
    *folders, _ = PurePosixPath(path).parts
    found = next((name for name in folders if _FOLDER.fullmatch(name)), None)
    return found or patient_in_name(PurePosixPath(path).stem)


def patient_in_name(stem: str) -> str | None:
    """The patient that a file's name seems to name, as in person12_bacteria_3 and 00000013_005."""
    matches = (pattern.search(stem) for pattern in _IN_FILE)
    return next((match[1] for match in matches if match), None)
