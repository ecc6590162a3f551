"""Volumes for the viewer: NIfTI files in text, small enough for a page."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np

from pipeline.io import LabelColor
from pipeline.report.shown_volume import ShownVolume, halved
from pipeline.types import Array

MAX_BYTES = 3_000_000  # of the volumes of one case as text
# numbers of grey values that are tried: fewer take less room, and 32 still show all borders
GREY_LEVELS = (256, 128, 64, 32)
COMPRESSION = 6  # of gzip


def viewer_volume(
    shown: ShownVolume, table: Sequence[LabelColor], *, max_bytes: int | None = MAX_BYTES
) -> dict[str, Any]:
    """Return a case as the viewer takes it.

    A volume that is too large gets fewer grey values, and then larger voxels.

    Args:
        shown: the case.
        table: names and colours of the labels; values that are not in it are not shown.
        max_bytes: of both volumes together, as text; None for no limit.

    Returns:
        `scan` and `labels` (base64 of .nii.gz; `labels` is empty where there are none), `table`
        (name and colour of each label, in the order of the values in `labels`, from 1), and
        `spacing` (mm).
    """
    drawn = sorted((label for label in table if label.value != 0), key=lambda label: label.value)
    while True:
        labels = _numbered(shown.labels, [label.value for label in drawn])
        label_text = _nifti_text(labels, shown) if labels.any() else ""
        for levels in GREY_LEVELS:
            scan = _nifti_text(_coarser(shown.grey, levels), shown)
            if max_bytes is None or len(scan) + len(label_text) <= max_bytes:
                return {
                    "scan": scan,
                    "labels": label_text,
                    "table": [[label.name, list(label.color)] for label in drawn],
                    "spacing": [round(mm, 4) for mm in shown.spacing],
                }
        shown = halved(shown)


def _numbered(labels: Array, values: Sequence[int]) -> Array:
    """Return a label map with 1, 2, … for these values in their order, and 0 for all others."""
    known = np.array(values, dtype=np.int64)
    kind = np.uint8 if known.size < 256 else np.uint16
    if not known.size:
        return np.zeros(labels.shape, dtype=kind)
    numbers = np.searchsorted(known, labels).clip(max=known.size - 1)
    return np.where(known[numbers] == labels, numbers + 1, 0).astype(kind)


def _coarser(grey: Array, levels: int) -> Array:
    step = 256 // levels
    coarser: Array = grey - grey % step
    return coarser


def _nifti_text(array: Array, shown: ShownVolume) -> str:
    image = nib.Nifti1Image(array, shown.affine)
    image.header.set_xyzt_units("mm")
    content = gzip.compress(image.to_bytes(), COMPRESSION, mtime=0)
    return base64.b64encode(content).decode("ascii")
