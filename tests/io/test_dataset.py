from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.parser import parse_config
from pipeline.config.run import Run
from pipeline.errors import ConfigError
from pipeline.io.dataset import (
    dataset_folders,
    expand_variables,
    fold_cases,
    label_maps,
    labelled_cases,
    training_cases,
)
from pipeline.types import Case


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pairs that dataset.json lists, one that it does not list, and two folds."""
    names = ["a_1", "a_2", "b.x_1", "b.x_2", "c"]
    for sub in ("imagesTr", "labelsTr"):
        (tmp_path / sub).mkdir()
        for name in [*names, "orphan"]:
            (tmp_path / sub / f"{name}.nii.gz").touch()
    pairs = [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        for name in names
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": pairs}))
    folds = [{"train": names[:4], "val": names[4:]}, {"train": names[1:], "val": names[:1]}]
    (tmp_path / "splits.json").write_text(json.dumps(folds))
    return tmp_path


def names_of(cases: list[Case]) -> list[str]:
    return [case["case"] for case in cases]


def test_the_listed_pairs_are_the_cases(folder: Path) -> None:
    """In the order of dataset.json, named by the image; other pairs are left out."""
    cases = labelled_cases(folder)
    assert names_of(cases) == ["a_1", "a_2", "b.x_1", "b.x_2", "c"]
    assert all(Path(path).is_file() for c in cases for path in (str(c["image"]), c["label"]))


@pytest.mark.parametrize("fold", [0, 1])
def test_training_and_validation_cases_are_disjoint(folder: Path, fold: int) -> None:
    """Together they are all cases; without splits there are all cases in both."""
    train = names_of(fold_cases(folder, "splits.json", fold, "train"))
    val = names_of(fold_cases(folder, "splits.json", fold, "val"))
    assert not set(train) & set(val)
    assert set(train) | set(val) == set(names_of(labelled_cases(folder)))
    assert names_of(fold_cases(folder, None, 0, "val")) == names_of(labelled_cases(folder))


def test_environment_variables_are_filled_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`$NAME/sub` is replaced; the message names a variable that is not set."""
    monkeypatch.setenv("SOME_DATA", str(folder.parent))
    assert dataset_folders(f"$SOME_DATA/{folder.name}") == [folder]
    monkeypatch.delenv("SOME_DATA")
    with pytest.raises(ConfigError, match="SOME_DATA/x: set the environment variable"):
        dataset_folders("$SOME_DATA/x")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda folder: (folder / "dataset.json").unlink(),
            "found no pair of image and label in this nnU-Net raw folder",
        ),
        (lambda folder: (folder / "dataset.json").write_text("{"), "dataset.json: is not JSON"),
        (
            lambda folder: (folder / "dataset.json").write_text("{}"),
            "found no pair of image and label",
        ),
        (
            lambda folder: (folder / "dataset.json").write_text('{"training": [{"image": "x"}]}'),
            "expected pairs of `image` and `label`",
        ),
        (
            lambda folder: (folder / "labelsTr" / "a_2.nii.gz").unlink(),
            r"does not have: a_2 \(listed, and missing: .*labelsTr/a_2.nii.gz\)",
        ),
        (
            lambda folder: (folder / "splits.json").write_text('[{"train": ["z"], "val": []}]'),
            "does not have: z",
        ),
        (
            lambda folder: (folder / "splits.json").write_text("[]"),
            "fold 0: splits.json holds no folds",
        ),
        (
            lambda folder: (folder / "splits.json").write_text('{"train": []}'),
            "splits.json: expected a list of folds",
        ),
        (
            lambda folder: (folder / "splits.json").write_text('[{"val": []}]'),
            "splits.json: expected a list of folds",
        ),
    ],
)
def test_an_invalid_dataset_is_refused(folder: Path, change: Any, says: str) -> None:
    """The message holds the file and what is wrong in it."""
    change(folder)
    with pytest.raises(ConfigError, match=says):
        fold_cases(folder, "splits.json", 0, "train")


def test_a_missing_file_counts_where_it_is_needed(folder: Path) -> None:
    """All cases need all listed files; a fold, which a plan made without a case, does not."""
    (folder / "labelsTr" / "c.nii.gz").unlink()
    assert names_of(fold_cases(folder, "splits.json", 0, "train")) == [
        "a_1",
        "a_2",
        "b.x_1",
        "b.x_2",
    ]
    with pytest.raises(ConfigError, match=r"1 cases are incomplete; .*/c\.nii"):
        fold_cases(folder, None, 0, "val")


def test_an_unknown_fold_is_refused(folder: Path) -> None:
    """The message holds the folds that exist."""
    with pytest.raises(ConfigError, match=r"fold 2: splits\.json holds folds 0 to 1"):
        fold_cases(folder, "splits.json", 2, "val")
    with pytest.raises(ConfigError, match="no such folder; expected a dataset"):
        labelled_cases(folder / "none")


def test_the_real_folds(data: Path) -> None:
    """260 pairs in five folds of 52; no case is in two folds."""
    parts = [
        names_of(fold_cases(data / "hippocampus", "splits_5fold.json", fold, "val"))
        for fold in range(5)
    ]
    assert [len(part) for part in parts] == [52] * 5
    assert len({name for part in parts for name in part}) == 260


def run_of(**changes: Any) -> Run:
    content = {
        "bundle": "b",
        "dataset": "d",
        "epochs": 1,
        "batch_size": 1,
        "learning_rate": 0.1,
        "splits": "splits.json",
    }
    return parse_config(Run, content | changes, "run")


def test_training_cases(folder: Path) -> None:
    """The fold's cases without `hold_out`, repeated `repeats` times."""
    assert names_of(training_cases(folder, run_of())) == ["a_1", "a_2", "b.x_1", "b.x_2"]
    assert (
        names_of(training_cases(folder, run_of(hold_out=["a_2", "b.x_1"], repeats=2)))
        == ["a_1", "b.x_2"] * 2
    )
    with pytest.raises(ConfigError, match=r"hold_out.* c"):
        training_cases(folder, run_of(hold_out=["c"]))


def test_label_maps_are_the_volumes_of_a_folder(folder: Path) -> None:
    """For synthesis every volume is a label map; tables and other files are skipped."""
    (folder / "labelsTr" / "labels.csv").touch()
    cases = training_cases(
        folder / "labelsTr", run_of(synthesis={"table": "labels.csv"}, hold_out=["orphan"])
    )
    assert names_of(cases) == ["a_1", "a_2", "b.x_1", "b.x_2", "c"]
    assert all(set(case) == {"case", "label"} and Path(case["label"]).is_file() for case in cases)
    with pytest.raises(ConfigError, match="found no volume"):
        label_maps(folder)


def test_label_maps_get_the_scans_of_their_names(folder: Path) -> None:
    """The suffix may differ; a label map without a scan stays without an image."""
    scans = folder / "scans"
    scans.mkdir()
    for name in ("a_1.nii", "c.nii.gz", "other.nii.gz", "b.x_1.txt"):
        (scans / name).touch()
    synthesis = {"table": "labels.csv", "scans": str(scans)}
    cases = training_cases(folder / "labelsTr", run_of(synthesis=synthesis))
    images = {case["case"]: case["image"] for case in cases if "image" in case}
    assert images == {"a_1": str(scans / "a_1.nii"), "c": str(scans / "c.nii.gz")}
    assert len(cases) > len(images)
    with pytest.raises(ConfigError, match="scans with the names of the label maps"):
        label_maps(folder / "labelsTr", folder / "labelsTr" / "..")


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(ConfigError, match=r"\$NOWHERE"):
        expand_variables("$NOWHERE/labels.csv")
