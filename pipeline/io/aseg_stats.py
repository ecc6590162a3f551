"""Volumes as a file of statistics of FreeSurfer (`aseg.stats`), which many scripts read.

The layout is that of `mri_segstats` without an intensity volume: measures of the whole head as
comments, then one row per structure with the columns of `COLUMNS`. FreeSurfer's `asegstats2table`
splits rows at spaces and takes any line with a `#` for a comment.

Reference:
    FreeSurfer: mri_segstats.cpp; AsegStatsParser in fsutils.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.io.formats import printable

# column, what it holds, unit
COLUMNS = (
    ("Index", "Index", "NA"),
    ("SegId", "Segmentation Id", "NA"),
    ("NVoxels", "Number of Voxels", "unitless"),
    ("Volume_mm3", "Volume", "mm^3"),
    ("StructName", "Structure Name", "NA"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AsegRow:
    """One structure.

    Attributes:
        value: its value in the label map.
        name: without spaces and without `#`.
        voxels: number of voxels with the value.
        volume_mm3: its volume, mm³, which may count voxels in part.
    """

    value: int
    name: str
    voxels: int
    volume_mm3: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AsegMeasure:
    """A volume of several structures.

    Attributes:
        key: first name in the file, such as EstimatedTotalIntraCranialVol.
        short: second name, such as eTIV.
        words: what it is, without a comma.
        volume_mm3: the volume, mm³.
    """

    key: str
    short: str
    words: str
    volume_mm3: float


def aseg_stats_text(
    rows: Sequence[AsegRow],
    measures: Sequence[AsegMeasure],
    *,
    subject: str,
    label_map: str,
    voxel_mm3: float,
) -> str:
    """Return the content of an `aseg.stats`, rows sorted by value.

    Args:
        rows: the structures, without the background.
        measures: volumes of several structures.
        subject: name of the case.
        label_map: path of its label map.
        voxel_mm3: volume of a voxel, mm³.
    """
    lines = [
        "# Title Segmentation Statistics",
        "#",
        "# generating_program volseg",
        f"# subjectname {_one_line(subject)}",
        *(
            f"# Measure {item.key}, {item.short}, {item.words}, {item.volume_mm3:.6f}, mm^3"
            for item in measures
        ),
        f"# SegVolFile {_one_line(label_map)}",
        f"# VoxelVolume_mm3 {voxel_mm3:g}",
    ]
    for number, (header, field, unit) in enumerate(COLUMNS, 1):
        lines += [
            f"# TableCol {number:2d} ColHeader {header}",
            f"# TableCol {number:2d} FieldName {field}",
            f"# TableCol {number:2d} Units     {unit}",
        ]
    headers = " ".join(header for header, _, _ in COLUMNS)
    lines += [f"# NRows {len(rows)}", f"# NTableCols {len(COLUMNS)}", f"# ColHeaders  {headers}"]
    for number, row in enumerate(sorted(rows, key=lambda row: row.value), 1):
        volume = f"{row.volume_mm3:10.1f}"
        lines.append(f"{number:3d} {row.value:3d}  {row.voxels:8d} {volume}  {row.name:<30}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())
