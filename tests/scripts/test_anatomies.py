from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from phantom import load_script, save


def maps(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names, start=1):
        image = nib.Nifti1Image(np.full((5, 6, 7), number, dtype=np.uint8), np.eye(4))
        save(folder / f"{name}.nii.gz", image)
    return folder


def test_heads_are_repeated_and_brains_keep_the_names_of_their_scans(tmp_path: Path) -> None:
    script = load_script("anatomies")
    heads = maps(tmp_path / "heads", "head_1", "head_2")
    brains = maps(tmp_path / "brains", "sub-1_T1w", "sub-2_T1w")
    output = tmp_path / "out"
    arguments = [str(heads), str(brains), str(output), "--copies", "3"]
    arguments += ["--hold-out", "head_2", "--hold-out", "sub-1_T1w"]
    result = CliRunner().invoke(script.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in output.iterdir())
    assert names == [*(f"head_1_{copy}.nii.gz" for copy in (1, 2, 3)), "sub-2_T1w.nii.gz"]
    assert (output / names[-1]).read_bytes() == (brains / "sub-2_T1w.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("brains", "held_out", "text"),
    [
        (["sub-1_T1w"], "x", "expected the held-out x"),
        ([], "head_1", r"expected label maps *.nii.gz in"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, brains: list[str], held_out: str, text: str
) -> None:
    heads = maps(tmp_path / "heads", "head_1")
    (tmp_path / "brains").mkdir()
    maps(tmp_path / "brains", *brains)
    arguments = [str(heads), str(tmp_path / "brains"), str(tmp_path / "b"), "--hold-out", held_out]
    result = CliRunner().invoke(load_script("anatomies").main, arguments)
    assert result.exit_code == 1
    assert text in result.output
