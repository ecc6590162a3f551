"""Normalisations that single voxels do not change, and those of channels that differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import ScaleIntensityRangePercentiles
from phantom import nifti, parse_spec, smooth

from pipeline.config import Intensity
from pipeline.errors import ConfigError
from pipeline.transforms import preprocessing
from pipeline.transforms.intensity import (
    ScalePercentilesOnGpud,
    fixed_zscore,
    robust_zscore,
)
from pipeline.types import Array

ROBUST: dict[str, Any] = {"method": "robust_zscore", "lower": 0.1, "upper": 99.9}
OUTLIERS = [1e6, -32768.0, 30.0]


def normalised(*arrays: Array, **changes: Any) -> Array:
    """Return the preprocessed channels, on the file's own grid."""
    spec: Any = parse_spec(spacing=[None] * 3, **changes)
    image = preprocessing(spec)({"image": [nifti(array) for array in arrays]})["image"]
    return np.asarray(image)


@pytest.mark.parametrize("outlier", OUTLIERS)
@pytest.mark.parametrize("nonzero", [False, True])
def test_one_voxel_changes_nothing_else(outlier: float, nonzero: bool) -> None:
    """A spike leaves the other voxels about as they were; a plain z-score is ruined by it."""
    image = smooth()
    image[:4] = 0
    spiked = image.copy()
    spiked[9, 9, 9] = outlier
    before, after = (
        normalised(array, intensity=ROBUST | {"nonzero": nonzero}) for array in (image, spiked)
    )
    others = np.ones(image.shape, dtype=bool)
    others[9, 9, 9] = False
    assert np.abs(before - after)[0][others].max() < 0.1
    if abs(outlier) > 1000:
        plain = [
            normalised(array, intensity={"method": "zscore", "nonzero": nonzero})
            for array in (image, spiked)
        ]
        assert np.abs(plain[0] - plain[1])[0][others].max() > 1


@pytest.mark.parametrize("nonzero", [False, True])
def test_the_robust_zscore_is_of_the_clipped_mask(nonzero: bool) -> None:
    """Against NumPy: mean 0 and deviation 1 of what counts; zeros that do not count stay 0."""
    arrays = [smooth(seed=1), 1000 + 50 * smooth(seed=2)]
    arrays[0][:6] = 0
    arrays[1][:, :3] = 0  # each channel has its own zeros
    found = normalised(*arrays, channels=["a", "b"], intensity=ROBUST | {"nonzero": nonzero})
    for channel, array in zip(found, arrays, strict=True):
        counted = array != 0 if nonzero else np.ones_like(array, dtype=bool)
        values = array[counted].astype(np.float64)
        values = values.clip(*np.percentile(values, [0.1, 99.9]))
        expected = (values - values.mean()) / values.std()
        np.testing.assert_allclose(channel[counted], expected, atol=1e-4)
        assert (channel[~counted] == 0).all()


def test_constant_and_empty_channels_become_0() -> None:
    intensity = Intensity(method="robust_zscore", nonzero=True)
    for value in (0.0, 5.0):
        scaled = robust_zscore(np.full((4, 5, 6), value, dtype=np.float32), intensity)
        assert (scaled == 0).all()


def test_ct_has_one_scale_for_all_volumes() -> None:
    """The values of one volume do not change those of another."""
    intensity = {"method": "fixed", "clip": [-100, 300], "mean": 40, "std": 80}
    image = smooth()
    brighter = image.copy()
    brighter[:3] += 5000
    first, second = (normalised(array, intensity=intensity)[0] for array in (image, brighter))
    np.testing.assert_array_equal(first[3:], second[3:])
    np.testing.assert_allclose(first, (image.clip(-100, 300) - 40) / 80, atol=1e-5)
    assert second.max() == pytest.approx((300 - 40) / 80)


def test_channels_that_differ() -> None:
    """CT by its fixed scale, the named channel by its own method, the others by `intensity`."""
    ct, t1, flair = smooth(seed=1) - 50, smooth(seed=2), 7 * smooth(seed=3)
    found = normalised(
        ct,
        t1,
        flair,
        channels=["CT", "T1w", "FLAIR"],
        intensity=ROBUST,
        channel_intensity={
            "CT": {"method": "fixed", "clip": [-20, 60], "mean": 10, "std": 30},
            "FLAIR": {"method": "percentiles", "lower": 1, "upper": 99},
        },
    )
    np.testing.assert_allclose(found[0], (ct.clip(-20, 60) - 10) / 30, atol=1e-5)
    np.testing.assert_allclose(found[1], normalised(t1, intensity=ROBUST)[0], atol=1e-5)
    assert (found[2].min(), found[2].max()) == pytest.approx((0, 1))


def test_one_entry_per_channel_is_the_same_as_one_for_all() -> None:
    """Whatever the method is."""
    arrays = [smooth(seed=1), 3 * smooth(seed=2)]
    for method in ("zscore", "robust_zscore", "percentiles"):
        intensity = {"method": method}
        all_at_once = normalised(*arrays, channels=["a", "b"], intensity=intensity)
        one_by_one = normalised(
            *arrays, channels=["a", "b"], channel_intensity={"a": intensity, "b": intensity}
        )
        np.testing.assert_allclose(all_at_once, one_by_one, atol=1e-5)


def test_metadata_stays() -> None:
    spec: Any = parse_spec(intensity=ROBUST)
    image = preprocessing(spec)({"image": nifti()})["image"]
    assert isinstance(image, MetaTensor)
    assert image.dtype == torch.float32
    assert image.meta["sources"]


@pytest.mark.parametrize(
    ("intensity", "message"),
    [
        ({"method": "fixed"}, "clip, mean and std with the method fixed"),
        ({"method": "zscore", "mean": 3.0}, "clip, mean and std with the method fixed"),
        ({"method": "fixed", "clip": [5, 5], "mean": 1, "std": 1}, "an increasing clip"),
        ({"method": "fixed", "clip": [1, 5], "mean": 1, "std": 0}, "a std above 0"),
        ({"method": "robust_zscore", "lower": 70, "upper": 60}, "0 ≤ lower < upper ≤ 100"),
    ],
)
def test_what_cannot_be_is_refused(intensity: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec(intensity=intensity)


def test_a_normalisation_of_an_unknown_channel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"channel_intensity: expected names of channels, got T2"):
        parse_spec(channel_intensity={"T2": {"method": "zscore"}})


def test_fixed_values_are_required() -> None:
    with pytest.raises(ConfigError, match="expected clip, mean and std"):
        fixed_zscore(torch.zeros(1, 2, 3, 4), Intensity())


def test_percentiles_on_a_gpu_are_monais() -> None:
    """The transform itself runs anywhere; a constant channel becomes 0."""
    image = torch.randn(3, 11, 9, 14, generator=torch.Generator().manual_seed(2)) * 40 + 100
    image[2] = 7.0
    ours = ScalePercentilesOnGpud("image", 0.5, 99.5)({"image": image})["image"]
    scale = ScaleIntensityRangePercentiles(0.5, 99.5, 0.0, 1.0, clip=True, channel_wise=True)
    theirs = torch.as_tensor(scale(image[:2]))
    torch.testing.assert_close(ours[:2], theirs, atol=1e-5, rtol=0)
    assert float(ours[2].abs().max()) == 0
    assert float(ours[:2].min()) == 0 and float(ours[:2].max()) == 1
