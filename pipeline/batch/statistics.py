"""Statistics of volumes as people publish them, derived from the records of an output folder.

| kind | file | content |
|---|---|---|
| `ml` | `volumes_ml.csv` | the columns of `volumes.csv` in mL |
| `icv` | `volumes_icv.csv` | each volume as a fraction of the intracranial volume |
| `asymmetry` | `asymmetry.csv` | (left - right) / (left + right) of each pair of structures |
| `long` | `volumes_long.tsv` | one row per case and structure |
| `aseg` | `freesurfer/<case>/stats/aseg.stats` | one file per case in FreeSurfer's format |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batch.identity import read_labels
from pipeline.batch.outputs import STATE, OutputFolder
from pipeline.batch.records import CaseRecord, read_record, record_files
from pipeline.batch.tables import TableRows, further_columns
from pipeline.defaults import INTRACRANIAL, STATISTICS
from pipeline.errors import ConfigError, PipelineError, WriteError
from pipeline.inference import other_side, side_of
from pipeline.io import (
    LABEL_MAP_ENDINGS,
    AsegMeasure,
    AsegRow,
    aseg_stats_text,
    label_table,
    locked,
    printable,
    read,
    structure_name,
    write_atomically,
)
from pipeline.log import LOGGER

FILES = {
    "ml": "volumes_ml.csv",
    "icv": "volumes_icv.csv",
    "asymmetry": "asymmetry.csv",
    "long": "volumes_long.tsv",
    "aseg": "freesurfer",
}
ML = 1000.0  # mm³
# FreeSurfer's measures that are sums of its labels: names in the file, words, values
MEASURES = (
    ("lhCortex", "lhCortexVol", "Left hemisphere cortical gray matter volume", (3,)),
    ("rhCortex", "rhCortexVol", "Right hemisphere cortical gray matter volume", (42,)),
    ("Cortex", "CortexVol", "Total cortical gray matter volume", (3, 42)),
    (
        "lhCerebralWhiteMatter",
        "lhCerebralWhiteMatterVol",
        "Left hemisphere cerebral white matter volume",
        (2,),
    ),
    (
        "rhCerebralWhiteMatter",
        "rhCerebralWhiteMatterVol",
        "Right hemisphere cerebral white matter volume",
        (41,),
    ),
    (
        "CerebralWhiteMatter",
        "CerebralWhiteMatterVol",
        "Total cerebral white matter volume",
        (2, 41),
    ),
)
ETIV = ("EstimatedTotalIntraCranialVol", "eTIV", "Intracranial volume by segmentation")


def write_statistics(
    folder: Path, kinds: Sequence[str] = STATISTICS, *, icv: str = INTRACRANIAL
) -> list[Path]:
    """Write statistics of an output folder, from its records.

    Cases that were not done have no rows. A kind that has no content (no intracranial volume, no
    pair of structures, labels that are not known) is left out with a warning.

    Args:
        folder: an output folder.
        kinds: which ones.
        icv: name of the structure or sum that is the intracranial volume.

    Returns:
        the files, and the folder of `aseg`.

    Raises:
        ConfigError: the folder holds no records.
        WriteError: a file cannot be written.
    """
    out = OutputFolder(folder)
    if not (folder / STATE).is_dir():
        raise ConfigError(f"{folder}: no output folder of volseg: {STATE} is not there")
    writers: Mapping[str, Callable[[], str]] = {
        "ml": lambda: _write_table(out, "ml", _ml_row, "no case is done"),
        "icv": lambda: _write_table(
            out,
            "icv",
            lambda record: _icv_row(record, icv),
            f"no case has a volume {icv!r}; --icv takes a column of volumes.csv",
        ),
        "asymmetry": lambda: _write_table(
            out, "asymmetry", _asymmetry_row, "no structure has a left and a right side"
        ),
        "long": lambda: _write_long(out, icv),
        "aseg": lambda: _write_aseg(out, icv),
    }
    written = []
    try:
        with locked(out.tables_lock):
            for kind in dict.fromkeys(kinds):
                problem = writers[kind]()
                if problem:
                    LOGGER.warning("%s: no %s: %s", folder, FILES[kind], problem)
                else:
                    written.append(folder / FILES[kind])
    except OSError as error:
        raise WriteError(f"{folder}: the statistics cannot be written: {error.strerror}") from error
    return written


def asymmetry_index(left: float, right: float) -> float | None:
    """Return (left - right) / (left + right), -1 to 1, above 0 where left is larger.

    Returns:
        None where both are 0.
    """
    total = left + right
    return (left - right) / total if total else None


def _records(out: OutputFolder) -> Iterator[CaseRecord]:
    for path in record_files(out):
        record = read_record(path)
        if record is not None:
            yield record


def _write_table(
    out: OutputFolder, kind: str, row_of: Callable[[CaseRecord], dict[str, Any]], missing: str
) -> str:
    """Write a table with a row per case; return `missing` if no case has content for it."""
    rows, filled = TableRows(), False
    for record in _records(out):
        if record.status == "done":
            values = row_of(record)
            filled = filled or bool(values)
            row = {"case": printable(record.case), **values}
            rows.add(row | further_columns(record, row))
    if not filled:
        return missing
    rows.write(out.root / FILES[kind], out.staging)
    return ""


def _ml_row(record: CaseRecord) -> dict[str, Any]:
    return {name: f"{volume / ML:.6f}" for name, volume in record.volumes_mm3.items()}


def _icv_row(record: CaseRecord, icv: str) -> dict[str, Any]:
    total = record.volumes_mm3.get(icv)
    if total is None:
        return {}
    fractions = {
        name: f"{volume / total:.6g}" if total else ""
        for name, volume in record.volumes_mm3.items()
        if name != icv
    }
    return {f"{icv}_mm3": total, **fractions}


def _asymmetry_row(record: CaseRecord) -> dict[str, Any]:
    row = {}
    for name, volume in record.volumes_mm3.items():
        other = record.volumes_mm3.get(other_side(name))
        if side_of(name) == "left" and other is not None:
            index = asymmetry_index(volume, other)
            row[_without_side(name)] = "" if index is None else f"{index:.6f}"
    return row


def _without_side(name: str) -> str:
    """Return a name without its side.

    >>> _without_side("left lateral ventricle"), _without_side("Left-Hippocampus")
    ('lateral ventricle', 'Hippocampus')
    """
    before, _, after = name.partition(next(word for word in _words(name) if _is_side(word)))
    return f"{before.rstrip(' -_')} {after.lstrip(' -_')}".strip()


def _words(name: str) -> list[str]:
    return name.replace("-", " ").replace("_", " ").split()


def _is_side(word: str) -> bool:
    return side_of(word) != ""


def _write_long(out: OutputFolder, icv: str) -> str:
    labels, rows, filled = read_labels(out), TableRows(), False
    for record in _records(out):
        if record.status != "done":
            continue
        total = record.volumes_mm3.get(icv)
        for name, volume in record.volumes_mm3.items():
            filled = True
            row = {
                "case": printable(record.case),
                "structure": name,
                "label": labels.get(name, "NA"),
                "side": side_of(name) or "NA",
                "volume_mm3": volume,
                "icv_fraction": f"{volume / total:.6g}" if total else "NA",
            }
            rows.add(row | further_columns(record, row))
    if not filled:
        return "no case is done"
    rows.write(out.root / FILES["long"], out.staging, delimiter="\t")
    return ""


def _write_aseg(out: OutputFolder, icv: str) -> str:
    labels = read_labels(out)
    if not labels:
        return (
            "the values of the labels are not known, because an earlier version made the folder "
            "with a bundle that is not here; segment one more case into it"
        )
    written = False
    for record in _records(out):
        path = out.root / FILES["aseg"] / record.case / "stats" / "aseg.stats"
        if record.status != "done":
            path.unlink(missing_ok=True)  # of a case that was done before
            continue
        try:
            text = _aseg_text(out, record, labels, icv)
        except PipelineError as error:
            LOGGER.warning("%s: no aseg.stats: %s", printable(record.case), error)
            path.unlink(missing_ok=True)
            continue
        out_text = text.encode(errors="backslashreplace")
        write_atomically(path, out_text, staging=out.staging)
        written = True
    return "" if written else "no case has a label map"


def _aseg_text(out: OutputFolder, record: CaseRecord, labels: Mapping[str, int], icv: str) -> str:
    """Return the `aseg.stats` of a case.

    Raises:
        PipelineError: its label map is gone or cannot be read.
    """
    names = [state.path for state in record.outputs if state.path.endswith(LABEL_MAP_ENDINGS)]
    if not names:
        raise ConfigError("its record names no label map")
    label_map = read(out.root / names[0])
    counts = dict(zip(*np.unique(label_map.array, return_counts=True), strict=True))
    rows = [
        AsegRow(
            value=label.value,
            name=structure_name(label),
            voxels=int(counts.get(label.value, 0)),
            volume_mm3=record.volumes_mm3[label.name],
        )
        for label in label_table(labels)
        if label.value and label.name in record.volumes_mm3
    ]
    return aseg_stats_text(
        rows,
        _measures(record, labels, icv),
        subject=record.case,
        label_map=names[0],
        voxel_mm3=abs(float(np.linalg.det(label_map.affine[:3, :3]))),
    )


def _measures(record: CaseRecord, labels: Mapping[str, int], icv: str) -> list[AsegMeasure]:
    """Return FreeSurfer's measures that the volumes of a case give."""
    volume_of = {
        label.value: record.volumes_mm3[label.name]
        for label in label_table(labels)
        if label.freesurfer_name and label.name in record.volumes_mm3
    }
    measures = []
    for key, short, words, values in MEASURES:
        if volume_of.keys() >= set(values):
            volume = sum(volume_of[value] for value in values)
            measures.append(AsegMeasure(key=key, short=short, words=words, volume_mm3=volume))
    if icv in record.volumes_mm3:
        key, short, words = ETIV
        volume = record.volumes_mm3[icv]
        measures.append(AsegMeasure(key=key, short=short, words=words, volume_mm3=volume))
    return measures
