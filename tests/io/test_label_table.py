from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from skimage.color import rgb2lab

from pipeline.config.spec import load_spec
from pipeline.io.label_table import PALETTE, label_table
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
    assert [row.color for row in table[2:11]] == list(PALETTE)


def test_colours_of_other_labels_look_different() -> None:
    """By scikit-image's CIELAB: far apart for 40 labels, and not too close for 138."""
    for count, distance in ((40, 25.0), (138, 14.0)):
        table = label_table({"background": 0} | {f"part {i}": 2000 + i for i in range(count)})
        colors = np.array([[row.color for row in table[1:]]]) / 255
        lab = rgb2lab(colors)[0]
        apart = np.linalg.norm(lab[:, None] - lab, axis=-1)
        assert apart[~np.eye(count, dtype=bool)].min() > distance


def test_the_table_is_whole() -> None:
    """Values and names are unique, colours are bytes, and both sides are there."""
    rows = read_csv(CSV)
    assert len({row["value"] for row in rows}) == len({row["name"] for row in rows}) == len(rows)
    assert all(0 <= int(row[part]) <= 255 for row in rows for part in ("red", "green", "blue"))
    left = {row["name"][5:] for row in rows if row["name"].startswith("Left-")}
    right = {row["name"][6:] for row in rows if row["name"].startswith("Right-")}
    assert left == right
