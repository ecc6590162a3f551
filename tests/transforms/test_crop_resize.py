"""The FLAIR abnormality U-Net's preprocessing against scikit-image, and its inverse."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from nibabel.affines import apply_affine
from phantom import parse_spec
from scipy import ndimage
from skimage.exposure import rescale_intensity
from skimage.measure import label as label_components
from skimage.transform import resize

from pipeline.config.spec import CropResize, Intensity, NetworkSpec, Spec
from pipeline.errors import ConfigError, VolumeError
from pipeline.inference.connected_components import fill_holes, keep_components, largest_components
from pipeline.inference.invert import LabelInversion
from pipeline.inference.overlap_tile import with_background
from pipeline.transforms.crop_resize import (
    CropResizeSlicesd,
    nonzero_box,
    pad_to_squares,
    resize_slices,
    zero_below,
)
from pipeline.transforms.preprocess import preprocessing
from pipeline.types import Array

DATA = os.environ.get("VOLSEG_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="VOLSEG_DATA is not set: no real volumes")


def spec_of(size: int = 64, **changes: object) -> Spec:
    settings: dict[str, object] = {
        "labels": {"background": 0, "abnormality": 1},
        "channels": ("pre", "FLAIR", "post"),
        "spacing": (None, None, None),
        "orientation": "PLS",
        "roi_size": (size, size),
        "slice_axis": "S",
        "network": NetworkSpec(features=(2, 4)),
        "output": "sigmoid",
        "fallback_channel": "FLAIR",
        "intensity": Intensity(method="percentiles_zscore", lower=10.0, upper=99.0),
        "crop_resize": CropResize(floor=0.1, slice_size=size, axis="S"),
        "largest_component": ["each"],
    }
    return Spec(**{**settings, **changes})  # type: ignore[arg-type]


def flair(step: int = 3) -> nib.Nifti1Image:
    """Every third voxel of a real FLAIR volume, its brain a little off its middle."""
    assert DATA is not None
    image = nib.load(Path(DATA) / "real" / "head_FLAIR.nii.gz")
    return image.slicer[5::step, 2::step, ::step]


def as_slices(image: nib.Nifti1Image) -> Array:
    """Return (slice, row to the back, column to the left, 3 channels), as in the paper's code."""
    turned = nib.as_closest_canonical(image)
    array = np.asarray(turned.dataobj, dtype=np.float64)[::-1, ::-1]
    slices: Array = np.repeat(array.transpose(2, 1, 0)[..., None], 3, axis=-1)
    return slices


def as_tensor(volume: Array) -> Array:
    """(slice, row, column, channel) → (channel, row, column, slice)."""
    turned: Array = volume.transpose(3, 1, 2, 0)
    return turned


@needs_data
@pytest.mark.parametrize("size", [48, 96])
def test_each_step_is_scikit_images(size: int) -> None:
    image = flair()
    volume = as_slices(image)
    volume = volume / volume.max()
    volume[volume < np.max(volume) * 0.1] = 0
    ours = zero_below(as_tensor(as_slices(image)).astype(np.float32), 0.1)
    assert np.abs(ours - as_tensor(volume)).max() <= 1e-6

    filled = np.argwhere(volume.max(axis=-1) > 0)
    low, high = filled.min(axis=0), filled.max(axis=0) + 1
    volume = volume[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    ours = nonzero_box(ours).of(ours)
    assert ours.shape == as_tensor(volume).shape

    rows, columns = volume.shape[1:3]
    assert rows != columns
    missing = abs(rows - columns)
    ends = (missing // 2, missing - missing // 2)
    pads = [(0, 0), (0, 0), ends, (0, 0)] if rows > columns else [(0, 0), ends, (0, 0), (0, 0)]
    volume = np.pad(volume, pads)
    ours, _ = pad_to_squares(ours, 2)
    assert np.abs(ours - as_tensor(volume)).max() <= 1e-6

    shape = (len(volume), size, size, 3)
    volume = resize(volume, shape, order=2, mode="constant", cval=0, anti_aliasing=False)
    ours = resize_slices(ours, 2, size, order=2)
    assert np.abs(ours - as_tensor(volume)).max() <= 1e-5

    volume = rescale_intensity(
        volume, in_range=(np.percentile(volume, 10), np.percentile(volume, 99))
    )
    volume = (volume - volume.mean(axis=(0, 1, 2))) / volume.std(axis=(0, 1, 2))
    whole = preprocessing(spec_of(size))({"image": [image] * 3})["image"]
    assert whole.shape == as_tensor(volume).shape
    assert np.abs(whole.numpy() - as_tensor(volume)).max() <= 1e-4


@needs_data
def test_one_flair_serves_three_channels(tmp_path: Path) -> None:
    image = flair()
    transform = preprocessing(spec_of())
    alone = transform({"image": image})["image"]
    thrice = transform({"image": [image] * 3})["image"]
    assert torch.equal(alone, thrice)


@needs_data
def test_the_affine_follows_crop_pad_and_resize() -> None:
    """A ramp along each world axis keeps its values in mm on the resized grid."""
    image = flair()
    shape = image.shape
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    world = apply_affine(image.affine, places)
    case: dict[Hashable, Any] = {
        "image": MetaTensor(np.asarray(image.dataobj, dtype=np.float32)[None], affine=image.affine)
    }
    step = CropResizeSlicesd(
        ("image",),
        CropResize(floor=0.1, slice_size=80, axis="S"),
        "".join(nib.aff2axcodes(image.affine)),
    )
    fitted = step({**case})["image"]
    box = nonzero_box(zero_below(np.asarray(image.dataobj, dtype=np.float32)[None], 0.1))
    for axis in range(3):
        field = MetaTensor(world[..., axis][None].astype(np.float32), affine=image.affine)
        ramp = step._crop_resize(field, field.numpy(), box, order=1)
        found = apply_affine(np.asarray(ramp.affine), np.argwhere(np.ones(ramp.shape[1:])))[:, axis]
        inside = np.zeros(ramp.shape[1:], dtype=bool)
        inside[20:-20, 20:-20, 2:-2] = True
        assert np.abs(found.reshape(ramp.shape[1:]) - ramp.numpy()[0])[inside].max() < 0.01
        assert np.allclose(np.asarray(ramp.affine), np.asarray(fitted.affine))


@needs_data
@pytest.mark.parametrize("codes", ["RAS", "LPI", "SAR", "PIR"])
def test_the_inverse_is_on_the_files_grid(codes: str) -> None:
    """Labels return to the file's voxels, and there are none where the volume was cropped."""
    start = nib.orientations.io_orientation(flair().affine)
    image = flair().as_reoriented(
        nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes))
    )
    spec = spec_of(96)
    case = preprocessing(spec)({"image": [image] * 3})
    seen = case["image"][:1]
    everywhere = LabelInversion(spec)(
        {**case, "pred": as_pred(torch.full_like(seen.as_tensor(), 5.0))}
    )["pred"]
    assert everywhere.shape == (1, *image.shape)
    assert np.allclose(everywhere.affine, image.affine)
    box = nonzero_box(zero_below(np.asarray(image.dataobj, dtype=np.float32)[None], 0.1))
    filled = np.argwhere(everywhere[0].numpy())
    margin = np.array(
        [0 if "S" in code or "I" in code else 200 for code in codes]
    )  # slices were padded to squares
    assert (filled.min(axis=0) >= box.start - margin).all()
    assert (filled.max(axis=0) <= box.stop - 1 + margin).all()
    bright = (np.asarray(image.dataobj) >= 0.6 * np.asarray(image.dataobj).max()).astype(np.float32)
    lone = torch.from_numpy(resampled(bright, case["image"], image.affine))[None]
    back = LabelInversion(spec_of(96, largest_component=[]))(
        {**case, "pred": as_pred(20 * (lone - 0.5))}
    )["pred"]
    agree = 2 * (back[0].numpy() * bright).sum() / (back.sum() + bright.sum())
    assert agree > 0.9


def as_pred(logit: torch.Tensor) -> MetaTensor:
    return MetaTensor(with_background(logit[None])[0])


def resampled(mask: Array, like: MetaTensor, affine: Array) -> Array:
    from nibabel.processing import resample_from_to

    return np.asarray(
        resample_from_to(
            nib.Nifti1Image(mask, affine), (like.shape[1:], np.asarray(like.affine)), order=1
        ).dataobj
    )


def test_a_label_is_cropped_and_resized_with_its_image() -> None:
    image = np.zeros((1, 20, 30, 8), dtype=np.float32)
    image[0, 5:15, 3:27, 2:7] = np.random.default_rng(0).uniform(1, 2, (10, 24, 5))
    label = (image > 1.5).astype(np.float32)
    step = CropResizeSlicesd(("image", "label"), CropResize(slice_size=48), "RAS")
    case = step(
        {"image": MetaTensor(image, affine=np.eye(4)), "label": MetaTensor(label, affine=np.eye(4))}
    )
    assert case["image"].shape == case["label"].shape == (1, 48, 48, 5)
    assert torch.equal(torch.as_tensor(case["image"].affine), torch.as_tensor(case["label"].affine))
    inner = resize(
        np.pad(label[0, 5:15, 3:27, 2:7], [(7, 7), (0, 0), (0, 0)]),
        (48, 48, 5),
        order=0,
        anti_aliasing=False,
    )
    assert np.array_equal(case["label"].numpy()[0], inner)


def test_the_largest_component_is_scikit_images() -> None:
    noise = np.random.default_rng(1).uniform(size=(17, 18, 19)) > 0.72
    parts = label_components(noise, connectivity=1)
    expected = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    assert np.array_equal(
        largest_components(torch.from_numpy(noise.astype(np.uint8))).numpy() > 0, expected
    )


def test_enclosed_background_is_a_hole() -> None:
    """Holes, as scipy finds them, get the nearest structure; open background stays."""
    rng = np.random.default_rng(0)
    index = np.where(rng.random((15, 19, 12)) < 0.8, rng.integers(1, 4, (15, 19, 12)), 0).astype(
        np.uint8
    )
    index[:3] = 0
    found = fill_holes(torch.from_numpy(index)).numpy()
    box = ndimage.find_objects((index > 0).astype(np.uint8))[0]
    expected = np.zeros(index.shape, dtype=bool)
    expected[box] = ndimage.binary_fill_holes(index[box] > 0)
    assert (expected & (index == 0)).sum() > 20
    np.testing.assert_array_equal(found > 0, expected)
    np.testing.assert_array_equal(found[index > 0], index[index > 0])
    spec = parse_spec(largest_component=["all"])
    image = MetaTensor(torch.zeros(1, 3, 3, 3), meta={"labels_affine": np.eye(4)})
    ring = torch.ones(1, 3, 3, 3, dtype=torch.uint8)
    ring[0, 1, 1, 1] = 0
    assert bool((keep_components(ring, image, spec) == 1).all())
    assert not fill_holes(torch.zeros(3, 4, 5, dtype=torch.uint8)).any()


def test_each_structure_keeps_its_own_largest_component() -> None:
    index = torch.tensor([1, 0, 1, 1, 0, 2, 2, 0, 2, 1], dtype=torch.uint8).view(-1, 1, 1)
    assert largest_components(index).flatten().tolist() == [0, 0, 1, 1, 0, 2, 2, 0, 0, 0]


def test_a_removed_component_gets_the_surrounding_label() -> None:
    """It leaves no hole in another structure, and other classes keep their components."""
    index = torch.zeros(9, 8, 7, dtype=torch.uint8)
    index[1:8, 1:7, 1:6] = 1
    index[3:5, 3:5, 2:4] = 2
    index[6, 5, 4] = index[0, 0, 6] = 2
    index[8, 7, 0] = 1
    expected = index.clone()
    expected[6, 5, 4], expected[0, 0, 6] = 1, 0
    assert torch.equal(largest_components(index, [2]), expected)
    spec = parse_spec(largest_component=["back"])
    assert torch.equal(keep_components(index[None], MetaTensor(index[None]), spec)[0], expected)
    with pytest.raises(
        ConfigError, match=r"spec.largest_component: expected names of labels, got nose"
    ):
        parse_spec(largest_component=["nose"])


def test_all_structures_together_keep_one_component() -> None:
    """The component counts all labels."""
    spec = parse_spec(largest_component=["all"])
    index = torch.tensor([1, 0, 1, 2, 0, 2, 0, 1, 1, 2, 0], dtype=torch.uint8).view(1, -1, 1, 1)
    assert keep_components(index, MetaTensor(index), spec).flatten().tolist() == [
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        1,
        1,
        2,
        0,
    ]


def test_a_sigmoid_finds_a_structure_above_one_half() -> None:
    logits = torch.tensor([-3.0, -0.01, 0.0, 0.01, 3.0]).view(1, 1, 5)
    classes = with_background(logits)
    assert classes.argmax(1).flatten().tolist() == [0, 0, 0, 1, 1]
    assert torch.allclose(classes.softmax(1)[:, 1], torch.sigmoid(logits[:, 0]))
    two = with_background(torch.tensor([[-1.0, 1.0, 1.0], [-2.0, 2.0, 0.5]])[None])
    assert two.argmax(1).flatten().tolist() == [0, 2, 1]


def test_a_volume_without_magnitudes_is_refused() -> None:
    with pytest.raises(VolumeError, match="no value above 0"):
        zero_below(np.full((1, 2, 3, 4), -1, dtype=np.float32), 0.1)
