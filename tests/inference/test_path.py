from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.processing import resample_to_output
from phantom import (
    ORIENTATIONS,
    SHAPE,
    dice,
    make_bundle,
    make_model,
    nifti,
    oblique,
    parse_spec,
    reorient,
    save,
    smooth,
    spec_content,
)

from pipeline.api import segment
from pipeline.batch.outputs import output_path
from pipeline.batch.runner import segment_cases
from pipeline.bundle.opening import open_bundle
from pipeline.inference.model import Model
from pipeline.inference.predictor import predict_case
from pipeline.types import Array

GRID = ("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d")
PLACE = (*GRID, "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "dim")


def segmented(model: Model, path: Path, out: Path) -> Any:
    (row,) = segment_cases(
        model, [{"case": path.name.split(".")[0], "image": str(path)}], out, overwrite=True
    )
    assert row.status == "done", row
    return nib.load(output_path(out, row.case))


def upright(labels: Any) -> Array:
    """The labels turned to RAS, to compare what files of several orientations gave."""
    return np.asarray(nib.as_closest_canonical(labels).dataobj)


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_every_orientation_gives_its_own_grid_and_the_same_labels(
    axcodes: str, model: Model, tmp_path: Path
) -> None:
    """Whatever the order and direction of the file's axes, its grid comes back to the bit.

    That is its shape, affine, codes and units; the labels are those of the upright file.
    """
    assert len(set(ORIENTATIONS)) == 48
    image = reorient(nifti(), axcodes)
    image.header.set_sform(image.affine, code=4)
    image.header.set_qform(image.affine, code=2)
    path = save(tmp_path / "scan.nii.gz", image)
    labels = segmented(model, path, tmp_path / "out")
    for field in PLACE:
        np.testing.assert_array_equal(
            labels.header[field], nib.load(path).header[field], err_msg=field
        )
    assert labels.shape == image.shape
    assert labels.get_data_dtype() == np.uint16
    reference = predict_case(model, nifti()).labels
    assert len(np.unique(reference)) == 3
    assert dice(upright(labels), reference) >= 0.999


@pytest.mark.parametrize("codes", [(1, 1), (4, 1), (2, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize("units", [("mm", "sec"), ("unknown", "unknown")])
@pytest.mark.parametrize("version", [1, 2])
def test_codes_and_units_come_back(
    codes: tuple[int, int], units: tuple[str, str], version: int, model_3d: Model, tmp_path: Path
) -> None:
    """sform and qform, set or not, and the units stay what they were."""
    kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    header = kind.header_class()
    header.set_sform(oblique(), code=codes[0])
    header.set_qform(oblique(), code=codes[1])
    header.set_xyzt_units(*units)
    path = save(tmp_path / "scan.nii.gz", kind(smooth(), None, header))
    labels = segmented(model_3d, path, tmp_path / "out")
    assert type(labels) is kind
    np.testing.assert_array_equal(labels.affine, nib.load(path).affine)
    for field in PLACE:
        np.testing.assert_array_equal(
            labels.header[field], nib.load(path).header[field], err_msg=field
        )


@pytest.mark.parametrize(
    "spacing", [(0.9, 0.9, 4.0), (4.0, 0.9, 0.9), (0.5, 0.6, 0.7), (3.0, 3.5, 2.5)]
)
@pytest.mark.parametrize("axcodes", ["RAS", "PIR"])
def test_any_spacing_gives_its_own_grid(
    spacing: tuple[float, float, float], axcodes: str, model: Model
) -> None:
    """Thick slices, fine and coarse voxels, turned against the axes.

    Labels have the file's shape and affine.
    """
    image = reorient(nifti(affine=oblique(spacing)), axcodes)
    prediction = predict_case(model, image)
    assert prediction.labels.shape == image.shape
    np.testing.assert_array_equal(prediction.affine, image.affine)


@pytest.mark.parametrize("shape", [(1, 24, 21), (3, 2, 2), (50, 5, 7)])
def test_any_size_works(shape: tuple[int, int, int], model: Model) -> None:
    """Volumes smaller than the window, one voxel thick, or long."""
    assert predict_case(model, nifti(smooth(shape))).labels.shape == shape


class RightIsBright(torch.nn.Module):
    """The label `front` where a voxel is brighter than the volume's mean, `back` where it is
    darker.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(x, -1), x, -x], dim=1) * 50


def ramp(affine: Any, shape: tuple[int, ...] = SHAPE) -> tuple[Array, Array]:
    """Voxels that are as bright as they lie to the right, mm, and a mask of those far from the
    middle.
    """
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    right = (voxels @ affine[:3, :3].T + affine[:3, 3])[..., 0]
    return right.astype(np.float32), np.abs(right - right.mean()) > 3


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
@pytest.mark.parametrize("dims", [2, 3])
def test_left_never_becomes_right(axcodes: str, dims: int) -> None:
    """What lies to the right in the world is labelled as such, whatever the orientation of file and
    network.
    """
    orientation = {"R": "LAS", "L": "PSR", "A": "RAS", "P": "SLA", "S": "IPR", "I": "ASL"}[
        axcodes[0]
    ]
    spec = parse_spec(
        dims, orientation=orientation, labels={"background": 0, "right": 1, "left": 2}
    )
    net = RightIsBright()
    image = reorient(nifti(), axcodes)
    right, clear = ramp(image.affine, image.shape)
    labels = predict_case(make_model(net, spec), nifti(right, image.affine)).labels
    np.testing.assert_array_equal(labels[clear], np.where(right > right.mean(), 1, 2)[clear])


@pytest.mark.parametrize("spacing", [[0.5, 0.6, 0.7], [2.0, 2.2, 3.1]])
def test_labels_lie_where_the_structure_does(spacing: list[float]) -> None:
    """A ball's centre and volume survive resampling to a finer and to a coarser grid and back.

    It is large, because averaging on a coarser grid rounds off structures of a few voxels.
    """
    affine = oblique((0.9, 0.9, 2.0))
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in (46, 44, 24)), indexing="ij"), axis=-1)
    world = voxels @ affine[:3, :3].T + affine[:3, 3]
    centre = world.reshape(-1, 3).mean(axis=0) + np.array([2.0, -3.0, 1.0])
    ball = (
        200 / (1 + np.exp(np.linalg.norm(world - centre, axis=-1) - 13)) + smooth((46, 44, 24)) / 50
    )
    spec = parse_spec(
        spacing=spacing, intensity={"method": "percentiles", "lower": 0, "upper": 100}
    )

    class Threshold(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([0.5 - x, x - 0.5, torch.full_like(x, -9)], dim=1) * 20

    labels = (
        predict_case(make_model(Threshold(), spec), nifti(ball.astype(np.float32), affine)).labels
        == 7
    )
    np.testing.assert_allclose(world[labels].mean(axis=0), centre, atol=0.2)
    assert labels.sum() * 0.9 * 0.9 * 2.0 == pytest.approx(4 / 3 * np.pi * 13**3, rel=0.06)


def test_the_same_file_gives_the_same_labels_twice(model: Model, volume_file: Path) -> None:
    """Nothing of a case stays in the model."""
    first = predict_case(model, str(volume_file)).labels
    predict_case(model, nifti(smooth((9, 30, 11), seed=5)))
    np.testing.assert_array_equal(predict_case(model, str(volume_file)).labels, first)


def test_each_step_is_timed(model: Model, volume_file: Path) -> None:
    """Four steps from file to labels, none of them negative."""
    seconds = predict_case(model, str(volume_file)).seconds
    assert list(seconds) == ["read", "preprocess", "network", "invert"]
    assert min(seconds.values()) >= 0


def test_several_channels(tmp_path: Path) -> None:
    """Two files a case, in the order of the spec: swapping them is another case."""
    root = make_bundle(tmp_path / "two", channels=["T1w", "FLAIR"])
    model = open_bundle(root, device="cpu")
    files = [
        save(tmp_path / f"{name}.nii.gz", nifti(smooth(seed=i))) for i, name in enumerate("ab")
    ]
    labels = predict_case(model, files).labels
    assert labels.shape == SHAPE
    assert not np.array_equal(labels, predict_case(model, files[::-1]).labels)


def test_a_real_volume_in_all_orientations(hippocampus: list[Path], tmp_path: Path) -> None:
    """A crop re-stored in each of the 48 ways.

    Its grid exactly, and labels that agree with Dice ≥ .999.
    """
    spec = spec_content(
        3,
        spacing=[1.0, 1.1, 1.2],
        roi_size=[40, 56, 40],
        labels={"background": 0, "anterior": 1, "posterior": 2},
    )
    model = open_bundle(make_bundle(tmp_path / "bundle", **spec), device="cpu")
    source = nib.load(hippocampus[0])
    reference = upright(segment(model, source).image)
    for axcodes in ORIENTATIONS:
        image = reorient(source, axcodes)
        result = segment(model, image)
        assert result.image.shape == image.shape
        np.testing.assert_array_equal(result.image.affine, image.affine)
        assert dice(upright(result.image), reference) >= 0.999


@pytest.mark.parametrize("kind", ["oblique", "thick"])
def test_a_real_volume_resampled(
    kind: str, hippocampus: list[Path], model: Model, tmp_path: Path
) -> None:
    """An oblique and a 0.9 × 0.9 × 4 mm resampling of a crop keep their own shape, affine, codes
    and units.
    """
    source = nib.load(hippocampus[1])
    image = resample_to_output(source, (0.9, 0.9, 4.0))
    if kind == "oblique":
        turned = source.affine @ oblique((1.0, 1.0, 1.0))
        image = nib.processing.resample_from_to(source, ((41, 52, 38), turned))
    image.header.set_qform(image.affine, code=3)
    image.header.set_sform(image.affine, code=2)
    image.header.set_xyzt_units("mm")
    path = save(tmp_path / "scan.nii.gz", image)
    labels = segmented(model, path, tmp_path / "out")
    for field in PLACE:
        np.testing.assert_array_equal(
            labels.header[field], nib.load(path).header[field], err_msg=field
        )
