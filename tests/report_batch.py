"""Output folders with scans and label maps, made without a network, for tests of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from batch_folders import record_of
from phantom import oblique, reorient, save

from pipeline.batch.outputs import OutputFolder
from pipeline.batch.records import CaseRecord, state_of, states_of_inputs, write_record
from pipeline.report.payload import CALL, END
from pipeline.types import Affine, Array

SHAPE, SPACING = (58, 66, 40), (1.5, 1.3, 2.2)
# FreeSurfer's names and values; left and right are not one structure, which would share a colour
LABELS = {
    "background": 0,
    "left thalamus": 10,
    "right putamen": 51,
    "brain-stem": 16,
    "left caudate": 11,
}
LEFT, RIGHT, BELOW, FRONT = 10, 51, 16, 11
RADIUS_MM = 9.0
# places of the balls relative to the middle of the volume, mm along R, A, S
CENTRES = {LEFT: (-20, 0, 0), RIGHT: (20, 0, 0), BELOW: (0, 0, -22), FRONT: (0, 24, 0)}


def head(
    affine: Affine | None = None, shape: tuple[int, int, int] = SHAPE, *, seed: int = 0
) -> tuple[Any, Any]:
    """Return a scan and a label map of four balls: left, right, below and in front.

    The scan is bright in the balls; around them it falls off towards the edge.
    """
    affine = oblique(SPACING) if affine is None else affine
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    middle = (np.array(shape) - 1) / 2
    # along the axes of the voxels, which are closest to R, A and S
    mm = (indices - middle) * np.linalg.norm(affine[:3, :3], axis=0)
    scan = 300 - 2.0 * np.linalg.norm(mm, axis=-1)
    labels = np.zeros(shape, dtype=np.uint8)
    for value, centre in CENTRES.items():
        ball = np.linalg.norm(mm - centre, axis=-1) <= RADIUS_MM
        labels[ball] = value
        scan[ball] += 100
    scan += np.random.default_rng(seed).normal(size=shape)
    return nib.Nifti1Image(scan.astype(np.float32), affine), nib.Nifti1Image(labels, affine)


def add_case(folder: Path, name: str = "sub/one", axcodes: str = "RAS", **changes: Any) -> Path:
    """Write scan, label map and record of a case, and return the scan's path."""
    out = OutputFolder.create(folder)
    if not out.labels.exists():
        out.labels.write_text(json.dumps(LABELS))
    number = len(list(out.records.glob("*/*")))
    scan_image, label_image = (reorient(image, axcodes) for image in head(seed=number))
    scan = save(folder.parent / "scans" / f"{number}.nii.gz", scan_image)
    labels = save(folder / f"{name}_seg.nii.gz", label_image)
    write_record(out, case_record(folder, name, scan, labels, **changes))
    return scan


def case_record(folder: Path, name: str, scan: Path, labels: Path, **changes: Any) -> CaseRecord:
    """Return the record of a case whose files are there."""
    values: dict[str, Any] = {
        "image": (str(scan),),
        "inputs": states_of_inputs([scan]),
        "outputs": (state_of(labels, str(labels.relative_to(folder))),),
        "volumes_mm3": {"left thalamus": 3000.0, "right putamen": 3100.0, "both": 6100.0},
    }
    return record_of(name, **(values | changes))


def voxels_of(image: Any) -> Array:
    """Return the voxels of an image."""
    array: Array = np.asarray(image.dataobj)
    return array


def read_payload(path: Path) -> Any:
    """Return the data in a script file of a report; nothing else may be in it."""
    text = path.read_text(encoding="ascii")
    assert text.startswith(CALL)
    assert text.endswith(END)
    return json.loads(text[len(CALL) : -len(END)])[1]
