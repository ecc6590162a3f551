from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from phantom import ORIENTATIONS, SHAPE, make_bundle, nifti, parse_spec, reorient, save

from pipeline.cli.app import main
from pipeline.errors import ConfigError
from pipeline.inference.quality_checks import quality_warnings, touched_faces
from pipeline.io.tables import read_csv


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_touched_faces_are_sides_of_the_body(axcodes: str) -> None:
    """Faces are named by the affine, whatever the order of the file's axes."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[3, 5, -1] = labels[0, 5, 5] = 2
    image = reorient(nifti(labels), axcodes)
    assert touched_faces(np.asarray(image.dataobj), image.affine) == ["left", "superior"]
    assert touched_faces(np.zeros(SHAPE, dtype=np.uint8), image.affine) == []


def test_volumes_outside_their_range_are_named() -> None:
    spec = parse_spec(
        plausible_ml={"front": [1, 2], "back": [0.5, 9], "both": [3, 10]},
        sums={"both": ["front", "back"]},
    )
    labels, affine = np.zeros(SHAPE, dtype=np.uint16), nifti().affine
    assert (
        quality_warnings(labels, affine, {"front": 1500.0, "back": 1600.0, "both": 3100.0}, spec)
        == []
    )
    assert quality_warnings(
        labels, affine, {"front": 2500.0, "back": 400.0, "both": 2900.0}, spec
    ) == [
        "front: 2.5 mL, expected 1 to 2: look at it",
        "back: 0.4 mL, expected 0.5 to 9: look at it",
        "both: 2.9 mL, expected 3 to 10: look at it",
    ]
    labels[0] = 7
    assert (
        quality_warnings(labels, affine, {"front": 1500.0, "back": 1600.0, "both": 3100.0}, spec)
        == []
    )  # a crop may touch its edge
    with pytest.raises(ConfigError, match=r"plausible_ml.* nose"):
        parse_spec(plausible_ml={"nose": [1, 2]})


def test_many_implausible_volumes_are_one_warning() -> None:
    """A scan in which almost nothing is found gets a warning that can be read."""
    names = ["a", "b", "c", "d", "e", "f"]
    labels = {"background": 0, **{name: i + 1 for i, name in enumerate(names)}}
    spec = parse_spec(labels=labels, plausible_ml={name: [1, 2] for name in names})
    background, affine = np.zeros(SHAPE, dtype=np.uint16), nifti().affine
    volumes = dict.fromkeys(names, 100.0) | {"f": 1500.0}
    (line,) = quality_warnings(background, affine, volumes, spec)
    assert line.startswith("5 of 6 volumes are out of range (a: 0.1 mL, expected 1 to 2, b: 0.1 mL")
    assert line.endswith(", d: 0.1 mL, expected 1 to 2, …): look at it")


def test_warnings_are_in_the_table(tmp_path: Path) -> None:
    """`volseg segment` writes them into cases.csv."""
    bundle = make_bundle(
        tmp_path / "tiny",
        warn_at_edge=True,
        sums={"both": ["front", "back"]},
        plausible_ml={"both": [1000, 2000]},
    )
    arguments = [
        "segment",
        str(save(tmp_path / "a.nii.gz")),
        "-o",
        str(tmp_path / "out"),
        "-b",
        str(bundle),
        "--device",
        "cpu",
    ]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    warnings = read_csv(tmp_path / "out" / "cases.csv")[0]["warnings"]
    assert "reach the scan's edge (" in warnings
    assert "mL, expected 1000 to 2000" in warnings
