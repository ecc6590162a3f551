"""Pictures of labels over slices of a volume."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from phantom import SPACING, nifti, oblique, reorient, smooth

from pipeline.evaluation import overlays
from pipeline.evaluation.overlays import ComparedCase, draw_overlay, draw_worst_cases
from pipeline.io import Image
from pipeline.types import Array

NAMES = {"background": 0, "left hippocampus": 17, "right hippocampus": 53, "lesion": 900}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn; they are not written, which takes a second each."""
    kept: list[Figure] = []
    monkeypatch.setattr(overlays, "save_figure", lambda figure, path, dpi: kept.append(figure))
    return kept


@pytest.fixture
def labels() -> Array:
    """Two boxes, one per side, and a small one, on the grid of the phantom."""
    array = np.zeros((17, 24, 21), dtype=np.uint16)
    array[3:6, 4:10, 5:12] = 17
    array[10:14, 4:10, 5:12] = 53
    array[9, 20, 15] = 900
    return array


def legend_of(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_an_overlay_has_three_planes_in_physical_proportions(
    labels: Array, drawn: list[Figure], tmp_path: Path
) -> None:
    """Each panel has its plane, the letters of its directions and the aspect of its spacings."""
    draw_overlay(nifti(), labels, NAMES, tmp_path / "overlay.png", title="case 1")
    (figure,) = drawn
    panels = figure.axes
    planes = [panel.get_title().split(",")[0] for panel in panels]
    assert planes == ["sagittal", "coronal", "axial"]
    letters = ["".join(text.get_text() for text in panel.texts) for panel in panels]
    assert letters == ["PA", "RL", "RL"]
    x, y, z = SPACING
    assert [panel.get_aspect() for panel in panels] == pytest.approx([z / y, z / x, y / x])
    # The subject's left, the low end of the R axis, is on the picture's right.
    assert [panel.get_xlim()[0] > panel.get_xlim()[1] for panel in panels] == [False, True, True]


@pytest.mark.parametrize("axcodes", ["LPS", "PIR", "SAL"])
def test_the_orientation_of_the_file_does_not_matter(
    axcodes: str, labels: Array, drawn: list[Figure], tmp_path: Path
) -> None:
    """The same volume, stored in another orientation, gives the same panels."""
    turned = np.asarray(reorient(nib.Nifti1Image(labels, oblique()), axcodes).dataobj)
    draw_overlay(nifti(), labels, NAMES, tmp_path / "a.png")
    draw_overlay(reorient(nifti(), axcodes), turned, NAMES, tmp_path / "b.png")
    first, second = drawn
    for a, b in zip(first.axes, second.axes, strict=True):
        assert a.get_title() == b.get_title()
        for one, other in zip(a.images, b.images, strict=True):
            np.testing.assert_array_equal(one.get_array(), other.get_array())


def test_several_slices_are_spread_over_the_labels(
    labels: Array, drawn: list[Figure], tmp_path: Path
) -> None:
    """One row per plane, from one end of the labels to the other, without the ends."""
    draw_overlay(nifti(), labels, NAMES, tmp_path / "overlay.png", slices=3)
    titles = [panel.get_title() for panel in drawn[0].axes]
    assert titles[:3] == ["sagittal, slice 6", "sagittal, slice 8", "sagittal, slice 10"]
    assert len(titles) == 9


def test_the_legend_merges_sides_and_starts_with_the_largest(
    labels: Array, drawn: list[Figure], tmp_path: Path
) -> None:
    """Labels that do not occur have no entry; a structure with one side keeps its full name."""
    draw_overlay(nifti(), labels, NAMES | {"absent": 5}, tmp_path / "a.png")
    draw_overlay(nifti(), np.where(labels == 17, 0, labels), NAMES, tmp_path / "b.png")
    assert legend_of(drawn[0]) == ["hippocampus", "lesion"]
    assert legend_of(drawn[1]) == ["right hippocampus", "lesion"]


def test_a_legend_of_many_labels_has_twelve_entries(drawn: list[Figure], tmp_path: Path) -> None:
    """The eleven largest and the number of the others."""
    labels = np.zeros((17, 24, 21), dtype=np.uint8)
    names = {"background": 0}
    for value in range(1, 16):
        labels[value, :value] = value
        names[f"label {value}"] = value
    draw_overlay(nifti(), labels, names, tmp_path / "overlay.png")
    entries = legend_of(drawn[0])
    assert entries == [*(f"label {value}" for value in range(15, 4, -1)), "and 4 smaller"]


def test_a_volume_without_labels_is_drawn_too(drawn: list[Figure], tmp_path: Path) -> None:
    """Slices through its middle, without a legend."""
    empty = np.zeros((17, 24, 21), dtype=np.uint8)
    draw_overlay(nifti(), empty, NAMES, tmp_path / "overlay.png")
    titles = [panel.get_title() for panel in drawn[0].axes]
    assert titles == ["sagittal, slice 8", "coronal, slice 12", "axial, slice 10"]
    assert not drawn[0].legends


def test_worst_cases_show_where_the_maps_differ_most(
    labels: Array, drawn: list[Figure], tmp_path: Path
) -> None:
    """One row per case: the slice with the most different voxels, the reference outlined."""
    prediction = labels.copy()
    prediction[12, 4:10, 5:12] = 0
    image = Image(array=smooth(), affine=oblique())
    case = ComparedCase(
        title="sub-01",
        image=image,
        prediction=Image(array=prediction, affine=oblique()),
        reference=Image(array=labels, affine=oblique()),
    )
    draw_worst_cases([case, case], NAMES, tmp_path / "worst.png")
    (figure,) = drawn
    assert [panel.get_title() for panel in figure.axes[:1]] == ["sub-01\nsagittal, slice 12"]
    assert len(figure.axes) == 6
    assert all(panel.collections for panel in figure.axes[:1])
    assert legend_of(figure) == ["hippocampus", "lesion", "area: prediction\nline: reference"]


def test_an_overlay_is_written_as_png(labels: Array, tmp_path: Path) -> None:
    """Missing folders are made."""
    path = tmp_path / "new" / "overlay.png"
    draw_overlay(nifti(), labels, NAMES, path)
    assert imread(path).ndim == 3
