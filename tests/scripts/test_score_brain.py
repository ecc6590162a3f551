"""The default model on real heads, and the script that scores it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from nibabel.processing import resample_from_to
from phantom import load_script, oblique, reorient, smooth

import pipeline
from pipeline.evaluation.metrics import dice
from pipeline.inference import CaseModel
from pipeline.io.image import Image

PAIRED = ("thalamus", "caudate", "putamen", "hippocampus", "amygdala", "cerebral cortex")


@pytest.fixture(scope="module")
def model() -> CaseModel:
    """The default bundle."""
    return pipeline.load(device="cpu")


@pytest.fixture(scope="module")
def script() -> Any:
    """scripts/score_brain.py as a module."""
    return load_script("score_brain")


@pytest.mark.slow
def test_a_real_head(model: CaseModel, data: Path) -> None:
    """The brain is found in any orientation of the file, and left is left."""
    image, mask = (
        nib.load(data / "real" / f"head18_{name}.nii.gz") for name in ("T1w", "brainmask")
    )
    result = pipeline.segment(model, image)
    brain = np.asarray(mask.dataobj) > 0
    assert result.labels.shape == brain.shape
    assert dice(result.labels > 0, brain) > 0.95
    for name in PAIRED:
        left, right = (
            apply_affine(
                result.affine,
                np.argwhere(result.labels == model.labels[f"{side} {name}"]).mean(axis=0),
            )
            for side in ("left", "right")
        )
        assert right[0] - left[0] > 15
        sizes = [result.volumes_mm3[f"{side} {name}"] for side in ("left", "right")]
        assert max(sizes) < 1.4 * min(sizes)
    again = pipeline.segment(model, reorient(image, "PIR"))
    back = nib.as_closest_canonical(nib.Nifti1Image(again.labels, again.affine))
    same = nib.as_closest_canonical(nib.Nifti1Image(result.labels, result.affine))
    assert (np.asarray(back.dataobj) == np.asarray(same.dataobj)).mean() > 0.999


@pytest.mark.slow
def test_a_template_of_many_brains(model: CaseModel) -> None:
    """The volumes are plausible, and no structure is missing."""
    datasets = pytest.importorskip("nilearn.datasets")
    result = pipeline.segment(model, datasets.load_mni152_template(resolution=1))
    sums = tuple(set(result.volumes_mm3) - set(model.labels))
    assert not [line for line in result.warnings if line.startswith(sums)]
    assert all(result.volumes_mm3[name] > 0 for name in model.labels if name != "background")
    parts = [name for name in model.labels if name != "background"]
    assert result.volumes_mm3["intracranial"] == pytest.approx(
        sum(result.volumes_mm3[name] for name in parts)
    )


def test_manual_values_become_freesurfers(script: Any, tmp_path: Path) -> None:
    """By name and side; gyri are cortex, and structures that the model has not are left out."""
    rows = {
        47: "Right Hippocampus",
        48: "Left Hippocampus",
        35: "Brain Stem",
        4: "3rd Ventricle",
        51: "Right Lateral Ventricle",
        100: "Right ACgG  anterior cingulate gyrus",
        101: "Left ACgG  anterior cingulate gyrus",
        46: "CSF",
    }
    (tmp_path / "table.csv").write_text(
        "Label Number,Label Name\n" + "\n".join(f"{k},{v}" for k, v in rows.items()) + "\n"
    )
    found = script.oasis_values(tmp_path / "table.csv")
    assert found == {47: 53, 48: 17, 35: 16, 4: 14, 51: 43, 100: 42, 101: 3}


def test_parcels_become_cortex_and_the_callosum_white_matter(script: Any) -> None:
    parcels = np.array([0, 2, 251, 255, 41, 1003, 2035, 17])
    assert script.aseg(parcels.reshape(8, 1, 1)).ravel().tolist() == [0, 2, 2, 41, 41, 3, 42, 17]


def test_the_reference_is_compared_to_the_nearest_voxel(script: Any) -> None:
    """As nibabel resamples with nearest neighbours."""
    labels = (smooth((17, 24, 21)) // 40).astype(np.int16)
    prediction = nib.Nifti1Image(labels, oblique())
    other = oblique((1.7, 1.1, 1.4), (3.0, 5.0, -8.0))
    truth = nib.Nifti1Image(np.zeros((11, 25, 19), dtype=np.int16), other)
    expected = np.asarray(resample_from_to(prediction, truth, order=0).dataobj)
    ours = script.on_grid_of(
        Image(array=np.asarray(truth.dataobj), affine=other),
        Image(array=labels, affine=prediction.affine),
    )
    assert (ours == expected).mean() > 0.999


def test_masks_of_other_tools_are_scored_like_ours(script: Any, tmp_path: Path) -> None:
    """Against the same reference, whatever the values in the mask are."""
    brain = np.zeros((12, 15, 10), dtype=np.uint8)
    brain[3:9, 2:12, 2:8] = 1
    part = brain.copy()
    part[3:6] = 0
    masks = {"head18_brainmask": brain * 255, "head18_T1w_seg": brain * 17, "other": part}
    for name, array in masks.items():
        nib.save(nib.Nifti1Image(array, oblique()), tmp_path / f"{name}.nii.gz")
    names = {"brain mask": "head18_T1w_seg", "brain mask, half": "other"}
    rows = script.mask_scores(
        tmp_path, {("head18", name): tmp_path / f"{file}.nii.gz" for name, file in names.items()}
    )
    found = {row["structure"]: row["dice"] for row in rows}
    assert found == {"brain mask": 1.0, "brain mask, half": pytest.approx(2 / 3)}


@pytest.mark.parametrize("axis", range(3))
def test_thick_slices_lie_at_the_mean_of_their_voxels(script: Any, axis: int) -> None:
    """An intensity that is linear in space has the value of the slice's own position."""
    gradient = np.array([0.3, -0.7, 1.1])
    affine = oblique()
    places = apply_affine(affine, np.moveaxis(np.indices((17, 24, 21)), 0, -1))
    image = reorient(nib.Nifti1Image((places @ gradient).astype(np.float32), affine), "PIR")
    thick = script.average_to_slices(image, axis, 5.0)
    found = apply_affine(thick.affine, np.moveaxis(np.indices(thick.shape), 0, -1)) @ gradient
    np.testing.assert_allclose(np.asarray(thick.dataobj), found, atol=1e-3)
    assert nib.aff2axcodes(thick.affine) == ("R", "A", "S")
    step = nib.as_closest_canonical(image).header.get_zooms()[axis]
    assert thick.header.get_zooms()[axis] == pytest.approx(step * round(5.0 / step))


def test_the_table_of_scores_has_one_row_per_structure(script: Any) -> None:
    """Both sides share a cell, which is empty where the scan has no reference for it."""
    rows = [
        {"scan": scan, "structure": name, "dice": 0.8 if "left" in name else 0.9}
        for scan in script.COLUMNS
        for name in script.structures()
        if (scan, name) != ("oasis1000", "4th ventricle")
    ]
    lines = script.table(
        [*rows, {"scan": "head18", "structure": "brain mask", "dice": 0.97}]
    ).splitlines()
    assert "| brain mask |  | 0.9700 |  |  |" in lines
    assert "| hippocampus |" + " 0.800 / 0.900 |" * 4 in lines
    assert "| 4th ventricle |  | 0.900 | 0.900 | 0.900 |" in lines
    assert lines[3].endswith(" | 0.8500" * 4 + " |")
    assert len(lines) == 4 + len(script.PAIRED) + len(script.UNPAIRED)
