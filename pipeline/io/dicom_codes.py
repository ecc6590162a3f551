"""Codes of structures for DICOM objects: name of a label → code and meaning of a terminology.

Names of FreeSurfer are known; a table gives the codes of a user's own labels.

References:
    DICOM PS3.16: CID 7140 Brain Structure for Volumetric Measurement, CID 7153 CNS Segmentation
    Type, CID 7150 Segmentation Property Category, CID 244 Laterality
    (https://dicom.nema.org/medical/dicom/current/output/chtml/part16/chapter_B.html); SCT is SNOMED
    CT, DCM is the terminology of DICOM itself.
    Verhoeff: Error detecting decimal codes. Mathematical Centre Tract 29, Amsterdam 1969: the last
    digit of a SNOMED CT identifier checks the others.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from operator import itemgetter
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.io.formats import printable
from pipeline.io.label_table import FULL_WORDS
from pipeline.io.tables import read_csv

LATERALITY = {"left": ("SCT", "7771000", "Left"), "right": ("SCT", "24028007", "Right")}
CATEGORIES = {
    "AnatomicalStructure": ("SCT", "91723000", "Anatomical Structure"),
    "BodySubstance": ("SCT", "91720002", "Body Substance"),
    "Function": ("SCT", "246464006", "Function"),
    "MorphologicallyAbnormalStructure": ("SCT", "49755003", "Morphologically Abnormal Structure"),
    "PhysicalObject": ("SCT", "260787004", "Physical object"),
    "SpatialAndRelationalConcept": ("SCT", "309825002", "Spatial and Relational Concept"),
    "Substance": ("SCT", "105590001", "Substance"),
    "Tissue": ("SCT", "85756007", "Tissue"),
}
DEFAULT_CATEGORY = "AnatomicalStructure"
REQUIRED_COLUMNS = ("structure", "scheme", "code", "meaning")
# a private scheme begins with 99 (PS3.16, chapter 8.2)
PRIVATE_SCHEME = "99VOLSEG"
SHORT_STRING, LONG_STRING = 16, 64  # characters of the types SH and LO
LENGTHS = {"scheme": SHORT_STRING, "code": SHORT_STRING, "meaning": LONG_STRING}
# Verhoeff's, applied to a digit once for each place to its right
PERMUTATION = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)

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


def structure_code(
    name: str, value: int, own: Mapping[str, StructureCode] | None = None
) -> StructureCode:
    """Return the code of a label, by its name.

    A name that is not known gets a code of a private scheme, with the name as its meaning.

    Args:
        name: of the label, as in a spec; `Left-Hippocampus` and `left hippocampus` are the same.
        value: of the label.
        own: name of a label → its code, from `read_structure_codes`; they come first.
    """
    if own and name in own:
        return own[name]
    key, side = _key_and_side(name)
    laterality = LATERALITY.get(side)
    known = _known_codes().get(key)
    if known is not None:
        return StructureCode(known.category, known.structure, laterality)
    private = (PRIVATE_SCHEME, f"LABEL-{value}"[:SHORT_STRING], name[:LONG_STRING])
    return StructureCode(CATEGORIES[DEFAULT_CATEGORY], private, laterality)


def read_structure_codes(path: Path, labels: Iterable[str]) -> dict[str, StructureCode]:
    """Return the codes of labels from a table.

    The CSV table has the columns structure, scheme, code and meaning, and may have category (by
    default AnatomicalStructure) and laterality (left or right; by default the side in the name of
    the label). A structure without a side is that of labels with any side.

    Args:
        path: the table, in UTF-8.
        labels: names of the labels.

    Returns:
        name of a label → its code, for labels that the table knows.

    Raises:
        ConfigError: the table cannot be read, or a row of it names no label, a label that another
            row names, or no possible code.
    """
    rows = _read_rows(path)
    names = list(labels)
    found: dict[str, StructureCode] = {}
    used: set[tuple[str, str]] = set()
    # rows with a side come last, so that they replace those for any side
    for number, row in sorted(rows, key=lambda item: bool(_key_and_side(item[1]["structure"])[1])):
        where = f"{printable(path)}, line {number}"
        code = _code_of_row(row, where)
        key, side = _key_and_side(row["structure"])
        meant = [name for name in names if _is_meant(name, key, side)]
        if not meant:
            raise ConfigError(
                f"{where}: {printable(row['structure'])} is no label of the model; expected one of "
                f"{', '.join(map(printable, names))}"
            )
        if (key, side) in used:
            raise ConfigError(f"{where}: {printable(row['structure'])} has two rows; keep one")
        used.add((key, side))
        for name in meant:
            sides = code.laterality or LATERALITY.get(_key_and_side(name)[1])
            found[name] = StructureCode(code.category, code.structure, sides)
    return found


def codes_hash(codes: Mapping[str, StructureCode]) -> str:
    """Return a hash of codes, hexadecimal; empty for no codes."""
    if not codes:
        return ""
    return hashlib.sha256(repr(sorted(codes.items(), key=itemgetter(0))).encode()).hexdigest()


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


def _is_meant(label: str, key: str, side: str) -> bool:
    """Return whether a row of a table, by its key and side, is about a label."""
    own_key, own_side = _key_and_side(label)
    return own_key == key and side in ("", own_side)


def _read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a table of codes, each with the number of its line.

    Raises:
        ConfigError: it cannot be read, or lacks a column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{printable(path)}: cannot be read as UTF-8 text: {error}") from error
    reader = csv.DictReader(text.splitlines())
    columns = [(name or "").strip() for name in reader.fieldnames or ()]
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise ConfigError(
            f"{printable(path)}: found the columns {', '.join(columns) or 'none'}, expected "
            f"{', '.join(REQUIRED_COLUMNS)}, and category and laterality if they are needed"
        )
    reader.fieldnames = columns
    rows = []
    for row in reader:
        cells = {name: (row.get(name) or "").strip() for name in columns}
        if any(cells.values()):
            rows.append((reader.line_num, cells))
    return rows


def _code_of_row(row: Mapping[str, str], where: str) -> StructureCode:
    """Return the code in a row of a table.

    Raises:
        ConfigError: it is none that a DICOM object may hold.
    """
    for name, longest in LENGTHS.items():
        if not 0 < len(row[name]) <= longest:
            raise ConfigError(
                f"{where}: {name} has {len(row[name])} characters, expected 1 to {longest}"
            )
    category = row.get("category") or DEFAULT_CATEGORY
    if category not in CATEGORIES:
        raise ConfigError(f"{where}: category {category}, expected one of {', '.join(CATEGORIES)}")
    side = row.get("laterality", "").lower()
    if side and side not in LATERALITY:
        raise ConfigError(f"{where}: laterality {side}, expected left, right or nothing")
    if row["scheme"] == "SCT" and not is_snomed_identifier(row["code"]):
        raise ConfigError(
            f"{where}: {row['code']} is no identifier of SNOMED CT: its last digit does not check "
            "the others; is there a typing error?"
        )
    code = (row["scheme"], row["code"], row["meaning"])
    return StructureCode(CATEGORIES[category], code, LATERALITY.get(side))


def is_snomed_identifier(code: str) -> bool:
    """Return whether a code has the form of a SNOMED CT identifier, by Verhoeff's check digit.

    >>> is_snomed_identifier("5366008"), is_snomed_identifier("5366009")
    (True, False)
    """
    if not re.fullmatch(r"[1-9][0-9]{5,17}", code):
        return False
    check = 0
    for place, digit in enumerate(map(int, reversed(code))):
        for _ in range(place % 8):
            digit = PERMUTATION[digit]
        check = _dihedral_product(check, digit)
    return check == 0


def _dihedral_product(first: int, second: int) -> int:
    """Return the product of two elements of the dihedral group of 10; from 5 on, reflections."""
    turn = second % 5 if first < 5 else -second % 5
    return (first + turn) % 5 + 5 * ((first < 5) != (second < 5))
