from __future__ import annotations

import re
from pathlib import Path

import pytest
from phantom import nifti, parse_spec, save

from pipeline.errors import ConfigError
from pipeline.io.cases import case_name, find_cases
from pipeline.io.writer import as_nibabel, write_labels

CHANNELS = ["T1w", "FLAIR"]


def test_channels_are_grouped_by_name_and_number(tmp_path: Path) -> None:
    """The images are in the order of the channels."""
    second = save(tmp_path / "a_0001.nii.gz")
    first = save(tmp_path / "a_T1w.nii.gz")
    (case,) = find_cases([tmp_path], parse_spec(channels=CHANNELS))
    assert case == {"case": "a", "image": [str(first), str(second)]}


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a_FLAIR"], "a: no file for channel T1w; found .*a_FLAIR.nii.gz"),
        (["a_T1w", "a_0000"], "a: two files for channel T1w, .*a_0000.nii.gz and .*; keep one"),
        (["a_0002"], "a_0002: which channel is .*a_0002.nii.gz. Expected a name that ends in one"),
    ],
)
def test_incomplete_channels_are_problems_of_their_case(
    tmp_path: Path, names: list[str], says: str
) -> None:
    """The message names the case and the files; the other cases are found."""
    for name in [*names, "z_T1w", "z_FLAIR"]:
        save(tmp_path / f"{name}.nii.gz")
    bad, good = find_cases([tmp_path], parse_spec(channels=CHANNELS))
    assert re.search(says, bad["problem"])
    assert good["case"] == "z"
    assert "problem" not in good


def test_the_fallback_channel_replaces_missing_files(tmp_path: Path) -> None:
    """A file without a channel in its name belongs to it; another channel cannot replace it."""
    spec = parse_spec(channels=CHANNELS, fallback_channel="T1w")
    path = str(save(tmp_path / "sub" / "c.nii.gz"))
    assert find_cases([tmp_path], spec) == [{"case": "sub/c", "image": [path, path]}]
    save(tmp_path / "d_FLAIR.nii.gz")
    bad, _ = find_cases([tmp_path], spec)
    assert "d: no file for channel T1w" in bad["problem"]


def test_repeated_inputs_are_one_case(tmp_path: Path) -> None:
    """Two different files with one output are refused."""
    path = save(tmp_path / "in" / "a.nii.gz")
    assert (
        len(find_cases([tmp_path / "in", path, str(tmp_path / "in" / "*.gz")], parse_spec())) == 1
    )
    other = save(tmp_path / "other" / "a.nii")
    with pytest.raises(ConfigError, match=r"1 outputs .*, for one a_seg.nii.gz from .* and .*"):
        find_cases([path, other], parse_spec())


def test_label_maps_of_volseg_are_not_inputs(tmp_path: Path) -> None:
    """Those of other programs are, and hidden files are not."""
    image = nifti()
    labels = (image.get_fdata() > 100).astype("uint8")
    save(tmp_path / "a.nii.gz")
    save(tmp_path / ".hidden.nii.gz")
    write_labels(tmp_path / "a_seg.nii.gz", as_nibabel(labels, image.affine))
    save(tmp_path / "b_seg.nii.gz")
    assert [case["case"] for case in find_cases([tmp_path], parse_spec())] == ["a", "b_seg"]


def test_inputs_without_images_are_refused(tmp_path: Path) -> None:
    """Missing paths, empty folders and patterns that match nothing."""
    for item in (tmp_path, f"{tmp_path}/*.nii.gz"):
        with pytest.raises(ConfigError, match="no image files there"):
            find_cases([item], parse_spec())
    with pytest.raises(ConfigError, match="no such file or folder"):
        find_cases([tmp_path / "none.nii"], parse_spec())


def test_nothing_usable_is_refused_and_one_problem_is_not(tmp_path: Path) -> None:
    """Beside a good file, what cannot be used is a case with a problem."""
    good = save(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii.gz").symlink_to(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"this link leads to .*none: No such file"):
        find_cases([tmp_path / "b.nii.gz"], parse_spec())
    cases = find_cases([good, tmp_path / "b.nii.gz", tmp_path / "c.nii.gz"], parse_spec())
    assert [case.get("problem", "").partition(": ")[2][:16] for case in cases] == [
        "",
        "this link leads ",
        "no such file or ",
    ]


def test_a_case_is_named_by_its_first_file() -> None:
    """Without folder and suffix."""
    assert case_name({"case": "", "image": ["in/a.b.nii.gz", "in/c.nii"]}) == "a.b"
