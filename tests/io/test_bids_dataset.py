from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.io.bids_dataset import (
    BidsQuery,
    bids_subjects,
    find_bids_cases,
    read_bids_filter,
    read_participants,
)
from pipeline.io.discovery import LABELS_ENDING
from pipeline.types import Case

FILES = (
    "sub-01/ses-pre/anat/sub-01_ses-pre_run-1_T1w.nii.gz",
    "sub-01/ses-pre/anat/sub-01_ses-pre_run-02_T1w.nii.gz",
    "sub-01/ses-pre/anat/sub-01_ses-pre_T2w.nii.gz",
    "sub-01/ses-post/anat/sub-01_ses-post_acq-fast_T1w.nii.gz",
    "sub-02/anat/sub-02_T1w.nii",
    "sub-02/anat/sub-02_FLAIR.nii.gz",
    "sub-02/anat/sub-02_T1w.json",
    "sub-02/func/sub-02_task-rest_T1w.nii.gz",
    "sub-02/anat/extra/sub-02_acq-x_T1w.nii.gz",
    "derivatives/other/sub-01/anat/sub-01_T1w.nii.gz",
    "sourcedata/sub-03/anat/sub-03_T1w.nii.gz",
)
PRE_1, PRE_2 = (
    "sub-01/ses-pre/anat/sub-01_ses-pre_run-",
    "sub-01/ses-pre/anat/sub-01_ses-pre_run-02",
)
POST = "sub-01/ses-post/anat/sub-01_ses-post_acq-fast_T1w"
T1W = {f"{PRE_1}1_T1w", f"{PRE_2}_T1w", POST, "sub-02/anat/sub-02_T1w"}


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make(tmp_path / "data", *FILES)


def find(root: Path, *suffixes: str, **query: Any) -> list[Case]:
    return find_bids_cases(root, BidsQuery(suffixes=suffixes or ("T1w",), **query))


def names(cases: list[Case]) -> set[str]:
    return {case["case"] for case in cases}


def test_the_raw_images_of_one_suffix_are_cases(dataset: Path) -> None:
    """Each run and acquisition is a case; derivatives, sourcedata and other folders are left."""
    cases = find(dataset)
    assert [case["case"] for case in cases] == sorted(T1W)
    assert [case for case in cases if case.get("problem")] == []


def test_outputs_have_the_names_of_derivatives(dataset: Path) -> None:
    cases = {case["case"]: case for case in find(dataset)}
    case = cases[POST]
    expected = "sub-01/ses-post/anat/sub-01_ses-post_acq-fast_desc-volseg_dseg.nii.gz"
    assert case["outputs"] == {LABELS_ENDING: expected}
    assert case["columns"] == {"participant_id": "sub-01", "session_id": "ses-post"}
    assert case["image"] == str(dataset / f"{POST}.nii.gz")


@pytest.mark.parametrize("labels", [("01",), ("sub-01",), ("01", "sub-01")])
def test_participants_with_or_without_sub(dataset: Path, labels: tuple[str, ...]) -> None:
    assert names(find(dataset, participants=labels)) == T1W - {"sub-02/anat/sub-02_T1w"}


@pytest.mark.parametrize("labels", [("post",), ("ses-post",)])
def test_sessions_with_or_without_ses(dataset: Path, labels: tuple[str, ...]) -> None:
    assert names(find(dataset, sessions=labels)) == {POST}


def test_an_unknown_label_lists_those_there_are(dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"no participant 1; there are 01, 02$"):
        find(dataset, participants=("02", "1"))
    with pytest.raises(ConfigError, match=r"no session 1; there are post, pre$"):
        find(dataset, sessions=("1",))


def test_a_suffix_that_is_not_there_lists_those_there_are(dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"\*_PDw.nii.gz is selected; .* FLAIR, T1w, T2w$"):
        find(dataset, "PDw")


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"session": "pre"}, {f"{PRE_1}1_T1w", f"{PRE_2}_T1w"}),
        ({"session": None}, {"sub-02/anat/sub-02_T1w"}),
        ({"run": 2}, {f"{PRE_2}_T1w"}),
        ({"run": ["1", "2"], "acquisition": None}, {f"{PRE_1}1_T1w", f"{PRE_2}_T1w"}),
        ({"acq": "*"}, {POST}),
        ({"acquisition": [None, "fast"], "datatype": "anat"}, T1W),
        ({"subject": "02"}, {"sub-02/anat/sub-02_T1w"}),
    ],
)
def test_filters(
    dataset: Path, tmp_path: Path, filters: dict[str, Any], expected: set[str]
) -> None:
    path = tmp_path / "filter.json"
    path.write_text(json.dumps({"bold": {"task": "rest"}, "t1w": filters}))
    assert names(find(dataset, entities=read_bids_filter(path, "T1w"))) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "found no object"),
        ('{"bold": {}}', "found bold"),
        ('{"t1w": {"suffix": "UNIT1"}}', r"t1w.suffix: no entity of BIDS; .*--suffix"),
        ('{"t1w": {"run": {}}}', "t1w.run: expected a label"),
        ('{"t1w": {"run": []}}', "t1w.run: expected a label"),
    ],
)
def test_a_wrong_filter_is_explained(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "filter.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_bids_filter(tmp_path / "filter.json", "T1w")


def test_bidsignore_is_respected(dataset: Path) -> None:
    (dataset / ".bidsignore").write_text("# a comment\n*_run-*\nsub-02/\n")
    assert names(find(dataset)) == {POST}


def test_what_cannot_be_used_is_a_failed_case(dataset: Path) -> None:
    """A link to data that was not fetched, a name that is not BIDS, a name of another subject."""
    folder = dataset / "sub-02" / "anat"
    (folder / "sub-02_run-9_T1w.nii.gz").symlink_to(".git/annex/gone.nii.gz")
    make(folder, "sub-02_acq_T1w.nii.gz", "sub-03_T1w.nii.gz", "notes_T1w.txt")
    problems = {
        case["case"].rpartition("/")[2]: case["problem"]
        for case in find(dataset)
        if case.get("problem")
    }
    assert set(problems) == {"sub-02_run-9_T1w", "sub-02_acq_T1w", "sub-03_T1w"}
    assert "was the data fetched?" in problems["sub-02_run-9_T1w"]
    assert "no name of BIDS" in problems["sub-02_acq_T1w"]
    assert "its name says sub-03, its folder sub-02" in problems["sub-03_T1w"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_a_failed_case(dataset: Path) -> None:
    (dataset / "sub-02").chmod(0)
    try:
        assert any("cannot be searched" in case.get("problem", "") for case in find(dataset))
    finally:
        (dataset / "sub-02").chmod(0o755)


def test_two_files_of_one_image_are_an_error(dataset: Path) -> None:
    make(dataset, "sub-02/anat/sub-02_T1w.nii.gz")
    with pytest.raises(ConfigError, match=r"sub-02_T1w: .*sub-02_T1w.nii.* and .*: keep one"):
        find(dataset)


def test_several_channels_are_images_with_the_same_entities(dataset: Path) -> None:
    """A run without its second channel is a failed case, not a pair with another run's."""
    make(dataset, "sub-01/ses-pre/anat/sub-01_ses-pre_run-1_FLAIR.nii.gz")
    cases = {case["case"]: case for case in find(dataset, "T1w", "FLAIR")}
    pair = cases[f"{PRE_1}1"]
    assert [Path(path).name for path in pair["image"]] == [
        "sub-01_ses-pre_run-1_T1w.nii.gz",
        "sub-01_ses-pre_run-1_FLAIR.nii.gz",
    ]
    assert "problem" not in pair
    assert "no image FLAIR with the same entities" in cases[PRE_2]["problem"]
    assert pair["outputs"][LABELS_ENDING].endswith("run-1_desc-volseg_dseg.nii.gz")


def test_a_folder_that_is_no_dataset_is_explained(tmp_path: Path) -> None:
    make(tmp_path, "a_T1w.nii.gz")
    with pytest.raises(ConfigError, match="holds no folder sub-<label>"):
        bids_subjects(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        bids_subjects(tmp_path / "none")


def test_participants_are_read_as_people_write_them(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, missing prefixes and short lines."""
    text = "\ufeffparticipant_id\tage\tsex\r\nsub-01\t39\tm\r\n02\t50\r\n\r\n"
    (tmp_path / "participants.tsv").write_bytes(text.encode())
    assert read_participants(tmp_path) == {
        "sub-01": {"age": "39", "sex": "m"},
        "sub-02": {"age": "50"},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id\tage\n01\t3\n", "found the columns id, age, expected participant_id"),
        (b"participant_id\nsub-01\n01\n", "sub-01 has two rows"),
        ("participant_id\tname\nsub-01\tJörg\n".encode("latin-1"), "cannot be read as UTF-8"),
    ],
)
def test_a_wrong_table_of_participants_is_explained(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "participants.tsv").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_participants(tmp_path)
