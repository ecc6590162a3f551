from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from batch_folders import record_of, store

from pipeline.batch.bids_group import write_group_table
from pipeline.batch.records import CaseRecord
from pipeline.errors import ConfigError


def record(subject: str, session: str = "", rest: str = "", **changes: Any) -> CaseRecord:
    columns = {"participant_id": f"sub-{subject}"}
    folder, stem = f"sub-{subject}", f"sub-{subject}"
    if session:
        columns["session_id"] = f"ses-{session}"
        folder, stem = f"{folder}/ses-{session}", f"{stem}_ses-{session}"
    return record_of(f"{folder}/anat/{stem}{rest}_T1w", columns=columns, **changes)


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "group_volumes.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    (root / "participants.tsv").write_text(
        "participant_id\tage\tstatus\nsub-01\t39\tpatient\nsub-03\t50\tcontrol\n"
    )
    (root / "participants.json").write_text('{"age": {"Units": "year"}}')
    return root


def test_each_image_has_a_row_with_its_participant(dataset: Path, tmp_path: Path) -> None:
    """A failed image has no volumes, a participant who is not listed no age."""
    store(
        tmp_path / "out",
        record("01", "a", "_run-1", volumes_mm3={"left caudate": 3900.5}),
        record("01", "b", status="failed", volumes_mm3={}),
        record("02", volumes_mm3={"left caudate": 4000.0}, warnings=("one", "two")),
    )
    result = write_group_table(dataset, tmp_path / "out")
    assert (result.rows, result.unknown, result.without_image) == (3, ["sub-02"], ["sub-03"])
    first, second, third = table(tmp_path / "out")
    assert first == {
        "participant_id": "sub-01",
        "session_id": "ses-a",
        "run": "1",
        "image": "sub-01/ses-a/anat/sub-01_ses-a_run-1_T1w",
        "status": "done",
        "warnings": "n/a",
        "age": "39",
        "participants_status": "patient",
        "left_caudate": "3900.500",
    }
    assert (second["status"], second["left_caudate"], second["age"]) == ("failed", "n/a", "39")
    assert (third["session_id"], third["age"], third["warnings"]) == ("n/a", "n/a", "one; two")


def test_each_column_is_explained_with_its_unit(dataset: Path, tmp_path: Path) -> None:
    store(tmp_path / "out", record("01", volumes_mm3={"3rd ventricle": 1.0, "brain-stem": 2.0}))
    write_group_table(dataset, tmp_path / "out")
    dictionary = json.loads((tmp_path / "out" / "group_volumes.json").read_text())
    assert list(dictionary) == list(table(tmp_path / "out")[0])
    assert dictionary["3rd_ventricle"] == {"Description": "Volume: 3rd ventricle.", "Units": "mm^3"}
    assert dictionary["age"] == {"Units": "year"}
    assert "session_id" not in dictionary


def test_structures_whose_columns_would_be_one_have_two(dataset: Path, tmp_path: Path) -> None:
    store(tmp_path / "out", record("01", volumes_mm3={"a-b": 1.0, "a b": 2.0}))
    write_group_table(dataset, tmp_path / "out")
    row = table(tmp_path / "out")[0]
    assert (row["a_b"], row["a_b_"]) == ("1.000", "2.000")


def test_participants_may_be_missing(tmp_path: Path) -> None:
    store(tmp_path / "out", record("01"))
    result = write_group_table(tmp_path, tmp_path / "out")
    assert (result.rows, result.unknown, result.without_image) == (1, [], [])
    assert "age" not in table(tmp_path / "out")[0]


def test_some_participants(dataset: Path, tmp_path: Path) -> None:
    store(tmp_path / "out", record("01"), record("02"))
    assert write_group_table(dataset, tmp_path / "out", ["sub-02"]).rows == 1
    with pytest.raises(ConfigError, match="no result of these participants"):
        write_group_table(dataset, tmp_path / "out", ["09"])


def test_a_folder_without_results_is_an_error(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no output folder of volseg"):
        write_group_table(dataset, tmp_path / "none")
    store(tmp_path / "out", record_of("plain"))
    with pytest.raises(ConfigError, match="run the level `participant` first"):
        write_group_table(dataset, tmp_path / "out")
