from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from phantom import load_script, save
from scipy import ndimage

SPACING = (0.9, 1.1, 1.0)


def scene(radius_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """A dark ball of 8 mm in white matter, fluid on one side, and a label of another radius."""
    steps = [np.arange(n) * mm for n, mm in zip((41, 35, 38), SPACING, strict=True)]
    offset = np.stack(np.meshgrid(*steps, indexing="ij")) - np.array([18, 19, 17]).reshape(
        3, 1, 1, 1
    )
    distance = np.linalg.norm(offset, axis=0)
    grey = np.where(distance < 8, 60.0, 110.0)
    grey[(offset[2] < -4) & (distance >= 8)] = 10
    return ndimage.gaussian_filter(grey, 0.4).astype(np.float32), distance < radius_mm


@pytest.mark.parametrize("shift_mm", [-1.0, 0.0, 1.0])
def test_layers_follow_the_labels(shift_mm: float) -> None:
    """A label that ends 1 mm inside has the next layer's grey value in each layer."""
    script = load_script("border_profile")
    grey, label = scene(8 + shift_mm)
    found = script.profile(grey, label, SPACING)
    first_bright = {-1.0: 3, 0.0: 2, 1.0: 1}[shift_mm]  # the layer in which white matter begins
    assert (found[:first_bright] < 0.5).all()
    assert (found[first_bright:] > 0.5).all()
    assert found[-1] == pytest.approx(1, abs=0.05)


def test_a_thin_structure_has_no_profile() -> None:
    grey, label = scene(1)
    assert np.isnan(load_script("border_profile").profile(grey, label, SPACING)).all()


def test_a_label_map_on_another_grid_is_named(tmp_path: Path) -> None:
    grey, label = scene(8)
    affine = np.diag([*SPACING, 1.0])
    save(tmp_path / "images" / "a.nii.gz", nib.Nifti1Image(grey, affine))
    save(tmp_path / "labels" / "a.nii.gz", nib.Nifti1Image(label[1:].astype(np.uint8), affine))
    arguments = [str(tmp_path / "images"), str(tmp_path / "labels"), "--value", "1"]
    result = CliRunner().invoke(load_script("border_profile").main, arguments)
    assert result.exit_code == 1
    assert "expected the same grid" in result.output


def test_cases_are_averaged_and_those_without_labels_left_out(tmp_path: Path) -> None:
    script = load_script("border_profile")
    affine = np.diag([*SPACING, 1.0])
    for number, ending in ((1, ""), (2, "_seg"), (3, None)):
        grey, label = scene(8)
        save(tmp_path / "images" / f"a{number}.nii.gz", nib.Nifti1Image(grey, affine))
        if ending is not None:
            name = f"a{number}{ending}.nii.gz"
            save(tmp_path / "labels" / name, nib.Nifti1Image(label.astype(np.uint8) * 17, affine))
    arguments = [str(tmp_path / "images"), str(tmp_path / "labels"), "--value", "17"]
    result = CliRunner().invoke(script.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "2 cases"
    assert len(lines) == 6
    assert lines[-1].startswith("2 to 3 mm outside: 1.0")
    assert lines[-1].endswith("(sd 0.00)")
    no_map = CliRunner().invoke(script.main, [arguments[0], arguments[0], "--value", "17"])
    assert no_map.exit_code == 1
    assert "expected whole numbers for labels" in no_map.output
    empty = CliRunner().invoke(script.main, [*arguments[:2], "--value", "9"])
    assert empty.exit_code == 1
    assert "a1: no voxel of the structure" in empty.output
    assert "expected images in" in empty.output
