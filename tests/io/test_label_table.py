from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from skimage.color import rgb2lab

from pipeline.config.spec import load_spec
from pipeline.io.label_table import PALETTE, VISIONS, label_table
from pipeline.io.tables import read_csv

ROOT = Path(__file__).parents[2]
CSV = ROOT / "pipeline" / "io" / "freesurfer_labels.csv"


@pytest.mark.parametrize(
    ("name", "value", "color"),
    [
        ("left thalamus", 10, (0, 118, 14)),
        ("Left-Thalamus-Proper", 10, (0, 118, 14)),
        ("left inferior lateral ventricle", 5, (196, 58, 250)),
        ("Right_Inf_Lat_Vent", 44, (196, 58, 250)),
        ("cerebrospinal fluid", 24, (60, 60, 60)),
        ("brain-stem", 16, (119, 159, 176)),
        ("right ventral DC", 60, (165, 42, 42)),
        ("3rd ventricle", 14, (204, 182, 142)),
        ("background", 0, (0, 0, 0)),
    ],
)
def test_freesurfers_structures_have_its_colours(
    name: str, value: int, color: tuple[int, int, int]
) -> None:
    """In any spelling of the name."""
    (row,) = label_table({name: value})
    assert (row.name, row.value, row.color) == (name, value, color)


def test_name_and_value_must_both_agree() -> None:
    """Another structure with the same value, or another value, gets a colour of the palette."""
    table = label_table({"background": 0, "anterior": 2, "left thalamus": 9, "left caudate": 11})
    assert [row.color for row in table] == [(0, 0, 0), PALETTE[0], PALETTE[1], (122, 186, 220)]


def test_all_labels_of_the_brain_bundle_are_freesurfers() -> None:
    """Left and right have one colour, all other structures differ."""
    labels = load_spec(ROOT / "bundles/brain_mr_structures/configs/spec.yaml").labels
    table = label_table(labels)
    assert [(row.name, row.value) for row in table] == list(labels.items())
    colors = {int(row["value"]): (int(row["red"]), int(row["green"]), int(row["blue"]))
              for row in read_csv(CSV)}  # fmt: skip
    assert all(row.color == colors[row.value] for row in table)
    # both pallida have one colour too, but for one step of red
    assert (
        len({row.color for row in table})
        == len({re.sub("left|right", "", name) for name in labels}) + 1
    )


def test_other_labels_have_distinct_colours() -> None:
    """Beyond the palette too, next to FreeSurfer's, and the same at each call."""
    labels = {"background": 0, "left thalamus": 10} | {f"part {i}": 1000 + i for i in range(300)}
    table = label_table(labels)
    assert len({row.color for row in table}) == len(labels)
    assert table == label_table(labels)
    assert all(0 <= part <= 255 for row in table for part in row.color)
    alone = label_table({"background": 0} | {f"part {i}": 1000 + i for i in range(8)})
    assert [row.color for row in alone[1:8]] == list(PALETTE)


@pytest.mark.parametrize(
    ("count", "normal", "colour_blind"), [(7, 26.0, 16.0), (40, 20.0, 7.0), (138, 8.0, 2.5)]
)
def test_colours_of_other_labels_look_different(
    count: int, normal: float, colour_blind: float
) -> None:
    """By scikit-image's CIELAB, with normal vision and as people without one kind of cone see."""
    table = label_table({"background": 0} | {f"part {i}": 2000 + i for i in range(count)})
    colors = np.array([row.color for row in table[1:]]) / 255
    linear = np.where(colors > 0.04045, ((colors + 0.055) / 1.055) ** 2.4, colors / 12.92)
    for number, vision in enumerate(VISIONS):
        seen = np.clip(linear @ vision.T, 0, 1)
        encoded = np.where(seen > 0.0031308, 1.055 * seen ** (1 / 2.4) - 0.055, 12.92 * seen)
        lab = rgb2lab(encoded[None])[0]
        apart = np.linalg.norm(lab[:, None] - lab, axis=-1)
        limit = colour_blind if number else normal
        assert apart[~np.eye(count, dtype=bool)].min() > limit


def test_visions_keep_grey() -> None:
    """People see black, grey and white as they are, whatever cones they have."""
    assert np.allclose(VISIONS.sum(axis=2), 1, atol=1e-5)


def test_standard_labels_have_more_names() -> None:
    """Abbreviation, FreeSurfer's name and BIDS's value, which other labels lack."""
    table = label_table({"background": 0, "left hippocampus": 17, "right pallidum": 9})
    background, left, other = table
    assert (background.abbreviation, background.bids_value, background.rgba) == ("BG", 0, (0,) * 4)
    assert (left.abbreviation, left.freesurfer_name) == ("L-Hip", "Left-Hippocampus")
    assert (left.bids_value, left.hex_color, left.rgba) == (9, "#DCD814", (220, 216, 20, 255))
    assert (other.abbreviation, other.freesurfer_name, other.bids_value) == ("", "", None)


def test_the_table_is_whole() -> None:
    """Values and names are unique, colours are bytes, and both sides are there."""
    rows = read_csv(CSV)
    for column in ("value", "name", "abbreviation"):
        assert len({row[column] for row in rows}) == len(rows)
    assert {row["bids"] for row in rows} <= {str(value) for value in range(12)} | {""}
    assert all(0 <= int(row[part]) <= 255 for row in rows for part in ("red", "green", "blue"))
    left = {row["name"][5:] for row in rows if row["name"].startswith("Left-")}
    right = {row["name"][6:] for row in rows if row["name"].startswith("Right-")}
    assert left == right
