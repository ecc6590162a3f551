from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import CliRunner
from phantom import LABELS, SHAPE, make_bundle, nifti, save, smooth

import pipeline
from pipeline.cli.app import main
from pipeline.errors import PipelineError
from pipeline.inference.model import Model
from pipeline.inference.sliding_window import WindowInferer
from pipeline.io.tables import read_csv

READERS: dict[str, Callable[[str], Any]] = {
    "path": Path,
    "string": str,
    "nibabel": nib.load,
    "sitk": sitk.ReadImage,
}


@pytest.mark.parametrize("kind", list(READERS))
def test_the_api_gives_what_the_command_writes(
    kind: str, tiny_bundle: Path, model: Model, volume_file: Path, tmp_path: Path
) -> None:
    """A path and images in memory give the same labels and volumes, each on its own grid."""
    arguments = [
        "segment",
        str(volume_file),
        "-o",
        str(tmp_path / "out"),
        "-b",
        str(tiny_bundle),
        "--device",
        "cpu",
    ]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    written = nib.load(tmp_path / "out" / "sub-01_T1w_seg.nii.gz")
    image = READERS[kind](str(volume_file))
    result = pipeline.segment(model, image)
    np.testing.assert_array_equal(result.labels, np.asarray(written.dataobj))
    assert result.labels.dtype == written.get_data_dtype()
    np.testing.assert_allclose(result.affine, written.affine, atol=1e-5)
    if kind == "sitk":
        assert sitk.GetArrayFromImage(result.image).transpose().tolist() == result.labels.tolist()
        for fact in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(result.image, fact)() == getattr(image, fact)()
    else:
        assert result.image.to_bytes() == written.to_bytes()
    (row,) = read_csv(tmp_path / "out" / "volumes.csv")
    assert {name: float(row[name]) for name in ("front", "back")} == pytest.approx(
        result.volumes_mm3
    )


def test_volumes_are_voxels_times_their_size(model: Model) -> None:
    """mm³ a structure, background left out."""
    result = pipeline.segment(model, nifti())
    assert result.volumes_mm3 == {
        name: pytest.approx(float((result.labels == value).sum()) * 0.9 * 1.3 * 2.1, rel=1e-5)
        for name, value in LABELS.items()
        if value
    }


def test_load_opens_by_path_and_takes_settings(tiny_bundle_3d: Path) -> None:
    """One load serves many images; overlap is the one asked for."""
    model = pipeline.load(tiny_bundle_3d, device="cpu", overlap=0.25)
    assert isinstance(model, Model)
    assert isinstance(model.inferer, WindowInferer)
    assert model.inferer.overlap == 0.25
    for seed in (0, 1):
        assert pipeline.segment(model, nifti(smooth(seed=seed))).labels.shape == SHAPE


def test_a_list_is_one_case_of_several_channels(tmp_path: Path) -> None:
    """Images in memory, one a channel; the result is of the kind of the first."""
    model = pipeline.load(make_bundle(tmp_path / "two", channels=["T1w", "FLAIR"]), device="cpu")
    images = [nifti(smooth(seed=i)) for i in range(2)]
    in_memory = pipeline.segment(model, images)
    files = [save(tmp_path / f"{i}.nii.gz", image) for i, image in enumerate(images)]
    np.testing.assert_array_equal(
        in_memory.labels, pipeline.segment(model, [str(file) for file in files]).labels
    )
    with pytest.raises(PipelineError, match="got 1 image, expected 2, one per channel: T1w, FLAIR"):
        pipeline.segment(model, images[0])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"bundle": "no_such"},
            "no_such: no such bundle; expected a folder .* or one of brain_mr_structures, "
            "hippocampus_mr_2d, hippocampus_mr_3d",
        ),
        ({"device": "tpu"}, "device tpu: not on this machine; it has cpu"),
        ({"overlap": 1.0}, "overlap: expected a fraction, 0 ≤ overlap < 1, got 1.0"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    arguments: dict[str, Any], says: str, tiny_bundle_3d: Path
) -> None:
    """With what there is instead."""
    with pytest.raises(PipelineError, match=says):
        pipeline.load(**({"bundle": tiny_bundle_3d} | arguments))


def test_what_cannot_be_segmented_raises_its_own_error(model: Model) -> None:
    """Not that of a transform or an engine around it, and the model is as good as before."""
    before = pipeline.segment(model, nifti()).labels
    with pytest.raises(PipelineError, match="the volume is empty"):
        pipeline.segment(model, nifti(np.zeros(SHAPE, dtype=np.float32)))
    np.testing.assert_array_equal(pipeline.segment(model, nifti()).labels, before)


def test_warnings_come_along(model: Model) -> None:
    """What is doubtful is told with the result."""
    array = smooth()
    array[3, 4, 5] = np.nan
    assert pipeline.segment(model, nifti(array)).warnings == (
        "1 voxels were NaN or infinite and were set to the smallest value",
    )


def test_names_that_are_not_there() -> None:
    """The package says so as any module does."""
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'sgement'"):
        _ = pipeline.sgement
