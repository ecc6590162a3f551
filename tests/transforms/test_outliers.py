"""Extreme values, backgrounds other than 0, and volumes out of proportion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from phantom import SHAPE, nifti, oblique, parse_spec, save, smooth

from pipeline.config.spec import Intensity
from pipeline.errors import VolumeError, unwrapped_errors
from pipeline.io import read, read_header, warnings_of
from pipeline.transforms.checks import (
    CheckVolumed,
    check_proportion,
    check_values,
    looks_like_labels,
    outlier_warnings,
)
from pipeline.transforms.loading import LoadVolumed
from pipeline.transforms.network_grid import network_grid_shape
from pipeline.transforms.preprocess import preprocessing
from pipeline.types import Array


def with_spikes(count: int, value: float, array: Array | None = None) -> Array:
    spiked = (smooth() if array is None else array).copy()
    spiked[:count, 3, 5] = value
    return spiked


def head(background: float = 0.0) -> Array:
    """Return an image with a constant background around an ellipsoid."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (40, 50, 44)], indexing="ij"))
    inside = (grid**2).sum(axis=0) < 0.6
    return np.where(inside, np.rint(smooth((40, 50, 44))).clip(1, 254), background)


@pytest.mark.parametrize("value", [1e6, -32768.0])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("image", [smooth(), head()])
def test_a_few_extreme_values_give_a_warning(value: float, count: int, image: Array) -> None:
    """The warning holds the range of all values, and that of nearly all others."""
    (line,) = outlier_warnings(with_spikes(count, value, image))
    assert line.startswith("a few voxels have extreme values: they run from ")
    assert f"{value:g}" in line


def test_padding_by_an_extreme_value_gives_a_warning() -> None:
    """Where it is not a few voxels, but the background."""
    padded = smooth()
    padded[:6] = -32768
    (line,) = outlier_warnings(padded)
    assert line.startswith("the background is -32768, far from all other values (")


@pytest.mark.parametrize(
    "image", [smooth(), head(), 255 - head(), smooth() * 1e-6, smooth() ** 2, np.exp(smooth() / 80)]
)
def test_images_without_outliers_give_no_warning(image: Array) -> None:
    """Whatever their scale, background and distribution."""
    assert outlier_warnings(np.asarray(image, dtype=np.float32)) == []


def test_volumes_of_one_value_have_no_range() -> None:
    """The check of values refuses them; this one has nothing to say."""
    assert outlier_warnings(np.full(SHAPE, 3.0)) == []
    assert outlier_warnings(with_spikes(1, 1.0, np.zeros(SHAPE)))


@pytest.mark.parametrize(
    ("intensity", "warned"),
    [
        (Intensity(), True),
        (Intensity(method="percentiles"), False),
        (Intensity(method="percentiles_zscore"), False),
        (Intensity(method="percentiles", lower=0.0), True),
        (Intensity(method="percentiles_zscore", upper=100.0), True),
    ],
)
def test_the_warning_depends_on_the_normalisation(intensity: Intensity, warned: bool) -> None:
    """Clipping at percentiles removes outliers."""
    spec: Any = parse_spec(intensity={
        "method": intensity.method, "lower": intensity.lower, "upper": intensity.upper,
    })  # fmt: skip
    case: Any = preprocessing(spec)({"image": nifti(with_spikes(1, 1e6))})
    assert bool(warnings_of(case["image"].meta)) == warned


@pytest.mark.slow
def test_real_images_give_no_warning(data: Path) -> None:
    """Neither about outliers nor about their size."""
    paths = [*(data / "real").glob("*T1w*"), *(data / "real").glob("*FLAIR*")]
    paths += sorted((data / "hippocampus" / "imagesTr").glob("h*"))[::6]
    paths += sorted((data / "bids_t1w").rglob("*T1w.nii.gz"))[::6]
    paths += sorted((data / "slabs" / "imagesTr").glob("*.nii.gz"))[::8]
    assert len(paths) > 50
    check = CheckVolumed("image")
    for path in paths:
        image = read(path)
        loaded = LoadVolumed("image")({"image": str(path)})
        assert warnings_of(check(loaded)["image"].meta) == image.warnings, path
        assert not any("guess" in line for line in image.warnings), path
        assert check_proportion(image.array.shape, image.affine, image.array.shape) == []


@pytest.mark.parametrize("background", [0, 255, -1024, 32767, 1])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_images_with_any_background_are_images(background: int, dtype: str) -> None:
    """Whole numbers and a constant background, whatever its value, make no label map."""
    image = head(background).astype(dtype)
    assert not looks_like_labels(image)
    check_values(torch.from_numpy(image.astype(np.float32)))
    assert not looks_like_labels(head(0)[::-1])


@pytest.mark.parametrize("offset", [0, 1, -1024])
@pytest.mark.parametrize("scale", [1, 50, 255])
def test_label_maps_with_any_background_are_label_maps(offset: int, scale: int) -> None:
    """Also those where the background is not the most frequent value."""
    coarse = np.rint(smooth() / 100).clip(0, 3)
    for labels in (coarse, coarse > 0, coarse < 2, np.where(head() > 0, 1, 0)):
        assert looks_like_labels(np.asarray(labels, dtype=np.int32) * scale + offset)


@pytest.mark.slow
def test_real_label_maps_are_refused(data: Path) -> None:
    """Those of all sets."""
    paths = sorted((data / "head_label_maps").glob("*.nii.gz"))[::5]
    paths += sorted((data / "hippocampus" / "labelsTr").glob("h*"))[::5]
    paths += sorted((data / "slabs" / "labelsTr").glob("*.nii.gz"))
    paths += [
        path
        for path in (data / "real").glob("*.nii.gz")
        if any(word in path.name for word in ("manual", "mask", "aseg"))
    ]
    assert len(paths) > 90
    assert [path.name for path in paths if not looks_like_labels(read(path).array)] == []


def test_a_volume_out_of_proportion_is_refused() -> None:
    """By its file's voxels and those of the network's grid together."""
    affine = oblique((18.0, 19.0, 17.0))
    with pytest.raises(VolumeError) as error:
        check_proportion((200, 200, 200), affine, (3600, 3800, 3400))
    assert str(error.value) == (
        "its 200 × 200 × 200 voxels (3600 × 3800 × 3400 mm) would be 3600 × 3800 × 3400 on the "
        "network's grid, 5814 times as many, expected at most 100 times; is the spacing in the "
        "header right?"
    )


@pytest.mark.parametrize(
    ("shape", "spacing", "grid", "words"),
    [
        (SHAPE, (0.9, 1.3, 2.1), SHAPE, []),
        ((256, 256, 30), (0.9, 0.9, 5.0), (230, 230, 150), []),
        # over 100 times as many, but few
        ((10, 10, 10), (8.0, 8.0, 8.0), (80, 80, 80), ["has 512 times"]),
        # many, but not over 100 times as many
        ((512, 512, 512), (1.0, 1.0, 1.0), (512, 512, 1024), []),
        ((512, 512, 40), (2.5, 1.0, 1.0), (512, 512, 40), ["field of view is 1280 × 512 × 40 mm"]),
        (
            (60, 60, 60), (19.0, 19.0, 18.0), (300, 300, 300),
            ["field of view is 1140 × 1140 × 1080 mm", "has 125 times"],
        ),
    ],
)  # fmt: skip
def test_what_is_doubtful_is_a_warning(
    shape: tuple[int, ...],
    spacing: tuple[float, float, float],
    grid: tuple[int, ...],
    words: list[str],
) -> None:
    """A field of view over 1 m, or a grid with over 100 times the voxels."""
    lines = check_proportion(shape, oblique(spacing), grid)
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_the_check_comes_before_resampling(tmp_path: Path) -> None:
    """A file of 20 kB that would have 3e9 voxels is refused, by its name, at once."""
    spec = parse_spec(spacing=[0.2, 0.2, 0.2])
    path = save(tmp_path / "scan.nii.gz", nifti(affine=oblique((19.0, 19.5, 18.0))))
    text = rf"{path}: its 17 × 24 × 21 voxels \(323 × 468 × 378 mm\)"
    with pytest.raises(VolumeError, match=text), unwrapped_errors():
        preprocessing(spec)({"image": str(path)})
    grid = network_grid_shape(spec, read_header(path))
    assert np.prod(grid) > 2**27


def test_the_warning_reaches_the_case(tmp_path: Path) -> None:
    """Through the preprocessing, as all callers use it."""
    image = nib.Nifti1Image(smooth((60, 12, 14)), oblique((17.0, 3.0, 3.0)))
    image.header.set_qform(image.affine, code=1)
    image.header.set_sform(image.affine, code=1)
    case: Any = preprocessing(parse_spec())({"image": str(save(tmp_path / "a.nii", image))})
    (line,) = warnings_of(case["image"].meta)
    assert line.startswith("the field of view is 1020 × 36 × 42 mm")
