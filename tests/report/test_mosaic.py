"""Mosaics: sides, places and proportions of what is drawn."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from phantom import reorient, save
from PIL import Image as Picture
from report_batch import BELOW, FRONT, LABELS, LEFT, RADIUS_MM, RIGHT, SHAPE, head

from pipeline.io import label_table
from pipeline.report.mosaic import COLUMNS, WIDTH, Mosaic, Panel, draw_mosaic, encode_mosaic
from pipeline.report.shown_volume import shown_volume
from pipeline.types import Array

TABLE = label_table(LABELS)
COLORS = {label.value: label.color for label in TABLE}


def mosaic_of(folder: Path, axcodes: str = "RAS") -> Mosaic:
    scan, labels = (
        save(folder / f"{name}.nii.gz", reorient(image, axcodes))
        for name, image in zip(("scan", "labels"), head(), strict=True)
    )
    return draw_mosaic(shown_volume(scan, labels), TABLE)


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory: pytest.TempPathFactory) -> Mosaic:
    return mosaic_of(tmp_path_factory.mktemp("head"))


def pixels(mosaic: Mosaic, panel: Panel, value: int) -> Array:
    """(N, 2) row and column, in the panel, of the pixels in a label's colour."""
    part = mosaic.outlines[
        panel.top : panel.top + panel.height, panel.left : panel.left + panel.width
    ]
    found: Array = np.argwhere((part == (*COLORS[value], 255)).all(axis=-1))
    return found


def largest(mosaic: Mosaic, plane: str, value: int) -> tuple[Panel, Array]:
    """The panel of a plane in which most of a label is drawn, and its pixels."""
    panels = [panel for panel in mosaic.panels if panel.plane == plane]
    drawn = [(panel, pixels(mosaic, panel, value)) for panel in panels]
    return max(drawn, key=lambda item: len(item[1]))


def test_three_planes_side_by_side(mosaic: Mosaic) -> None:
    """Panels lie inside the picture and do not overlap."""
    assert [panel.plane for panel in mosaic.panels] == sorted(
        ["axial", "coronal", "sagittal"] * COLUMNS
    )
    used = np.zeros(mosaic.scan.shape, dtype=int)
    for panel in mosaic.panels:
        used[panel.top : panel.top + panel.height, panel.left : panel.left + panel.width] += 1
        assert panel.left + panel.width <= WIDTH
    assert used.max() == 1
    assert mosaic.scan.shape == mosaic.outlines.shape[:2]


@pytest.mark.parametrize("plane", ["axial", "coronal"])
def test_left_is_on_the_right(mosaic: Mosaic, plane: str) -> None:
    """The radiological convention."""
    for value, is_right_half in ((LEFT, True), (RIGHT, False)):
        panel, drawn = largest(mosaic, plane, value)
        assert len(drawn)
        assert ((drawn[:, 1] > panel.width / 2) == is_right_half).all()


def test_front_and_below(mosaic: Mosaic) -> None:
    """Anterior is at the top of axial and at the right of sagittal slices, inferior below."""
    panel, drawn = largest(mosaic, "axial", FRONT)
    assert drawn[:, 0].max() < panel.height / 2
    panel, drawn = largest(mosaic, "sagittal", FRONT)
    assert drawn[:, 1].min() > panel.width / 2
    for plane in ("coronal", "sagittal"):
        panel, drawn = largest(mosaic, plane, BELOW)
        assert drawn[:, 0].mean() > panel.height / 2


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_ball_is_round(mosaic: Mosaic, plane: str) -> None:
    """Voxels of 1.5 × 1.3 × 2.2 mm have their physical proportions."""
    _, drawn = largest(mosaic, plane, FRONT)
    height, width = np.ptp(drawn, axis=0) + 1
    per_mm = width / (2 * RADIUS_MM)
    assert abs(height - width) <= 2.5 * per_mm  # a voxel of the thickest axis


def test_outlines_are_hollow_and_on_the_edge(mosaic: Mosaic) -> None:
    """The middle of a ball is not covered, and the scan is brighter inside the outline."""
    panel, drawn = largest(mosaic, "axial", LEFT)
    row, column = np.rint(drawn.mean(axis=0)).astype(int)
    assert not mosaic.outlines[panel.top + row, panel.left + column].any()
    inside = mosaic.scan[panel.top + row, panel.left + column]
    right_of_it = mosaic.scan[panel.top + row, panel.left + drawn[:, 1].max() + 6]
    assert int(inside) > int(right_of_it) + 30


@pytest.mark.parametrize("axcodes", ["LPS", "PIR", "SRA", "ILP"])
def test_the_orientation_of_the_file_does_not_matter(
    mosaic: Mosaic, axcodes: str, tmp_path: Path
) -> None:
    other = mosaic_of(tmp_path, axcodes)
    np.testing.assert_array_equal(other.outlines, mosaic.outlines)
    assert np.abs(other.scan.astype(int) - mosaic.scan).max() <= 1


def test_labels_on_another_grid_lie_at_the_same_place(mosaic: Mosaic, tmp_path: Path) -> None:
    """As with --labels-spacing: the scan is resampled to the grid of the labels."""
    scan_image, _ = head()
    affine = scan_image.affine.copy()
    shape = (2 * SHAPE[0], 2 * SHAPE[1], 2 * SHAPE[2])
    affine[:3, :3] /= 2
    affine[:3, 3] += affine[:3, :3] @ [-0.5, -0.5, -0.5]
    _, fine = head(affine, shape)
    scan, labels = save(tmp_path / "a.nii.gz", scan_image), save(tmp_path / "b.nii.gz", fine)
    other = draw_mosaic(shown_volume(scan, labels), TABLE)
    for value in (LEFT, FRONT):
        panel, drawn = largest(mosaic, "coronal", value)
        other_panel, others = largest(other, "coronal", value)
        assert (
            abs(drawn[:, 1].mean() / panel.width - others[:, 1].mean() / other_panel.width) < 0.03
        )
        row, column = np.rint(others.mean(axis=0)).astype(int)
        middle = other.scan[other_panel.top + row, other_panel.left + column]
        assert middle > 200  # the bright ball of the scan is in the middle of its outline


def test_the_files_hold_the_picture(mosaic: Mosaic) -> None:
    """The outlines are exact, the scan is close, and both are small."""
    scan, outlines = encode_mosaic(mosaic)
    assert len(scan) + len(outlines) < 250_000
    with Picture.open(io.BytesIO(outlines)) as picture:
        drawn = np.asarray(picture.convert("RGBA"))
    opaque = mosaic.outlines[..., 3] == 255
    np.testing.assert_array_equal(drawn[opaque], mosaic.outlines[opaque])
    assert not drawn[~opaque][:, 3].any()
    with Picture.open(io.BytesIO(scan)) as picture:
        grey = np.asarray(picture.convert("L")).astype(int)
    assert np.abs(grey - mosaic.scan).mean() < 4


def test_a_value_without_a_name_is_not_outlined(tmp_path: Path) -> None:
    scan_image, labels_image = head()
    scan, labels = save(tmp_path / "a.nii", scan_image), save(tmp_path / "b.nii", labels_image)
    table = [label for label in TABLE if label.value != LEFT]
    drawn = draw_mosaic(shown_volume(scan, labels), table).outlines
    assert not (drawn == (*COLORS[LEFT], 255)).all(axis=-1).any()
    assert draw_mosaic(shown_volume(scan, labels), []).outlines.max() == 0
