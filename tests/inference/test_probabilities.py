"""What soft scores say beside labels, against the same of whole arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from phantom import LABELS, make_bundle, nifti, oblique, parse_spec, reorient, save
from scipy.ndimage import map_coordinates
from scipy.stats import entropy as scipy_entropy

import pipeline
from pipeline.bundle.opening import open_bundle
from pipeline.cli.app import main
from pipeline.errors import ConfigError
from pipeline.inference.model import Model
from pipeline.inference.predictor import predict_case
from pipeline.inference.probabilities import entropy
from pipeline.io.tables import read_csv
from pipeline.transforms.preprocess import IMAGE

SHEARED = oblique()
SHEARED[:3, 1] += 0.006 * SHEARED[:3, 0]
GRIDS = {"oblique": oblique(), "sheared": SHEARED}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("soft") / "tiny", overlap=0.25, soft_volumes=True)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return open_bundle(bundle, device="cpu", runtime="torch", uncertainty=True)


def probabilities(model: Model, image: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Probabilities (C, x, y, z) of the whole volume on the network's grid, and its affine."""
    volume = model.preprocessing({IMAGE: image})[IMAGE]
    logits = model.inferer(volume[None].as_tensor(), model.network)[0]
    return torch.softmax(logits, dim=0).numpy().astype(np.float64), np.asarray(
        volume.affine, dtype=np.float64
    )


@pytest.mark.parametrize("held", [2**30, 1], ids=["one group", "small groups"])
def test_volumes_are_sums_of_probabilities(
    held: float, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the volume is cut into blocks, which repeat their edges."""
    monkeypatch.setattr(model.inferer, "buffer_bytes", held)
    expected, affine = probabilities(model, nifti())
    found = predict_case(model, nifti()).volumes_mm3
    voxel = abs(np.linalg.det(affine[:3, :3]))
    np.testing.assert_allclose(list(found.values()), expected.sum((1, 2, 3))[1:] * voxel, rtol=1e-5)


def test_sums_follow_the_structures_in_the_table(tmp_path: Path) -> None:
    """Each is the sum of its own, in mm³.

    A name that a label has is refused, and so are parts that are no labels.
    """
    both = make_bundle(
        tmp_path / "tiny", sums={"both": ["back", "front"], "one": ["back"], "whole": ["all"]}
    )
    arguments = [
        "segment",
        str(save(tmp_path / "a.nii.gz")),
        "-o",
        str(tmp_path / "out"),
        "-b",
        str(both),
        "--device",
        "cpu",
    ]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    row = read_csv(tmp_path / "out" / "volumes.csv")[0]
    assert list(row)[-5:] == ["front", "back", "both", "one", "whole"]
    assert row["whole"] == row["both"]
    assert float(row["both"]) == pytest.approx(float(row["front"]) + float(row["back"]))
    assert float(row["one"]) == float(row["back"])
    for sums, says in (
        ({"front": ["back"]}, "a name other than a label's"),
        ({"both": ["nose"]}, r"sums.both: .* got nose"),
    ):
        with pytest.raises(ConfigError, match=says):
            parse_spec(sums=sums)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("axcodes", ["RAS", "IPL"])
def test_uncertainty_is_the_entropy_on_the_files_grid(
    grid: str, axcodes: str, model: Model
) -> None:
    """Of the network's probabilities, interpolated to the file's voxels: against scipy."""
    image = reorient(nifti(affine=GRIDS[grid], codes=(1, 0)), axcodes)
    expected, affine = probabilities(model, image)
    field = scipy_entropy(expected, axis=0, base=len(expected))
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in image.shape), indexing="ij"), axis=-1)
    matrix = np.linalg.inv(affine) @ image.affine
    places = np.moveaxis(voxels @ matrix[:3, :3].T + matrix[:3, 3], -1, 0)
    found = predict_case(model, image).uncertainty
    assert found is not None
    np.testing.assert_allclose(
        found, map_coordinates(field, places, order=1, mode="nearest"), atol=2e-4
    )


def test_entropy_goes_from_sure_to_all_alike() -> None:
    scores = torch.zeros(4, 1, 1, 3)
    scores[2, 0, 0, 0], scores[1:3, 0, 0, 1] = 1000.0, 1000.0
    assert entropy(scores).flatten().tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_the_command_writes_both(bundle: Path, tmp_path: Path) -> None:
    """A second image on the input's grid, volumes by probabilities.

    Asked for later, it is not missing.
    """
    volume, out = save(tmp_path / "a.nii.gz"), tmp_path / "out"
    arguments = ["segment", str(volume), "-o", str(out), "-b", str(bundle), "--device", "cpu"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert not (out / "a_uncertainty.nii.gz").exists()
    again = CliRunner().invoke(main, [*arguments, "--uncertainty"])
    assert again.exit_code == 0, again.output
    written, labels = nib.load(out / "a_uncertainty.nii.gz"), nib.load(out / "a_seg.nii.gz")
    result = pipeline.segment(pipeline.load(bundle, device="cpu", uncertainty=True), volume)
    assert result.uncertainty is not None
    np.testing.assert_allclose(written.get_fdata(), result.uncertainty, atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(written.affine, labels.affine)
    row = read_csv(out / "volumes.csv")[0]
    counted = {
        name: int((np.asarray(labels.dataobj) == value).sum()) * 0.9 * 1.3 * 2.1
        for name, value in LABELS.items()
        if value
    }
    for name, mm3 in counted.items():
        assert float(row[name]) == pytest.approx(result.volumes_mm3[name])
        assert float(row[name]) != pytest.approx(mm3, rel=1e-6)
