"""Codes of structures for DICOM objects: FreeSurfer's name → code and meaning of a terminology.

References:
    DICOM PS3.16: CID 7140 Brain Structure for Volumetric Measurement, CID 7153 CNS Segmentation
    Type, CID 7150 Segmentation Property Category, CID 244 Laterality
    (https://dicom.nema.org/medical/dicom/current/output/chtml/part16/chapter_B.html); SCT is SNOMED
    CT, DCM is the terminology of DICOM itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from typing import Any

from pipeline.io.label_table import FULL_WORDS
from pipeline.io.tables import read_csv

LATERALITY = {"left": ("SCT", "7771000", "Left"), "right": ("SCT", "24028007", "Right")}
CATEGORIES = {
    "AnatomicalStructure": ("SCT", "91723000", "Anatomical Structure"),
    "BodySubstance": ("SCT", "91720002", "Body Substance"),
    "MorphologicallyAbnormalStructure": ("SCT", "49755003", "Morphologically Abnormal Structure"),
}
# a private scheme begins with 99 (PS3.16, chapter 8.2)
PRIVATE_SCHEME = "99VOLSEG"
SHORT_STRING, LONG_STRING = 16, 64  # characters of the types SH and LO

CodeTriple = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class StructureCode:
    """What a label is, in codes; each is scheme, value and meaning.

    Attributes:
        category: kind of thing.
        structure: which one.
        laterality: side of the body; None where there is none.
    """

    category: CodeTriple
    structure: CodeTriple
    laterality: CodeTriple | None = None

    @property
    def is_private(self) -> bool:
        """Whether the code means something to volseg only."""
        return self.structure[0] == PRIVATE_SCHEME


def structure_code(name: str, value: int) -> StructureCode:
    """Return the code of a label, by its name.

    A name that is not known gets a code of a private scheme, with the name as its meaning.

    Args:
        name: of the label, as in a spec; `Left-Hippocampus` and `left hippocampus` are the same.
        value: of the label.
    """
    key, side = _key_and_side(name)
    laterality = LATERALITY.get(side)
    known = _known_codes().get(key)
    if known is not None:
        return StructureCode(known.category, known.structure, laterality)
    own = (PRIVATE_SCHEME, f"LABEL-{value}"[:SHORT_STRING], name[:LONG_STRING])
    return StructureCode(CATEGORIES["AnatomicalStructure"], own, laterality)


def concept(code: CodeTriple) -> Any:
    """Return a code as highdicom takes it."""
    import highdicom as hd

    scheme, value, meaning = code
    return hd.sr.CodedConcept(value=value, scheme_designator=scheme, meaning=meaning)


@cache
def _known_codes() -> dict[str, StructureCode]:
    with as_file(files("pipeline.io") / "dicom_codes.csv") as path:
        rows = read_csv(path)
    return {
        _key_and_side(row["structure"])[0]: StructureCode(
            CATEGORIES[row["category"]], (row["scheme"], row["code"], row["meaning"])
        )
        for row in rows
    }


def _key_and_side(name: str) -> tuple[str, str]:
    """Return a name for comparison, without the side, and the side: `left`, `right` or none.

    >>> _key_and_side("Left-Inf-Lat-Vent") == _key_and_side("left inferior lateral ventricle")
    True
    """
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    sides = [word for word in words if word in LATERALITY]
    others = [FULL_WORDS.get(word, word) for word in words if word not in LATERALITY]
    return "".join(others), sides[0] if len(sides) == 1 else ""
