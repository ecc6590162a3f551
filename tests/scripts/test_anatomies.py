from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from click.testing import CliRunner
from phantom import load_script, oblique, save


def test_heads_are_repeated_and_brains_are_cropped_in_place(tmp_path: Path) -> None:
    script = load_script("anatomies")
    heads, segmented, output = (tmp_path / name for name in ("heads", "segmented", "out"))
    for number in (1, 2):
        head = np.full((5, 6, 7), number, dtype=np.uint8)
        save(heads / f"head_{number}.nii.gz", nib.Nifti1Image(head, np.eye(4)))
    brain = np.zeros((31, 28, 22), dtype=np.int16)
    brain[9:20, 2:15, 10:12] = 17
    image = nib.Nifti1Image(brain, oblique())
    save(segmented / "sub-1" / "anat" / "sub-1_T1w_seg.nii.gz", image)
    arguments = [str(heads), str(segmented), str(output), "--copies", "3", "--hold-out", "head_2"]
    result = CliRunner().invoke(script.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in output.iterdir())
    assert names == [*(f"head_1_{copy}.nii.gz" for copy in (1, 2, 3)), "sub-1_T1w.nii.gz"]
    found = nib.load(output / "sub-1_T1w.nii.gz")
    assert found.get_data_dtype() == np.uint8
    assert found.shape == (19, 19, 10)
    there = np.argwhere(np.asarray(found.dataobj) == 17)
    expected = nib.affines.apply_affine(image.affine, np.argwhere(brain == 17))
    np.testing.assert_allclose(nib.affines.apply_affine(found.affine, there), expected, atol=1e-3)


def test_a_head_that_is_not_there_cannot_be_held_out(tmp_path: Path) -> None:
    script = load_script("anatomies")
    save(tmp_path / "a" / "head_1.nii.gz", nib.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)))
    arguments = [str(tmp_path / "a"), str(tmp_path / "a"), str(tmp_path / "b"), "--hold-out", "x"]
    result = CliRunner().invoke(script.main, arguments)
    assert result.exit_code == 1
    assert "expected the held-out x" in result.output
