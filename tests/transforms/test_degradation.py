"""Degradations of scans: they follow from a number, keep labels in place, and do what they say."""

from __future__ import annotations

import numpy as np
import pytest
from nibabel.affines import apply_affine
from phantom import oblique
from scipy import ndimage

from pipeline.transforms.degradation import Degradation, degrade, draw_degradation

SHAPE = (33, 40, 27)


@pytest.fixture(scope="module")
def scan() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A bright ellipsoid with a darker core, its labels, and an oblique affine."""
    axes = [np.linspace(-1.4, 1.4, n) for n in SHAPE]
    radius = np.sqrt(sum(np.square(part) for part in np.ix_(*axes)))
    labels = (radius < 1).astype(np.uint16) + 2 * (radius < 0.5).astype(np.uint16)
    return (100.0 * (labels == 1) + 40.0 * (labels == 3)).astype(np.float32), labels, oblique()


def test_a_number_gives_one_degradation() -> None:
    """The same number gives the same one; over many, every kind occurs, and some scans stay."""
    drawn = [draw_degradation(seed) for seed in range(300)]
    assert drawn[:20] == [draw_degradation(seed) for seed in range(20)]
    for kind in ("noise", "motion", "bias", "slices", "crop", "ringing", "spikes", "lesions"):
        used = [getattr(one, kind) for one in drawn if getattr(one, kind)]
        assert 0 < len(used) < 200
        assert len(set(used)) > 3
    intact = [one for one in drawn if one == Degradation(seed=one.seed)]
    assert 15 < len(intact) < 90


@pytest.mark.parametrize(
    "changes",
    [
        {"noise": 0.1},
        {"motion": 5.0},
        {"bias": 0.4},
        {"slices": 4, "slices_axis": 1},
        {"crop": 0.3, "crop_face": 3},
        {"ringing": 0.6},
        {"spikes": 1.0},
        {"lesions": 4, "lesion_mm": 5.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_each_kind_changes_the_scan_and_repeats(
    changes: dict[str, float], scan: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    image, labels, affine = scan
    before = image.copy()
    degradation = Degradation(seed=5, **changes)  # type: ignore[arg-type]
    first = degrade(image, labels, affine, degradation)
    again = degrade(image, labels, affine, degradation)
    assert np.array_equal(image, before)
    changed, kept, grid = first
    assert np.array_equal(changed, again[0])
    assert np.array_equal(kept, again[1])
    assert np.array_equal(grid, again[2])
    assert changed.shape == kept.shape
    assert changed.dtype == np.float32
    assert np.isfinite(changed).all()
    assert changed.min() >= 0
    assert set(np.unique(kept)) <= {0, 1, 3}
    if changed.shape == image.shape:
        assert np.array_equal(kept, labels)
        assert np.array_equal(grid, affine)
        assert np.abs(changed - image).max() > 0.5
        # the head is still there: not another picture
        assert np.corrcoef(changed.ravel(), image.ravel())[0, 1] > 0.5


@pytest.mark.parametrize("count", [3, 4])
def test_thick_slices_keep_places(
    count: int, scan: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """The centre of the object in the world stays where it was, within a third of a slice."""
    image, labels, affine = scan
    thick, kept, grid = degrade(image, labels, affine, Degradation(slices=count, slices_axis=2))
    assert thick.shape == (33, 40, 27 // count)
    assert np.linalg.norm(grid[:3, 2]) == pytest.approx(count * np.linalg.norm(affine[:3, 2]))
    before = apply_affine(affine, ndimage.center_of_mass(image))
    after = apply_affine(grid, ndimage.center_of_mass(thick))
    tolerance = 0.1 * count * float(np.linalg.norm(affine[:3, 2]))
    assert np.linalg.norm(after - before) < tolerance
    same = apply_affine(grid, ndimage.center_of_mass(kept))
    assert np.linalg.norm(same - before) < 4 * tolerance


@pytest.mark.parametrize("face", range(6))
def test_a_crop_is_a_part_of_the_scan(
    face: int, scan: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    image, labels, affine = scan
    cropped, kept, grid = degrade(image, labels, affine, Degradation(crop=0.4, crop_face=face))
    start = np.rint(apply_affine(np.linalg.inv(affine), grid[:3, 3])).astype(int)
    box = tuple(slice(a, a + n) for a, n in zip(start, cropped.shape, strict=True))
    assert np.array_equal(cropped, image[box])
    assert np.array_equal(kept, labels[box])
    assert 0.3 < 1 - (kept > 0).sum() / (labels > 0).sum() < 0.5


def test_what_is_empty_stays_so() -> None:
    """Without any label there is nothing to put a lesion in, and nothing to crop."""
    image, labels = np.ones((9, 8, 7), dtype=np.float32), np.zeros((9, 8, 7), dtype=np.uint8)
    every = Degradation(lesions=3, lesion_mm=4, crop=0.3, slices=5, slices_axis=2)
    changed, kept, _ = degrade(image, labels, np.eye(4), every)
    assert changed.shape == kept.shape == (9, 8, 7)  # 7 voxels are not two slices of 5
    assert np.array_equal(changed, image)


def test_motion_leaves_the_picture_where_its_labels_are() -> None:
    """The place at which edges before and after correlate best is the same place, on average."""
    shape, spacing = (54, 60, 47), np.array([1.3, 1.0, 1.6])
    texture = np.random.default_rng(3).normal(size=shape)
    window = np.ones(shape)
    for axis, size in enumerate(shape):
        window *= np.hanning(size).reshape([-1 if n == axis else 1 for n in range(3)])
    image = (100 + 900 * window * ndimage.gaussian_filter(texture, 2.0)).astype(np.float32)
    labels = np.ones(shape, np.uint16)
    edges = np.fft.fftn(ndimage.gaussian_laplace(image, 1.0))
    distances = []
    for seed in range(12):
        degradation = Degradation(motion=6.0, seed=seed)
        moved, _, _ = degrade(image, labels, np.diag([*spacing, 1.0]), degradation)
        product = edges.conj() * np.fft.fftn(ndimage.gaussian_laplace(moved, 1.0))
        peak = np.unravel_index(np.fft.ifftn(product).real.argmax(), shape)
        offset = (np.array(peak) + np.array(shape) // 2) % shape - np.array(shape) // 2
        distances.append(float(np.linalg.norm(offset * spacing)))
    # most edges lie in one place; where two places hold about as many, either may correlate best
    assert np.median(distances) < 1
    assert np.mean(distances) < 2.5
