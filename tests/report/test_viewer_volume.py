"""Volumes for the viewer: what a page gets is the case, and small."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from phantom import save
from report_batch import LABELS, LEFT, RIGHT, head

from pipeline.io import label_table
from pipeline.report.shown_volume import ShownVolume, shown_volume
from pipeline.report.viewer_volume import MAX_BYTES, viewer_volume

TABLE = label_table(LABELS)


@pytest.fixture
def shown(tmp_path: Path) -> ShownVolume:
    scan, labels = head()
    return shown_volume(
        save(tmp_path / "scan.nii.gz", scan), save(tmp_path / "labels.nii.gz", labels)
    )


def decoded(text: str) -> Any:
    """The NIfTI image in a text, read by nibabel."""
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def test_scan_and_labels_come_back(shown: ShownVolume) -> None:
    content = viewer_volume(shown, TABLE)
    scan, labels = decoded(content["scan"]), decoded(content["labels"])
    np.testing.assert_allclose(scan.affine, shown.affine, atol=1e-4)
    np.testing.assert_allclose(labels.affine, shown.affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(scan.dataobj), shown.grey)
    names = [name for name, _ in content["table"]]
    for name, value in LABELS.items():
        if value:
            number = names.index(name) + 1
            np.testing.assert_array_equal(
                np.asarray(labels.dataobj) == number, shown.labels == value
            )


def test_the_colours_are_those_of_the_table(shown: ShownVolume) -> None:
    content = viewer_volume(shown, TABLE)
    colors = {label.name: list(label.color) for label in TABLE if label.value}
    assert dict(content["table"]) == colors
    assert colors["left thalamus"] == [0, 118, 14]  # FreeSurfer's


def test_a_volume_that_is_too_large_gets_fewer_values_then_larger_voxels(
    shown: ShownVolume,
) -> None:
    full = viewer_volume(shown, TABLE)
    size = len(full["scan"]) + len(full["labels"])
    fewer = viewer_volume(shown, TABLE, max_bytes=int(0.8 * size))
    assert len(fewer["scan"]) + len(fewer["labels"]) <= 0.8 * size
    assert fewer["spacing"] == full["spacing"]
    assert len(np.unique(np.asarray(decoded(fewer["scan"]).dataobj))) <= 128
    coarse = viewer_volume(shown, TABLE, max_bytes=int(0.2 * size))
    assert len(coarse["scan"]) + len(coarse["labels"]) <= 0.2 * size
    assert coarse["spacing"][0] == pytest.approx(2 * full["spacing"][0])


@pytest.mark.slow
def test_a_head_of_256_voxels_is_small() -> None:
    """Noise does not compress: it is the worst scan of that size."""
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, size=(160, 210, 180), dtype=np.uint8)
    labels = np.zeros(grey.shape, dtype=np.uint8)
    labels[40:120, 50:150, 40:140] = LEFT
    labels[80:120, 50:150, 40:140] = RIGHT
    content = viewer_volume(ShownVolume(grey=grey, labels=labels, affine=np.eye(4)), TABLE)
    assert len(content["scan"]) + len(content["labels"]) <= MAX_BYTES


def test_no_labels_no_label_volume(shown: ShownVolume) -> None:
    assert viewer_volume(shown, [])["labels"] == ""


def test_more_than_255_labels(shown: ShownVolume) -> None:
    """Numbers then need two bytes."""
    names = {f"region {number}": number for number in range(1, 400)}
    values = shown.labels.astype(np.uint32) + 300
    many = ShownVolume(grey=shown.grey, labels=values, affine=shown.affine)
    content = viewer_volume(many, label_table(names))
    labels = np.asarray(decoded(content["labels"]).dataobj)
    np.testing.assert_array_equal(labels, values)
