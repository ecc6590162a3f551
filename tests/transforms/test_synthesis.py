"""Images synthesised from label maps, whose content is therefore known."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.layers import gaussian_1d
from phantom import parse_spec, save
from scipy import ndimage, special

from pipeline.config.parser import parse_config
from pipeline.config.run import Synthesis
from pipeline.errors import ConfigError, GeometryError, VolumeError, unwrapped_errors
from pipeline.transforms.synthesis import (
    FWHM,
    KERNEL_REACH,
    T1_KNOTS,
    RandSynthesized,
    discrete_gaussian,
    gaussian_smooth,
    synthesis_transform,
)
from pipeline.transforms.tissue_classes import TissueTable, read_tissue_table
from pipeline.types import Array

LABELS = {"background": 0, "left box": 2, "right box": 41, "middle": 16, "fluid": 24}
COLUMNS = (
    "value,freesurfer_value,name,target_value,intensity_class,t1_mean,t1_mean_sd,t1_sd,t1_sd_sd"
)
ROWS = [
    "0,0,background,0,0,0,0,0,0",
    "24,24,fluid,0,1,45,0,0,0",
    "16,16,middle,16,2,130,0,0,0",
    "202,502,skull,0,3,220,0,0,0",
    "2,2,left box,2,4,160,0,0,0",
    "25,25,left lesion,2,5,110,0,0,0",
    "41,41,right box,41,6,165,0,0,0",
    "57,57,right lesion,41,7,115,0,0,0",
]
STILL: dict[str, Any] = {
    "rotation": 0.0, "scaling": 0.0, "shear": 0.0, "shift": 0.0, "elastic": 0.0,
    "t1_chance": 1.0, "sequence_chance": 0.0,
    "resolution_chance": 0.0, "slices_chance": 0.0, "noise": 0.0, "bias": 0.0, "gamma": 0.0,
    "cut_chance": 0.0,
    "strip_chance": 0.0,
}  # fmt: skip
SPACING = (2.0, 1.5, 2.5)
ROI = (16, 24, 12)


def head() -> Array:
    """A skull, fluid, and in it a middle and two different boxes with lesions; 1 mm, RAS."""
    array = np.zeros((34, 41, 29), dtype=np.uint8)
    array[2:-2, 2:-2, 2:-2] = 202
    array[5:-5, 5:-5, 5:-5] = 24
    array[7:16, 8:33, 8:21] = 2
    array[9:12, 12:20, 10:16] = 25
    array[18:27, 12:30, 9:18] = 41
    array[20:24, 15:20, 10:14] = 57
    array[16:18, 14:28, 8:20] = 16
    return array


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "labels.csv"
    path.write_text("\n".join([COLUMNS, *ROWS]) + "\n")
    return path


@pytest.fixture(scope="module", params=["RAS", "LIA", "PSR"])
def map_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same head, stored in several orders and directions of axes."""
    image = nib.Nifti1Image(head(), np.diag([1.0, 1.0, 1.0, 1.0]))
    now, then = nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(request.param)
    return save(
        tmp_path_factory.mktemp("maps") / "head.nii.gz",
        image.as_reoriented(nib.orientations.ornt_transform(now, then)),
    )


def options(table: Path, **changes: Any) -> Synthesis:
    return parse_config(Synthesis, {"table": str(table)} | STILL | changes, "run.synthesis")


def spec(**changes: Any) -> Any:
    content = {
        "labels": LABELS,
        "spacing": list(SPACING),
        "roi_size": list(ROI),
        "intensity": {"method": "zscore"},
    }
    return parse_spec(3, **(content | changes))


def draw(map_file: Path, drawn: Synthesis, seed: int = 0, **changes: Any) -> tuple[Array, Array]:
    """The image and the channel numbers that a seed gives."""
    transform = synthesis_transform(spec(**changes), drawn).set_random_state(seed)
    case = transform({"case": "head", "label": str(map_file)})
    assert set(case) == {"case", "image", "label"}
    assert case["image"].dtype == case["label"].dtype == torch.float32
    return case["image"][0].numpy(), case["label"][0].numpy()


def likeness(a: Array, b: Array) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def sides(channels: Array) -> tuple[float, float]:
    """The mean place, from left to right, of the left and of the right structure."""
    return float(np.argwhere(channels == 1)[:, 0].mean()), float(
        np.argwhere(channels == 2)[:, 0].mean()
    )


@pytest.mark.parametrize("orientation", ["RAS", "SPL", "ARI"])
def test_with_a_neck_structures_lie_above_the_images_centre(
    map_file: Path, table: Path, orientation: str
) -> None:
    """Structures move up in any orientation, and in no other direction."""
    axis = next(i for i, code in enumerate(orientation) if code in "SI")
    sizes: dict[str, Any] = {
        "orientation": orientation,
        "roi_size": [24, 24, 24],
        "spacing": [2.5, 2.5, 2.5],
    }
    still = np.argwhere(draw(map_file, options(table), **sizes)[1] > 0).mean(axis=0)
    heights = []
    for seed in range(8):
        there = np.argwhere(
            draw(map_file, options(table, neck_chance=1.0, neck=15.0), seed, **sizes)[1] > 0
        ).mean(axis=0)
        up = (there - still) * (1 if orientation[axis] == "S" else -1)
        heights.append(up[axis] * 2.5)
        assert np.abs(np.delete(up, axis)).max() < 1.0
    assert min(heights) > -1.5
    assert 8 < max(heights) < 16.5
    assert np.std(heights) > 2


def test_without_deformation_labels_are_the_map_on_the_networks_grid(
    map_file: Path, table: Path
) -> None:
    """As scipy resamples it; half of the draws are mirrored, with left and right swapped."""
    array = head()
    channel = {2: 1, 25: 1, 41: 2, 57: 2, 16: 3, 24: 4}
    structures = np.vectorize(lambda v: channel.get(v, 0))(array)
    middle = np.argwhere(structures > 0).mean(axis=0)
    grid = np.meshgrid(
        *[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(ROI, SPACING, strict=True)],
        indexing="ij",
    )
    places = np.stack([axis + m for axis, m in zip(grid, middle, strict=True)])
    mirrored = places.copy()
    mirrored[0] = 2 * middle[0] - places[0]
    plain, other = (
        ndimage.map_coordinates(structures, p, order=0, mode="constant") for p in (places, mirrored)
    )
    other = np.select([other == 1, other == 2], [2, 1], other)
    seen = set()
    for seed in range(8):
        _, found = draw(map_file, options(table), seed)
        agreement = [float((found == expected).mean()) for expected in (plain, other)]
        assert max(agreement) > 0.97  # scipy rounds half voxels the other way
        assert min(agreement) < 0.97
        seen.add(int(np.argmax(agreement)))
    assert seen == {0, 1}


def test_left_stays_left(map_file: Path, table: Path) -> None:
    """Under every deformation, and in mirrored images."""
    moving = options(table, rotation=20.0, scaling=0.2, shear=0.05, shift=4.0, elastic=2.0)
    for seed in range(12):
        left, right = sides(draw(map_file, moving, seed)[1])
        assert left < right
    flipped = [sides(draw(map_file, moving, seed, orientation="LPS")[1]) for seed in range(6)]
    assert all(left > right for left, right in flipped)


def test_intensities_are_those_of_the_tissue(map_file: Path, table: Path) -> None:
    """In T1 without noise, classes have the order of the table, equal on both sides."""
    image, channels = draw(
        map_file, options(table, texture=1.0), 0, spacing=[1.0, 1.0, 1.0], roi_size=[32, 40, 28]
    )
    inner = {c: ndimage.binary_erosion(channels == c, iterations=2) for c in (1, 2, 4)}
    fluid, left, right = (float(np.median(image[inner[c]])) for c in (4, 1, 2))
    assert left == pytest.approx(right, abs=0.02)
    assert fluid < left - 0.5
    assert image[channels == 1].std() > 0.05  # the lesion looks different, and belongs to it


def test_a_function_of_t1_keeps_tissues_alike_and_independent_ones_do_not(table: Path) -> None:
    tissues = read_tissue_table(table, LABELS)
    alike = replace(
        tissues, t1=np.array([[mean, 0.0, 0.0, 0.0] for mean in (0, 100, 100.5, 101, 160, 161)])
    )
    gaps = {}
    for name, chance in {"sequence": 1.0, "independent": 0.0}.items():
        drawn = RandSynthesized(
            alike, ROI, SPACING, options(table, t1_chance=0.0, sequence_chance=chance)
        )
        drawn.set_random_state(1)
        means = np.array([drawn._draw_contrast()[0] for _ in range(50)])
        gaps[name] = float(np.abs(np.diff(means[:, 1:4], axis=1)).mean())
        assert np.abs(np.diff(means[:, [2, 4]], axis=1)).mean() > 30
        assert means.min() >= 0
        assert means.max() <= 255
    assert gaps["sequence"] < 10 < 50 < gaps["independent"]
    assert list(T1_KNOTS) == sorted(T1_KNOTS)


def test_draws_differ_and_a_seed_repeats_them(map_file: Path, table: Path) -> None:
    free = parse_config(Synthesis, {"table": str(table), "shift": 3.0}, "run.synthesis")
    first, again, other = (draw(map_file, free, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    images = [draw(map_file, free, seed)[0] for seed in range(12)]
    assert all(np.isfinite(image).all() and image.std() > 0.1 for image in images)


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), SPACING])
def test_a_voxel_mixes_the_tissues_that_it_holds(
    table: Path, tmp_path: Path, spacing: tuple[float, float, float]
) -> None:
    """The image is closer to scipy's blur of a fine map than one sample per voxel is."""
    path = save(tmp_path / "head.nii.gz", nib.Nifti1Image(head(), np.eye(4)))
    grey = dict(
        zip((0, 24, 16, 202, 2, 25, 41, 57), (0, 45, 130, 220, 160, 110, 160, 110), strict=True)
    )
    painted = np.vectorize(grey.get)(head()).astype(np.float64)
    middle = np.argwhere(np.isin(head(), (2, 25, 41, 57, 16, 24))).mean(axis=0)
    grid = np.meshgrid(
        *[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(ROI, spacing, strict=True)],
        indexing="ij",
    )
    places = np.stack([axis + m + 20 for axis, m in zip(grid, middle, strict=True)])
    fine, one_sample = (
        ndimage.gaussian_filter(ndimage.map_coordinates(field, places, order=order), width)
        for field, order, width in (
            (ndimage.gaussian_filter(np.pad(painted, 20), np.array(spacing) / FWHM), 1, 0),
            (np.pad(painted, 20), 0, 1 / FWHM),
        )
    )
    drawn = []
    for seed in range(6):
        image, _ = draw(path, options(table), seed, spacing=list(spacing))
        drawn.append(
            max(likeness(side, fine) for side in (image, image[::-1]))
        )  # half of the draws are mirrored
    assert 1 - np.mean(drawn) < (1 - likeness(one_sample, fine)) / 2


@pytest.mark.parametrize("seed", range(4))
def test_a_skull_stripped_image_is_dark_outside_structures(
    seed: int, map_file: Path, table: Path
) -> None:
    """Half of the draws lose the fluid, in image and labels; borders are soft."""
    image, channels = draw(map_file, options(table, strip_chance=1.0, noise=0.1, bias=0.3), seed)
    inside = channels > 0
    around = ndimage.binary_dilation(inside, np.ones((3, 3, 3)))
    outside = image[~around]
    assert np.ptp(outside) == 0
    assert (image[inside] > outside[0]).mean() > 0.95
    border = image[around & ~inside]
    assert 0.05 < (border > outside[0]).mean() < 0.95
    assert border.mean() < image[inside & ~ndimage.binary_erosion(inside)].mean()
    lost = {4 in draw(map_file, options(table, strip_chance=1.0), s)[1] for s in range(8)}
    assert lost == {True, False}


def test_a_cut_field_of_view_loses_labels(map_file: Path, table: Path) -> None:
    whole, part = (
        [draw(map_file, options(table, cut_chance=c, cut=0.5), seed)[1] for seed in range(8)]
        for c in (0.0, 1.0)
    )
    assert np.mean([(channels > 0).sum() for channels in part]) < 0.9 * np.mean(
        [(channels > 0).sum() for channels in whole]
    )


def test_thick_slices_are_smooth_along_one_axis(map_file: Path, table: Path) -> None:
    """Differences along the slices' axis are smaller than without thick slices."""
    thin, thick = (
        [
            draw(
                map_file,
                options(table, slices_chance=c, slices_mm=[8.0, 8.0]),
                s,
                spacing=[1.0] * 3,
                roi_size=[32, 40, 28],
            )[0]
            for s in range(6)
        ]
        for c in (0.0, 1.0)
    )
    for before, after in zip(thin, thick, strict=True):
        ratio = [
            np.abs(np.diff(after, axis=axis)).mean() / np.abs(np.diff(before, axis=axis)).mean()
            for axis in range(3)
        ]
        assert min(ratio) < 0.5


def test_noise_and_bias_change_the_image(map_file: Path, table: Path) -> None:
    plain, _ = draw(map_file, options(table))
    noisy, channels = draw(map_file, options(table, noise=0.3))
    uneven, _ = draw(map_file, options(table, bias=0.8))
    inside = ndimage.binary_erosion(channels == 4)
    assert noisy[inside].std() > 2 * plain[inside].std()
    assert np.corrcoef(plain.ravel(), uneven.ravel())[0, 1] < 0.99


@pytest.mark.parametrize("sigma", [(0.5, 1.2, 0.8), (2.0, 0.34, 1.0)])
def test_the_blur_is_a_gaussian(sigma: tuple[float, float, float]) -> None:
    volume = np.random.default_rng(0).normal(size=(11, 17, 14)).astype(np.float32)
    expected = volume.astype(np.float64)
    for axis, s in enumerate(sigma):
        kernel = special.ive(
            np.arange(-9, 10), s**2
        )  # the discrete Gaussian, whose variance is that of the continuous one
        expected = ndimage.convolve1d(expected, kernel, axis=axis, mode="nearest")
    np.testing.assert_allclose(
        gaussian_smooth(torch.from_numpy(volume), sigma).numpy(), expected, atol=0.01
    )
    point = np.zeros((31, 33, 35), dtype=np.float32)
    point[15, 16, 17] = 1
    found = gaussian_smooth(torch.from_numpy(point), sigma).numpy()
    for axis, s in enumerate(sigma):
        along = found.sum(axis=tuple(i for i in range(3) if i != axis))
        place = np.arange(len(along)) - (15, 16, 17)[axis]
        assert (along * place**2).sum() == pytest.approx(
            s**2, rel=0.02 if s > 0.4 else 0.2
        )  # the narrowest has three numbers


def test_the_table_has_structures_classes_and_sides(table: Path) -> None:
    found: TissueTable = read_tissue_table(table, LABELS)
    assert found.channels.tolist() == [
        0,
        4,
        3,
        0,
        1,
        1,
        2,
        2,
    ]  # 24 has no target, and is segmented by its own value
    assert found.mirror.tolist() == [0, 1, 2, 3, 6, 7, 4, 5]
    assert found.classes[4] == found.classes[6] != found.classes[5] == found.classes[7]
    assert len(found.t1) == len(set(found.classes.tolist())) == 6


def test_the_table_of_the_real_maps(data: Path) -> None:
    """Every pair is found, sides share their class, and every target is a structure."""
    path = data / "head_label_maps" / "labels.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    labels = {"background": 0} | {
        f"structure {row['target_value']}": int(row["target_value"]) for row in rows
    }
    labels = {name: value for name, value in labels.items() if value or name == "background"} | {
        "fluid": 24
    }
    found = read_tissue_table(path, labels)
    assert len(labels) == 33
    assert set(found.channels.tolist()) == set(range(33))
    sided = [i for i, row in enumerate(rows) if row["name"].startswith(("left ", "right "))]
    assert all(found.mirror[found.mirror[i]] == i != found.mirror[i] for i in sided)
    assert all(found.classes[found.mirror[i]] == found.classes[i] for i in sided)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("value,name\n1,x\n", "intensity_class"),
        ("\n".join([COLUMNS, ROWS[0], ROWS[0]]), "every value once"),
        ("\n".join([COLUMNS, "a,0,b,0,0,0,0,0,0"]), "expected numbers"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(
    content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "labels.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_tissue_table(path, LABELS)


def test_maps_and_specs_that_do_not_fit_are_refused(table: Path, tmp_path: Path) -> None:
    strange = save(tmp_path / "a.nii.gz", nib.Nifti1Image(head() + np.uint8(1), np.eye(4)))
    with pytest.raises(RuntimeError) as caught:
        draw(strange, options(table))
    assert isinstance(caught.value.__cause__, VolumeError)
    assert "not in the table" in str(caught.value.__cause__)
    for changes in ({"spacing": [None, 1.0, 1.0]}, {"channels": ["T1w", "T2w"]}):
        with pytest.raises(ConfigError, match=r"run\.synthesis"):
            synthesis_transform(spec(**changes), options(table))
    for wrong in (
        {"t1_chance": 0.8, "sequence_chance": 0.3},
        {"slices_mm": [5.0, 2.0]},
        {"cut": 1.5},
        {"bias_every": 0.0},
    ):
        with pytest.raises(ConfigError, match=r"run\.synthesis"):
            options(table, **wrong)


def test_a_magnification_moves_positions_away_from_a_point_one_to_one(table: Path) -> None:
    """Distances from the point are scaled by one factor each, which stays above 0."""
    drawn = RandSynthesized(
        read_tissue_table(table, LABELS),
        ROI,
        SPACING,
        options(table, magnification=0.9, magnified_mm=[6.0, 9.0], magnified_within=5.0),
    )
    centre, spacing = np.array([20.0, 18.0, 12.0]), np.array([1.0, 0.8, 1.3])
    axes = [torch.arange(n, dtype=torch.float32) for n in (41, 37, 25)]
    for seed in range(6):
        drawn.set_random_state(seed)
        before = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        after = before.clone()
        drawn._magnify(after, centre, spacing)
        moved = (after - before).numpy()
        assert 0.1 < np.abs(moved).max() < 10
        for axis in range(3):  # no two voxels of a row change places
            assert np.diff(after[axis].numpy(), axis=axis).min() > 0
        random = np.random.RandomState(seed)
        point = centre + random.uniform(-1, 1, 3) * 5 / spacing
        reach, strength = random.uniform(6, 9), random.uniform(-1, 1) * 0.9
        offset = before.numpy() - point.reshape(3, 1, 1, 1)
        distance = np.linalg.norm(offset * spacing.reshape(3, 1, 1, 1), axis=0)
        np.testing.assert_allclose(
            moved, -strength * np.exp(-((distance / reach) ** 2) / 2) * offset, atol=1e-4
        )


def test_magnified_structures_have_other_volumes(map_file: Path, table: Path) -> None:
    """They become larger and smaller, and left stays left."""
    magnified = options(
        table, magnifications=2, magnification=0.5, magnified_mm=[4.0, 8.0], magnified_within=8.0
    )
    still = draw(map_file, options(table))[1]
    drawn = [draw(map_file, magnified, seed)[1] for seed in range(8)]
    ratios = [float((channels > 0).sum() / (still > 0).sum()) for channels in drawn]
    assert min(ratios) < 0.97
    assert max(ratios) > 1.03
    assert all(left < right for left, right in map(sides, drawn))


def test_a_fine_displacement_changes_borders_and_hardly_moves_centres(
    map_file: Path, table: Path
) -> None:
    still, moved = (
        draw(map_file, options(table, fine_elastic=sigma, fine_elastic_every=6.0), 2)[1]
        for sigma in (0.0, 3.0)
    )
    assert 0.005 < (still != moved).mean() < 0.2
    np.testing.assert_allclose(sides(still), sides(moved), atol=1.0)


def test_lesions_lie_in_their_tissue_and_change_no_label(map_file: Path, table: Path) -> None:
    """At most the given share of it becomes a lesion, of its own intensity."""
    fine: dict[str, Any] = {"spacing": [1.0, 1.0, 1.0], "roi_size": [32, 40, 28]}
    lesions: dict[str, Any] = {"lesions": {2: 25, 41: 57}, "lesion_mm": [4.0, 6.0]}
    shares = []
    for seed in range(6):
        image, channels = draw(
            map_file,
            options(table, texture=1.0, lesion_chance=1.0, lesion_share=0.5, **lesions),
            seed,
            **fine,
        )
        never = draw(
            map_file, options(table, texture=1.0, lesion_chance=0.0, **lesions), seed, **fine
        )
        np.testing.assert_array_equal(channels, never[1])
        inner = ndimage.binary_erosion((channels == 1) | (channels == 2), iterations=2)
        healthy = np.median(never[0][inner])
        before, after = (
            float((np.abs(each[inner] - healthy) > 0.4).mean()) for each in (never[0], image)
        )
        shares.append(after - before)
    assert 0.2 < max(shares) < 0.5
    assert -0.02 < min(shares) < 0.1


def test_lesions_need_rows_of_the_table(table: Path) -> None:
    with pytest.raises(ConfigError, match=r"lesions.*got 99"):
        synthesis_transform(spec(), options(table, lesions={2: 99}))


def test_the_discrete_gaussian_is_that_of_monai() -> None:
    for sigma in (0.1, 0.374, 0.376, 0.9, 2.3, 4.99):
        theirs = gaussian_1d(
            torch.tensor(sigma), truncated=KERNEL_REACH, approx="scalespace", normalize=True
        )
        np.testing.assert_allclose(discrete_gaussian(sigma), theirs.numpy(), atol=1e-6)


def with_scan(map_file: Path, array: Array, folder: Path) -> dict[str, Any]:
    """A case with a scan on the grid of its label map, `array` in the order of axes of RAS."""
    label_map = nib.load(map_file)
    scan = nib.Nifti1Image(array.astype(np.float32), np.eye(4)).as_reoriented(
        nib.orientations.ornt_transform(
            nib.io_orientation(np.eye(4)), nib.io_orientation(label_map.affine)
        )
    )
    save(folder / "scan.nii.gz", nib.Nifti1Image(scan.dataobj, label_map.affine))
    return {"case": "head", "label": str(map_file), "image": str(folder / "scan.nii.gz")}


@pytest.mark.parametrize("seed", range(6))
def test_a_scan_is_deformed_with_its_labels(
    map_file: Path, table: Path, tmp_path: Path, seed: int
) -> None:
    """The scan is bright in the left box alone; in a mirror image that is the right box."""
    case = with_scan(map_file, np.where(head() == 2, 200.0, 20.0), tmp_path)
    drawn = options(table, rotation=20.0, scaling=0.2, elastic=3.0, shift=4.0, scan_chance=1.0)
    found = synthesis_transform(spec(spacing=[1.0] * 3), drawn).set_random_state(seed)(case)
    image, channels = found["image"][0].numpy(), found["label"][0].numpy()
    means = [image[ndimage.binary_erosion(channels == n)].mean() for n in (1, 2)]
    bright = 1 + int(np.argmax(means))
    assert abs(means[0] - means[1]) > 1.5
    assert sides(channels)[0] < sides(channels)[1]
    inside, outside = channels == bright, ndimage.binary_dilation(channels == bright, iterations=3)
    assert image[inside].mean() > image[~outside].max() + 1


def test_a_scan_is_interpolated_linearly(map_file: Path, table: Path, tmp_path: Path) -> None:
    """A ramp stays a ramp: its steps per mm are those of the scan, whatever the orientation."""
    x, y, z = np.indices(head().shape)
    case = with_scan(map_file, np.asarray(50 + x + 2 * y + 3 * z), tmp_path)
    transform = synthesis_transform(spec(), options(table, scan_chance=1.0))
    for seed in range(4):
        image = transform.set_random_state(seed)(case)["image"][0].numpy()
        steps = [np.diff(image, axis=axis)[4:-4, 4:-4, 4:-4].mean() for axis in range(3)]
        ratios = np.array(steps) / SPACING
        np.testing.assert_allclose(np.abs(ratios / ratios[1]), [0.5, 1.0, 1.5], rtol=1e-3)
        assert ratios[1] > 0


def test_without_the_chance_the_image_is_drawn(map_file: Path, table: Path, tmp_path: Path) -> None:
    case = with_scan(map_file, np.where(head() == 2, 200.0, 20.0), tmp_path)
    found = synthesis_transform(spec(), options(table, scan_chance=0.0)).set_random_state(1)(case)
    image, channels = found["image"][0], found["label"][0]
    assert image[channels == 0].max() > image[channels == 1].mean()  # the skull


def test_a_scan_on_another_grid_is_refused(map_file: Path, table: Path, tmp_path: Path) -> None:
    label_map = nib.load(map_file)
    affine = label_map.affine.copy()
    affine[:3, 3] += 0.5
    save(tmp_path / "scan.nii.gz", nib.Nifti1Image(np.ones(label_map.shape, np.float32), affine))
    case = {"case": "head", "label": str(map_file), "image": str(tmp_path / "scan.nii.gz")}
    text = r"head: .*grid of its label map.*0\.87 mm apart"
    with pytest.raises(GeometryError, match=text), unwrapped_errors():
        synthesis_transform(spec(), options(table))(case)


@pytest.mark.parametrize(("inset_mm", "seed"), [(0.5, 0), (0.5, 1), (1.0, 2)])
def test_inset_structures_end_before_the_border_of_the_image(
    table: Path, tmp_path: Path, inset_mm: float, seed: int
) -> None:
    """A ball loses a shell of that width to the tissue around it, and nothing on its other side."""
    offset = np.indices((41, 50, 39)) - np.array([20.3, 25.1, 19.8]).reshape(3, 1, 1, 1)
    radius = np.linalg.norm(offset, axis=0)
    array = np.where(offset[2] < 0, 24, 2).astype(np.uint8)  # fluid below, left box above
    array[radius < 10] = 16
    path = save(tmp_path / "ball.nii.gz", nib.Nifti1Image(array, np.eye(4)))
    inset = {"inset": ["middle"], "inset_from": ["left box", "right box"], "inset_mm": inset_mm}
    size = {"spacing": [0.9, 0.8, 1.0], "roi_size": [32, 40, 32]}
    image, before = draw(path, options(table, rotation=20.0), seed, **size)
    same_image, after = draw(path, options(table, rotation=20.0, **inset), seed, **size)
    np.testing.assert_array_equal(image, same_image)
    middle, boxes, fluid = 3, (1, 2), 4
    lost = (before == middle) & (after != middle)
    np.testing.assert_array_equal(before[~lost], after[~lost])
    assert np.isin(after[lost], boxes).all()
    to_fluid = ndimage.distance_transform_edt(before != fluid, sampling=size["spacing"])
    to_boxes = ndimage.distance_transform_edt(~np.isin(before, boxes), sampling=size["spacing"])
    assert to_boxes[lost].max() < inset_mm + 1.5
    assert not lost[(before == middle) & (to_fluid < 2) & (to_boxes > inset_mm + 1.5)].any()
    shell = lost.sum() * 0.72 / (2 * np.pi * 10**2)  # mm, of half a sphere
    assert 0.8 * inset_mm < shell < 1.3 * inset_mm  # the steps of voxels lose a little more


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"inset": ["middle"]}, r"inset_from: .*names of tissues with inset"),
        ({"inset_from": ["middle"]}, r"inset_from: .*and none without"),
        ({"inset": ["middle"], "inset_from": ["x"]}, r"inset_from: .*structures, got x"),
        ({"inset": ["y"], "inset_from": ["middle"]}, r"inset: .*structures, got y"),
        ({"inset_mm": 0.0}, r"inset_mm: .*mm above 0"),
    ],
)
def test_inset_structures_that_cannot_be_are_named(
    table: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        synthesis_transform(spec(), options(table, **changes))
