"""Names, values and colours of labels as the files that other programs read.

| file | read by | opacity |
|---|---|---|
| BIDS `dseg.tsv` | BIDS tools, pandas, R | none |
| ITK-SNAP label descriptions | ITK-SNAP, MRIcroGL | 0 to 1 |
| Slicer colour table (`.ctbl`) | 3D Slicer | 0 to 255 |
| FreeSurfer lookup table | FreeView, FreeSurfer | transparency, 0 to 255 |
| Caret `LabelTable` in a NIfTI file | Connectome Workbench | 0 to 1 |

References:
    BIDS: Common image-derived labels, in "Imaging data types" of BIDS Derivatives
    Connectome Workbench: CaretVolumeExtension.cxx, GiftiLabelTableSaxReader.cxx
    ITK-SNAP: ColorLabelTable.cxx
    FreeSurfer: CTABreadASCII in colortab.cpp
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.io.label_table import LabelColor, label_table
from pipeline.io.writer import write_atomically

LABELS_TSV, ITKSNAP_LABELS = "labels.tsv", "labels_itksnap.txt"
SLICER_COLORS, FREESURFER_COLORS = "labels.ctbl", "labels_freesurfer.txt"
LABEL_FILES = (LABELS_TSV, ITKSNAP_LABELS, SLICER_COLORS, FREESURFER_COLORS)
DSEG_COLUMNS = ("index", "name", "abbreviation", "color", "mapping")
NOT_AVAILABLE = "n/a"  # an empty cell of a BIDS table
# ITK-SNAP keeps labels in 16 bits; Slicer and FreeSurfer make an array up to the largest value
MAX_LISTED = 2**16 - 1
MAX_CARET = 2**31 - 1  # Workbench's keys are signed
UNLABELLED = "???"  # the name by which Workbench knows voxels without a label
EXTENSION_UNIT, EXTENSION_HEAD = 16, 8  # bytes: sizes are multiples of 16, size and code take 8
# characters that XML 1.0 does not allow, not even escaped
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_label_files(
    folder: Path, labels: Mapping[str, int], *, staging: Path | None = None
) -> None:
    """Write the files of `LABEL_FILES`, each atomically; the same labels give the same bytes.

    Args:
        folder: where they are written.
        labels: name → value, as in a spec.
        staging: see `write_atomically`.

    Raises:
        WriteError: a file cannot be written.
    """
    table = label_table(labels)
    texts = {
        LABELS_TSV: dseg_text(table),
        ITKSNAP_LABELS: itksnap_text(table),
        SLICER_COLORS: slicer_text(table),
        FREESURFER_COLORS: freesurfer_text(table),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode(errors="replace"), staging=staging)


def dseg_text(table: Sequence[LabelColor]) -> str:
    """Return the content of a BIDS `dseg.tsv`: the labels with the columns of `DSEG_COLUMNS`."""
    rows = [DSEG_COLUMNS]
    for label in table:
        mapping = NOT_AVAILABLE if label.bids_value is None else str(label.bids_value)
        abbreviation = label.abbreviation or NOT_AVAILABLE
        rows.append(
            (str(label.value), _one_line(label.name), abbreviation, label.hex_color, mapping)
        )
    return _text("\t".join(row) for row in rows)


def itksnap_text(table: Sequence[LabelColor]) -> str:
    """Return the content of an ITK-SNAP label description file."""
    lines = [
        "################################################",
        "# ITK-SnAP Label Description File",  # MRIcroGL knows the file by this line
        "# File format:",
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
        "# Fields: index, red, green, blue (0 to 255), opacity (0 to 1), visible, mesh, name",
        "################################################",
    ]
    for label in _listed(table):
        red, green, blue, opacity = label.rgba
        shown = int(opacity > 0)
        name = _one_line(label.name).replace('"', "'") or str(label.value)
        color = f"{red:3d}  {green:3d}  {blue:3d}"
        lines.append(f'{label.value:5d}  {color}  {shown:7d}  {shown}  {shown}    "{name}"')
    return _text(lines)


def slicer_text(table: Sequence[LabelColor]) -> str:
    """Return the content of a colour table of 3D Slicer, which shows underscores as spaces."""
    listed = _listed(table)
    lines = [f"# Color table file {SLICER_COLORS}", f"# {len(listed)} values"]
    for label in listed:
        channels = " ".join(map(str, label.rgba))
        lines.append(f"{label.value} {_one_word(label.name, '_')} {channels}")
    return _text(lines)


def freesurfer_text(table: Sequence[LabelColor]) -> str:
    """Return the content of a lookup table of FreeSurfer; its last column is transparency."""
    lines = ["#No. Label Name:                            R   G   B   A"]
    for label in _listed(table):
        red, green, blue = label.color
        lines.append(
            f"{label.value:<5d} {structure_name(label):<36} {red:3d} {green:3d} {blue:3d}   0"
        )
    return _text(lines)


def structure_name(label: LabelColor) -> str:
    """Return a label's name in FreeSurfer's files: its own name there, else one without spaces."""
    return label.freesurfer_name or _one_word(label.name, "-")


def caret_xml(table: Sequence[LabelColor]) -> bytes:
    """Return names and colours of labels as the XML of a Caret extension of a NIfTI file.

    Its code is 30 (`NIFTI_ECODE_CARET`). It holds no date, so that the same labels give the same
    bytes, and it is padded by spaces to what an extension may have, because parsers of XML refuse
    the bytes of 0 that would follow otherwise. The background has Workbench's name for it, `???`.
    """
    parts = [
        '<?xml version="1.0" encoding="UTF-8"?>\n<CaretExtension>\n<VolumeInformation Index="0">\n'
        "<LabelTable>\n"
    ]
    parts += [_caret_label(label) for label in table if label.value <= MAX_CARET]
    parts.append(
        "</LabelTable>\n<VolumeType><![CDATA[Label]]></VolumeType>\n</VolumeInformation>\n"
        "</CaretExtension>\n"
    )
    content = "".join(parts).encode(errors="replace")
    return content + b" " * (-(len(content) + EXTENSION_HEAD) % EXTENSION_UNIT)


def _caret_label(label: LabelColor) -> str:
    red, green, blue, opacity = (f"{channel / 255:.6g}" for channel in label.rgba)
    name = NOT_XML.sub("?", label.name) if label.value else UNLABELLED
    name = name.replace("]]>", "]]]]><![CDATA[>")  # the end of the section, in two sections
    return (
        f'<Label Key="{label.value}" Red="{red}" Green="{green}" Blue="{blue}" Alpha="{opacity}">'
        f"<![CDATA[{name}]]></Label>\n"
    )


def _listed(table: Sequence[LabelColor]) -> list[LabelColor]:
    """Return the labels that a list of colours can hold, sorted by value."""
    listed = [label for label in table if label.value <= MAX_LISTED]
    return sorted(listed, key=lambda label: label.value)


def _one_line(name: str) -> str:
    return " ".join(name.split())


def _one_word(name: str, joint: str) -> str:
    """Return a name without spaces, and without `#`, by which comments begin."""
    return joint.join(name.replace("#", " ").split()) or "unnamed"


def _text(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"
